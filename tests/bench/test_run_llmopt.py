"""llmopt's own runner: the benchmark's tokens and scheme, every phase timed."""

from __future__ import annotations

import pytest
import torch
from bench.conftest import Made

from llmopt.bench.runners.run_llmopt import PHASES, adapted, given_texts
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.formats.dequantized import DequantizedSource
from llmopt.recipe import load_recipe


def test_phases_cover_the_quantization(made: Made) -> None:
    phases = made.response["phases_s"]
    assert set(phases) == {phase for _, _, phase in PHASES} | {"rest"}
    assert all(seconds > 0 for seconds in phases.values())
    assert abs(sum(phases.values()) - made.response["quantize_s"]) < 0.01


def test_the_output_is_whole(made: Made) -> None:
    source = DequantizedSource(open_checkpoint(made.output))
    assert source.quantized_modules
    assert (made.output / "tokenizer.json").is_file()
    assert not made.output.with_name(".output.llmopt-staging").joinpath("artifact").exists()


def test_a_recipe_takes_the_benchmarks_scheme_and_size() -> None:
    request = {"bits": 4, "group_size": 64, "symmetric": False, "token_ids": [[1] * 40] * 3}
    recipe = adapted(load_recipe("int4-gptq"), request)
    scheme = recipe.quantize.scheme
    assert (scheme.bits, scheme.group_size, scheme.symmetric) == (4, 64, False)
    assert scheme.activation_order == load_recipe("int4-gptq").quantize.scheme.activation_order
    assert (recipe.calibration.num_samples, recipe.calibration.sequence_length) == (3, 40)


@pytest.mark.parametrize(
    ("recipe", "calibrates"), [("int4-rtn", False), ("int4-gptq", True), ("int4-awq", True)]
)
def test_what_goes_by_text_gets_the_benchmarks_tokens(recipe: str, calibrates: bool) -> None:
    tokens = torch.arange(6).view(2, 3)
    calibration = given_texts(load_recipe(recipe), tokens).calibration
    assert (calibration is not None) == calibrates
    assert calibration is None or torch.equal(calibration.blocks, tokens)
