from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.engines import random_prompts, tiny_model, transformers_tokens
from support.quantized import write_quantized
from support.small_jobs import VOCAB_SIZE, write_job
from support.tiny_models import rewrite_tensors

from llmopt.decoding import Engine
from llmopt.decoding.opening import open_model
from llmopt.errors import BadInputError
from llmopt.formats.compressed_tensors import CompressedTensors
from llmopt.loading import load, load_dense
from llmopt.quantization.scheme import Scheme
from llmopt.quantized_linear import QuantizedLinear


@pytest.mark.parametrize("architecture", ["llama", "gemma3_multimodal", "mixtral"])
def test_a_checkpoint_is_opened_with_its_tokenizer(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = write_job(tmp_path, architecture)
    opened = open_model(str(source))
    assert opened.tokenizer is not None and opened.vocabulary_size == VOCAB_SIZE
    assert not opened.model.training
    assert opened.model.dtype == torch.bfloat16
    engine = Engine(source, dtype="float32", num_pages=8)
    assert engine.max_context == 256
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for prompt, answer in zip(
        prompts := random_prompts(2), engine.generate(prompts, max_new_tokens=8), strict=True
    ):
        assert answer.token_ids == transformers_tokens(expected, prompt, 8)
    assert engine.generate("kato mire", max_new_tokens=3)[0].text is not None


def test_what_llmopt_quantized_is_opened_packed(tmp_path: Path) -> None:
    scheme = Scheme(bits=4, group_size=32)
    write_quantized(tmp_path, CompressedTensors(), lambda _: scheme, dtype=torch.bfloat16)
    engine = Engine(tmp_path, dtype=torch.float32, num_pages=8)
    packed = [m for m in engine._opened.model.modules() if isinstance(m, QuantizedLinear)]
    assert len(packed) == 7
    expected = load(tmp_path, dtype=torch.float32)
    (prompt,) = random_prompts(1)
    (answer,) = engine.generate(prompt, max_new_tokens=8)
    assert answer.token_ids == transformers_tokens(expected, prompt, 8)


def test_a_model_is_taken_as_it_is() -> None:
    opened = open_model(tiny_model())
    assert opened.model is tiny_model() and opened.tokenizer is None
    assert opened.eos_token_ids == {2}


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist"):
        open_model(tmp_path / "nowhere")
    with pytest.raises(BadInputError, match="llmopt serve"):
        open_model("model.gguf")
    with pytest.raises(BadInputError, match="no model"):
        open_model(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="'flot32'"):
        open_model(tmp_path, dtype="flot32")
    with pytest.raises(BadInputError, match="unknown device"):
        open_model(tmp_path, device="abacus")
    source = write_job(tmp_path)
    with pytest.raises(BadInputError, match="float64"):
        open_model(source, dtype="float64")


def test_a_missing_tensor_is_an_error(tmp_path: Path) -> None:
    source = write_job(tmp_path)
    rewrite_tensors(source, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(BadInputError, match=r"up_proj"):
        load_dense(source)


def test_a_checkpoint_without_a_tokenizer_takes_token_ids(tmp_path: Path) -> None:
    source = write_job(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    assert Engine(source, num_pages=4).generate([5, 6], max_new_tokens=2)[0].text is None
