"""What is refused, with the numbers and the remedy, and that nothing stays behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.engines import random_prompts, tiny_engine, tiny_model, tiny_tokenizer
from torch import Tensor, nn

from llmopt.decoding import Engine
from llmopt.errors import BadInputError, NumericalError


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine(max_context=64)


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([5] * 64, {}, ["64 tokens of prompt", "context of 64"]),
        ([5] * 300, {}, ["300 tokens of prompt", "context of 64"]),
        ([5] * 60, {"max_new_tokens": 5}, ["60 tokens", "5 new ones", "65", "fewer new tokens"]),
        ("", {}, ["the prompt is empty", "beginning-of-sequence"]),
        ([], {}, ["no prompt"]),
        ([[5], []], {}, ["prompt 1 is empty"]),
        (["kato", ""], {}, ["prompt 1 is empty"]),
        ([5, 512], {}, ["token 512", "place 1", "0 to 511"]),
        ([5, -1], {}, ["token -1"]),
        ([5, 1.5], {}, ["1.5"]),
        (["kato", 1], {}, ["prompt 1 is 1,", "list of token ids"]),
        ([[5], None], {}, ["prompt 1 is None", "list of token ids"]),
        (None, {}, ["prompts is None", "list of token ids"]),
        (7, {}, ["prompts is 7", "list of token ids"]),
        (torch.tensor(7), {}, ["prompts is 7", "list of token ids"]),
        ([5], {"max_token": 5}, ["max_token", "max_new_tokens"]),
        ([5], {"top_p": 0.5}, ["top_p", "temperature"]),
        ([5], {"n": 99}, ["99 samples", "max_sequences"]),
        ([5], {"max_new_tokens": 0}, ["max_new_tokens"]),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(
    engine: Engine, prompt: Any, options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(BadInputError) as caught:
        engine.generate(prompt, **options)
    for word in words:
        assert word in str(caught.value)
    assert not engine.has_work and engine.num_free_pages == {"full": 64}


def test_one_bad_prompt_refuses_the_whole_list_before_any_is_answered(engine: Engine) -> None:
    with pytest.raises(BadInputError, match="prompt 1: 300 tokens of prompt"):
        engine.generate([[5], [5] * 300, [6]])
    with pytest.raises(BadInputError, match="the prompt: 300 tokens of prompt"):
        engine.submit([5] * 300)
    assert not engine.has_work
    with pytest.raises(BadInputError, match="unknown option"):
        engine.submit([5], maxnew=3)
    assert not engine.has_work and engine.step() == []


@pytest.mark.parametrize("prompt", [None, 7])
def test_one_prompt_alone_is_text_or_ids(engine: Engine, prompt: Any) -> None:
    with pytest.raises(BadInputError, match=f"the prompt is {prompt},"):
        engine.submit(prompt)
    assert not engine.has_work


def test_a_pool_too_small_for_one_request_is_told_at_once() -> None:
    engine = tiny_engine(num_pages=2)  # 32 tokens
    with pytest.raises(BadInputError) as caught:
        engine.generate([5] * 20, max_new_tokens=20)
    assert "39 tokens to cache" in caught.value.what and "num_pages" in caught.value.remedy
    assert len(engine.generate([5] * 20, max_new_tokens=13)[0].token_ids) == 13
    with pytest.raises(BadInputError, match="less than one page"):
        tiny_engine(num_pages=None, kv_memory_bytes=100)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"kv_cache": "int-4"}, "int4"),
        ({"max_context": 257}, "256"),
        ({"max_context": 0}, "max_context"),
        ({"num_pages": 4, "kv_memory_bytes": 10**6}, "one of them"),
        ({"max_sequences": 0}, "max_sequences"),
        ({"max_tokens_per_step": 3}, "max_tokens_per_step"),
        ({"dtype": torch.bfloat16}, "model.to"),
        ({"device": "cpu"}, "model.to"),
    ],
)
def test_limits_that_do_not_fit_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(BadInputError, match=word):
        Engine(tiny_model(), **options)


def test_without_a_tokenizer_texts_are_refused_and_tokens_answered() -> None:
    engine = Engine(tiny_model(), num_pages=4)
    for options in ({"prompts": "kato"}, {"prompts": [5], "stop": "a"}):
        with pytest.raises(BadInputError, match="no tokenizer"):
            engine.generate(**options)
    (answer,) = engine.generate([5], max_new_tokens=3)
    assert answer.text is None and answer.token_ids
    assert answer.finish_reason == "length" or answer.token_ids[-1] == 2


class Breaking(nn.Module):
    """A head that fails, or gives NaN, once it has been called so many times."""

    def __init__(self, head: nn.Module, calls: int, how: str) -> None:
        super().__init__()
        self.head, self.calls, self.how = head, calls, how

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls -= 1
        logits: Tensor = self.head(hidden)
        if self.calls >= 0:
            return logits
        if self.how == "raise":
            raise RuntimeError("out of memory")
        logits[..., -1, 3] = torch.nan
        return logits


@pytest.mark.parametrize(("how", "error"), [("raise", RuntimeError), ("nan", NumericalError)])
def test_a_step_that_fails_ends_every_request_and_gives_all_pages_back(
    how: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(max_sequences=4)
    model, prompts = tiny_model(), random_prompts(7)
    expected = engine.generate(prompts, max_new_tokens=6, ignore_eos=True)
    submitted = engine.submit([5, 6], max_new_tokens=50, ignore_eos=True)
    with monkeypatch.context() as patch:
        patch.setitem(model._modules, "lm_head", Breaking(model.lm_head, 4, how))
        with pytest.raises(error):
            engine.generate(prompts, max_new_tokens=6, ignore_eos=True)
    assert not engine.has_work and engine.num_free_pages == {"full": 64}
    with pytest.raises(error):  # who submitted learns of it, once
        engine.step()
    assert not engine.cancel(submitted)
    again = engine.generate(prompts, max_new_tokens=6, ignore_eos=True)
    assert [a.token_ids for a in again] == [a.token_ids for a in expected]


def test_what_a_failed_step_left_in_the_cache_is_not_reused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = tiny_engine()
    (expected,) = tiny_engine().generate([7] * 40, max_new_tokens=4, ignore_eos=True)
    values = tiny_model().model.layers[0].self_attn.v_proj
    with monkeypatch.context() as patch:
        patch.setattr(values, "forward", lambda hidden: hidden[..., :16] * torch.nan)
        with pytest.raises(NumericalError):
            engine.generate([7] * 40, max_new_tokens=4)
    (answer,) = engine.generate([7] * 40, max_new_tokens=4, ignore_eos=True)
    assert answer.token_ids == expected.token_ids


def test_the_tokenizer_may_be_a_directory_and_must_be_there(tmp_path: Any) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    engine = Engine(tiny_model(), tokenizer=tmp_path, num_pages=4)
    assert engine.generate("kato", max_new_tokens=2)[0].text is not None
    with pytest.raises(BadInputError, match="no tokenizer"):
        Engine(tiny_model(), tokenizer=tmp_path / "nowhere", num_pages=4)
