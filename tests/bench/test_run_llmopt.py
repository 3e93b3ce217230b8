"""llmopt's own runner: the benchmark's tokens and scheme, every phase timed."""

from __future__ import annotations

import pytest
import torch
from bench.conftest import Made

from llmopt.bench.runners.run_llmopt import PHASES, given_texts, sized
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.formats.dequantized import DequantizedSource
from llmopt.recipe import load_recipe


def test_phases_cover_the_quantization(made: Made) -> None:
    phases = made.response["phases_s"]
    told = {"calibration forwards", "Hessians", "solve", "pack and write", "rest"}
    assert set(phases) - told <= {phase for _, _, phase in PHASES}
    assert told <= set(phases)
    assert all(seconds > 0 for seconds in phases.values())
    assert abs(sum(phases.values()) - made.response["quantize_s"]) < 0.01


def test_nothing_is_timed_twice() -> None:
    places = [(id(owner), attribute) for owner, attribute, _ in PHASES]
    assert len(set(places)) == len(places)


def test_the_output_is_whole(made: Made) -> None:
    source = DequantizedSource(open_checkpoint(made.output))
    assert source.quantized_modules
    assert (made.output / "tokenizer.json").is_file()
    assert not made.output.with_name(".output.llmopt-staging").joinpath("artifact").exists()


def test_a_recipe_takes_the_benchmarks_size_and_keeps_the_rest() -> None:
    recipe = load_recipe("int4-awq")
    changed = sized(recipe, [[1] * 40] * 3)
    assert changed.stages == recipe.stages
    assert (changed.calibration.num_samples, changed.calibration.sequence_length) == (3, 40)


@pytest.mark.parametrize(
    ("recipe", "calibrates"), [("int4-rtn", False), ("int4-gptq", True), ("int4-awq", True)]
)
def test_what_goes_by_text_gets_the_benchmarks_tokens(recipe: str, calibrates: bool) -> None:
    tokens = torch.arange(6).view(2, 3)
    calibration = given_texts(load_recipe(recipe), tokens).calibration
    assert (calibration is not None) == calibrates
    assert calibration is None or torch.equal(calibration.blocks, tokens)
