"""The attention's name in a model's config: there while a forward of ours runs, and not after."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.tiny_models import CONFIGS, build_model
from torch import Tensor

from llmopt.decoding.attention.hook import NAME, Call, attending, configs_of
from llmopt.errors import BadInputError


def answer(call: Call) -> Tensor:
    """Nobody asks."""
    raise AssertionError(call)


def configs() -> list[Any]:
    """Of a model and of its text model."""
    return [
        SimpleNamespace(_attn_implementation_internal="sdpa"),
        SimpleNamespace(_attn_implementation_internal="eager"),
    ]


def names(given: list[Any]) -> list[str]:
    return [config._attn_implementation_internal for config in given]


def test_the_name_is_there_inside_only() -> None:
    given = configs()
    with attending(given, answer):
        assert names(given) == [NAME, NAME]
    assert names(given) == ["sdpa", "eager"]


def test_the_name_goes_when_a_forward_breaks() -> None:
    given = configs()
    with pytest.raises(RuntimeError, match="broken"), attending(given, answer):
        raise RuntimeError("broken")
    assert names(given) == ["sdpa", "eager"]


@pytest.mark.parametrize("first_out", [0, 1])
def test_it_stays_until_the_last_thread_leaves(first_out: int) -> None:
    given = configs()
    inside = threading.Barrier(3, timeout=30)
    leave = [threading.Event(), threading.Event()]

    def run(index: int) -> None:
        with attending(given, answer):
            inside.wait()
            leave[index].wait(30)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    inside.wait()
    leave[first_out].set()
    threads[first_out].join(30)
    assert names(given) == [NAME, NAME]
    leave[1 - first_out].set()
    threads[1 - first_out].join(30)
    assert names(given) == ["sdpa", "eager"]


def test_who_calls_the_model_meanwhile_is_told_what_to_do() -> None:
    model = build_model(CONFIGS["llama"]())
    caught: list[BaseException] = []

    def call() -> None:
        try:
            model(torch.tensor([[3, 4]]))
        except Exception as error:
            caught.append(error)

    with attending(configs_of(model), answer):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(30)
    assert [type(error) for error in caught] == [BadInputError]
    assert "another thread" in str(caught[0]) and "copy.deepcopy" in str(caught[0])
