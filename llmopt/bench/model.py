"""The model that quantizers are timed on: ``llmopt bench model``.

A Qwen2 of 14.2 million parameters, trained on the built-in text: small enough that a peer finishes
in a minute on two cores, trained so that its activations have the structure that GPTQ lives on.
Every weight is a function of the seed, the text and the machine; some six minutes on two
cores with bfloat16 instructions.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from llmopt.bench.environments import cache_folder, locked
from llmopt.calibration.builtin_text import builtin_documents, split_sha256
from llmopt.calibration.documents import Document
from llmopt.calibration.tokenizer import load_tokenizer
from llmopt.demo.corpus import build_corpus
from llmopt.demo.paths import demo_model_path
from llmopt.demo.tokenizer import END_OF_TEXT_ID, VOCAB_SIZE, save_tokenizer
from llmopt.demo.train import TrainPlan, save_model, silence_residuals, train

MAX_LENGTH = 2048
PLAN = TrainPlan(steps=120, batch_tokens=4096, length=512, warmup_steps=10, long_share=0, bf16=True)


def bench_config() -> Qwen2Config:
    """The architecture: grouped-query attention with biased q, k and v, SwiGLU, a tied head."""
    return Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
    )


def bench_model(plan: TrainPlan = PLAN) -> Path:
    """The folder of the trained model; trains it where it is not in the cache yet.

    It lies in ``$XDG_CACHE_HOME/llmopt/bench``, named by a hash of what decides its weights.
    An interrupted training goes on from its last checkpoint.
    """
    documents = builtin_documents("train")
    folder = cache_folder() / "bench" / f"qwen2-14m-{_digest(plan, documents)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):  # a second process waits for the first one's model
        if not folder.is_dir():
            partial, checkpoint = folder.with_suffix(".making"), folder.with_suffix(".pt")
            partial.mkdir(exist_ok=True)
            write_trained_model(partial, plan, documents, checkpoint)
            os.replace(partial, folder)
            checkpoint.unlink()
    return folder


def write_trained_model(
    folder: Path, plan: TrainPlan, documents: list[Document], checkpoint: Path
) -> None:
    """Train on ``documents`` and write weights, config and tokenizer into ``folder``."""
    config = bench_config()
    config.save_pretrained(folder)
    save_tokenizer(
        Tokenizer.from_file(str(demo_model_path() / "tokenizer.json")), folder, MAX_LENGTH
    )
    # As its users will open it: transformers gives this architecture a pre-tokenizer of its own.
    tokenizer = load_tokenizer(folder).tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    corpus = build_corpus(tokenizer.backend_tokenizer, documents)
    torch.manual_seed(plan.seed)
    model = Qwen2ForCausalLM(config)
    silence_residuals(model)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a step has two threads of its own
    try:
        train(model, plan, corpus, checkpoint, every=20)
    finally:
        torch.set_num_threads(num_threads)
    save_model(model, folder)


def _digest(plan: TrainPlan, documents: list[Document]) -> str:
    told = [asdict(plan), bench_config().to_diff_dict(), split_sha256(documents)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
