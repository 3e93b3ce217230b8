"""The committed demo model: small, loadable by the usual doors, as good as written down."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig

from llmopt.calibration.builtin_text import builtin_documents
from llmopt.demo.model_card import document_stream, load_demo, render_card
from llmopt.demo.paths import demo_model_path
from llmopt.demo.perplexity import perplexity, stream_losses
from llmopt.demo.text_drift import text_drift

FOLDER = demo_model_path()
RECORD = json.loads((FOLDER.parent / "training.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def demo() -> tuple:
    return load_demo(FOLDER)


def test_small_enough_to_commit_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(sizes.values()) <= 10 * 1024 * 1024
    assert sizes.keys() == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_config() -> None:
    config = AutoConfig.from_pretrained(FOLDER)
    assert config.model_type == "llama"
    assert config.dtype == torch.bfloat16
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == 2048
    assert config.num_key_value_heads < config.num_attention_heads


def test_tokenizer_has_no_pad_token_and_is_the_file(demo: tuple) -> None:
    tokenizer = demo[1]
    assert tokenizer.pad_token is None
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    text = builtin_documents("evaluation")[0].text + " \n\tÆ 漢字 <|endoftext|>"
    raw = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert tokenizer(text)["input_ids"] == raw.encode(text).ids
    assert tokenizer.decode(raw.encode(text).ids) == text


def test_chat_template(demo: tuple) -> None:
    chat = [{"role": "user", "content": "What is a list?"}]
    text = demo[1].apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "user:\nWhat is a list?\n\nassistant:\n"


def test_splits_are_large_enough_in_its_tokens(demo: tuple) -> None:
    tokenizer = demo[1]
    assert len(document_stream(tokenizer, builtin_documents("calibration"))) >= 66_000
    assert len(document_stream(tokenizer, builtin_documents("evaluation"))) >= 80_000


def test_perplexity_is_as_written_down(demo: tuple) -> None:
    model, tokenizer = demo
    documents = sorted(builtin_documents("evaluation"), key=lambda document: document.sha256)
    stream = document_stream(tokenizer, documents)[: 16 * 512]
    measured = perplexity(stream_losses(model, stream, 512))
    recorded = RECORD["held_out"]["perplexity"]
    assert measured < model.config.vocab_size / 40
    # A tenth of the split, and another Python's documents, differ from the whole by this much.
    assert abs(math.log(measured / recorded)) < math.log(1.6)


def test_a_long_context_does_not_break_it() -> None:
    """The same tokens are predicted about as well after a long context as after a short one."""
    after_short, after_long = RECORD["held_out"]["last_tokens"].values()
    assert after_long < 1.05 * after_short


def test_generates_without_pad_token(demo: tuple) -> None:
    model, tokenizer = demo
    prompt = tokenizer("Return the number of", return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=8)
    assert output.shape[1] <= prompt["input_ids"].shape[1] + 8
    assert tokenizer.decode(output[0]).startswith("Return the number of")


def test_card_is_what_the_record_says() -> None:
    assert (FOLDER / "README.md").read_text("utf-8") == render_card(RECORD)


def test_most_of_the_recorded_text_is_here() -> None:
    for drift in text_drift():
        num_recorded = drift.num_same + drift.num_changed + drift.num_missing
        assert num_recorded > 50
        if drift.split != "train":
            assert drift.num_missing < num_recorded / 4
