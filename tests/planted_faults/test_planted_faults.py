"""Planted faults are refused and sound outputs pass; docs/gate.md has the figures of them all.

The gate is the real one with its default criteria. For the time it takes, less is read: of the
evaluation text 40 units of 128 tokens for faults and 256 tokens of every unit for sound outputs,
with 100 and 300 cloze items at the first look instead of 2,000, and shorter ones; and the artifacts
are calibrated on 32 samples. ``make test`` plants a few faults, ``make planted`` all of them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from planted_faults.bases import Bases
from planted_faults.bench import kl_rise, shorten
from planted_faults.catalogue import FAULTS
from planted_faults.faults import Fault, plant
from planted_faults.laboratory import Laboratory

from llmopt.calibration.tokenizer import load_tokenizer
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.comparison import compare
from llmopt.demo.paths import demo_model_path
from llmopt.errors import BadInputError
from llmopt.evaluation import judge
from llmopt.recipe import GateSection
from llmopt.texts import prepare_evaluation
from llmopt_evals.cloze import ClozeOptions
from llmopt_evals.units import HeldOutText

LONG = partial(pytest.param, marks=pytest.mark.planted)
QUICK = ("swapped nibbles, one up_proj", "zero point + 1, one v_proj", "one block at two bits")

NUM_SAMPLES = 32
FEW_ITEMS = GateSection(cloze=ClozeOptions(num_items=100, context_tokens=12, continuation_tokens=4))
MORE_ITEMS = GateSection(
    cloze=ClozeOptions(num_items=300, context_tokens=12, continuation_tokens=4)
)


@pytest.fixture(scope="module")
def text() -> HeldOutText:
    tokenizer = load_tokenizer(demo_model_path()).tokenizer
    return prepare_evaluation(["builtin"], tokenizer).text


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, text: HeldOutText) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"), text, NUM_SAMPLES)


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory, bases: Bases, text: HeldOutText) -> Laboratory:
    scratch = tmp_path_factory.mktemp("little")
    return Laboratory(bases, shorten(text, 40, 128), FEW_ITEMS, scratch)


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory, bases: Bases, text: HeldOutText) -> Laboratory:
    scratch = tmp_path_factory.mktemp("more")
    return Laboratory(bases, shorten(text, len(text.units), 256), MORE_ITEMS, scratch)


@pytest.mark.parametrize("name", ["int4-gptq", LONG("int3-gptq"), LONG("int8-rtn")])
def test_a_sound_output_passes(more: Laboratory, name: str) -> None:
    verdict = more.sound(name).verdict
    assert verdict.outcome == "pass", verdict.criteria


@pytest.mark.parametrize(
    "fault",
    [fault if fault.name in QUICK else LONG(fault) for fault in FAULTS],
    ids=lambda fault: fault.name,
)
def test_a_planted_fault_is_noticed(little: Laboratory, tmp_path: Path, fault: Fault) -> None:
    sound = little.bases.artifact(fault.base)
    faulty = plant(fault, sound, tmp_path / "faulty")
    if fault.verdict == "not opened":
        with pytest.raises(BadInputError, match=r"lacks 1 of the \d+ tensors .*v_proj\.bias"):
            little.judge(faulty, fault.base)
        return
    calibrated = faulty if fault.stage == "solving" else sound
    caught = little.bench(fault.base).round_trip_catches(faulty, calibrated)
    assert caught == (fault.stage != "solving")
    judged = little.judge(faulty, fault.base)
    assert kl_rise(judged, little.sound(fault.base)).low > 0
    if fault.verdict == "fail":
        assert judged.verdict.outcome == "fail", judged.verdict.criteria


@pytest.mark.planted
def test_sharing_scores_does_not_change_the_verdict(little: Laboratory, tmp_path: Path) -> None:
    comparison = compare(
        open_checkpoint(little.bases.artifact("int8-rtn")), open_checkpoint(demo_model_path())
    )
    ours = little.sound("int8-rtn").verdict
    assert judge(comparison, little.text, FEW_ITEMS, tmp_path) == ours
