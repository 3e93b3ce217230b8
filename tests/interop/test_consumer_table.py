"""Each consumer takes what ``llmopt/formats/consumers.yaml`` says it takes, and refuses the rest.

Every case below is written as a tiny checkpoint and handed to every consumer of its format. Where
the table sees no obstacle the consumer must open it and compute what we say it means. Where the
table refuses it, so must the consumer, in the words that the table quotes; where it quotes none,
the consumer may open it but then must compute something else, which is why the table refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

import pytest
import torch
from interop.agreement import mean_difference
from interop.protocol import DOORS, Answer, Consumer, Job, Refusal
from interop.reference import reference
from interop.tiny_checkpoint import (
    PROMPTS,
    linear_modules,
    write_dense,
    write_quantized,
    write_rounded,
)

from llmopt.formats import choose_format
from llmopt.formats.consumers import FormatSupport, load_consumers
from llmopt.quantization.scheme import Scheme

pytestmark = pytest.mark.interop

NUM_TOKENS = 8
IN_FEATURES, FUSED_OUT_FEATURES = 256, 512
FLOORS_APART = 5
ODD_LAYER = "model.layers.1.mlp.down_proj"
# What rounds a weight to the element type of its scales before it multiplies.
ROUNDING = {"transformers-dequantize"}


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint to open: its variant of the format, and the scheme of its layers.

    Attributes:
        scheme: of every linear layer in the blocks.
        checkpoint_format: of GPTQ.
        dtype: that the consumer computes in.
        odd_layer: the scheme of ``ODD_LAYER`` if it differs from the others'.
    """

    scheme: Scheme
    checkpoint_format: str | None = None
    dtype: torch.dtype = torch.float16
    odd_layer: Scheme | Literal["kept"] | None = None

    @property
    def label(self) -> str:
        """A folder's name."""
        odd = self.odd_layer
        parts = [self.checkpoint_format, in_words(self.scheme)]
        parts += ["but", in_words(odd) if isinstance(odd, Scheme) else odd] if odd else []
        return "-".join(part for part in parts if part)

    def schemes(self, modules: Iterable[str]) -> dict[str, Scheme | None]:
        """Of each linear layer; ``None`` is 16 bit."""
        schemes: dict[str, Scheme | None] = dict.fromkeys(modules, self.scheme)
        if self.odd_layer is not None:
            schemes[ODD_LAYER] = None if self.odd_layer == "kept" else self.odd_layer
        return schemes


def in_words(scheme: Scheme) -> str:
    sign = "sym" if scheme.symmetric else "asym"
    size = scheme.group_size or "channel"
    return f"{scheme.bits}-{size}-{sign}-{scheme.activation_order}"


FOUR_BITS = [
    Scheme(4, 128, True),
    Scheme(4, 64, True),
    Scheme(4, 32, True),
    Scheme(4, None, True),
    Scheme(4, 128, False),
    Scheme(4, 64, False),
    Scheme(4, 32, False),
    Scheme(4, None, False),
]
OTHER_BITS = [
    Scheme(8, 32, True),
    Scheme(8, None, True),
    Scheme(8, 32, False),
    Scheme(3, 32, True),
    Scheme(3, 32, False),
    Scheme(2, 32, True),
    Scheme(2, 32, False),
]
BY_ORDER = [Scheme(4, 128, True, "group"), Scheme(4, 32, False, "group")]
CASES = {
    "compressed-tensors": [
        *map(Case, [*FOUR_BITS, *OTHER_BITS, Scheme(4, 64, True, "weight"), BY_ORDER[0]]),
        Case(Scheme(4, 128, True), odd_layer="kept"),
        Case(Scheme(4, 128, True), odd_layer=Scheme(4, 32, True)),
    ],
    "gptq": [
        *map(Case, [*FOUR_BITS, *OTHER_BITS, *BY_ORDER]),
        Case(Scheme(4, 64, True), "gptq_v2"),
        *(Case(scheme, "gptq_v2") for scheme in [*FOUR_BITS, *OTHER_BITS] if not scheme.symmetric),
        Case(Scheme(4, 128, True), dtype=torch.bfloat16),
        Case(Scheme(4, 32, False), dtype=torch.bfloat16),
        Case(Scheme(8, 32, False), dtype=torch.float32),
        Case(Scheme(4, 128, True), odd_layer="kept"),
        Case(Scheme(4, 128, True), odd_layer=Scheme(4, 32, True)),
    ],
    "awq": [
        *map(Case, FOUR_BITS),
        Case(Scheme(4, 128, True), dtype=torch.bfloat16),
        Case(Scheme(4, 32, False), dtype=torch.bfloat16),
        Case(Scheme(4, 32, False), dtype=torch.float32),
        Case(Scheme(4, 128, False), odd_layer="kept"),
    ],
}


class Checkpoints:
    """Tiny checkpoints, each written once, when it is asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @cached_property
    def dense(self) -> Path:
        """The model that was rounded."""
        return write_dense(self._root / "dense")

    def quantized(self, form: str, case: Case) -> Path:
        """The packed model."""
        folder = self._root / form / case.label
        if not folder.exists():
            chosen = choose_format(form, case.checkpoint_format)
            write_quantized(self.dense, chosen, case.schemes(linear_modules(self.dense)), folder)
        return folder

    def meaning(self, case: Case, *, rounds: bool) -> Path:
        """What the packed model means."""
        folder = self._root / f"meaning-{rounds}" / case.label
        if not folder.exists():
            schemes = case.schemes(linear_modules(self.dense))
            write_rounded(self.dense, schemes, folder, round_to_scale_dtype=rounds)
        return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("table"))


@pytest.mark.parametrize("consumer", DOORS, indirect=True, ids="-".join)
def test_the_consumer_does_what_the_table_says(
    consumer: Consumer, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    cases = CASES[consumer.form]
    dtypes = dict.fromkeys(case.dtype for case in cases)
    jobs = [job(checkpoints.dense, dtype) for dtype in dtypes]
    jobs += [job(checkpoints.quantized(consumer.form, case), case.dtype) for case in cases]
    answers = consumer.ask(jobs, tmp_path)
    before = told(checkpoints.dense)
    floors = {
        dtype: mean_difference(plain, before) + 1e-5  # of what is exact, the rounding of a sum
        for dtype, plain in zip(dtypes, answers, strict=False)
        if isinstance(plain, Answer)
    }
    assert floors.keys() == dtypes.keys(), answers[: len(dtypes)]

    rounds = consumer.name in ROUNDING
    faults = []
    for case, answer in zip(cases, answers[len(dtypes) :], strict=True):
        expected = told(checkpoints.meaning(case, rounds=rounds))
        variant = choose_format(consumer.form, case.checkpoint_format).checkpoint_format
        support = load_consumers()[consumer.name].formats[consumer.form]
        reasons = refusals(support, case, variant)
        floor = floors[case.dtype]
        if reasons:
            fault = refusal_fault(answer, expected, floor, reasons)
        else:
            fault = agreement_fault(answer, expected, before, floor)
        if fault:
            faults.append(f"{case.label} in {case.dtype}: {fault}")
    assert not faults, "\n".join(faults)


def refusals(support: FormatSupport, case: Case, variant: str | None) -> list[str]:
    """Why the table says that a case is refused; empty if it is not."""
    odd = {case.odd_layer} if isinstance(case.odd_layer, Scheme) else set()
    schemes = {case.scheme} | odd
    of_all = [
        support.checkpoint_format_refusal(variant, schemes),
        support.mixture_refusal(schemes),
        support.kept_refusal([ODD_LAYER] if case.odd_layer == "kept" else []),
    ]
    of_one = [
        reason
        for scheme in schemes
        for reason in support.refusals(scheme, IN_FEATURES, FUSED_OUT_FEATURES, 1, case.dtype)
    ]
    return [*of_one, *filter(None, of_all)]


def refusal_fault(
    answer: Answer | Refusal, expected: Answer, floor: float, reasons: list[str]
) -> str | None:
    """What is wrong with how a consumer met what the table says it refuses."""
    quoted = [squeeze(words) for reason in reasons for words in re.findall(r'"([^"]+)"', reason)]
    if isinstance(answer, Refusal):
        if any(words in squeeze(answer.error) for words in quoted):
            return None
        return f"it was refused with {answer.error!r}, where the table quotes {quoted}"
    if quoted or mean_difference(answer, expected) < FLOORS_APART * floor:
        return f"it was opened, though the table refuses it: {reasons}"
    return None


def agreement_fault(
    answer: Answer | Refusal, expected: Answer, before: Answer, floor: float
) -> str | None:
    """What is wrong with how a consumer met what the table says it takes."""
    if isinstance(answer, Refusal):
        return f"it was refused, though the table takes it: {answer.error}"
    own, apart = mean_difference(answer, expected), mean_difference(answer, before)
    if own > 2 * floor or apart < FLOORS_APART * floor:
        return f"floor {floor:.5f}, own {own:.5f}, apart {apart:.5f} nats"
    return None


@pytest.mark.parametrize("consumer", DOORS, indirect=True, ids="-".join)
def test_the_table_speaks_of_the_versions_that_are_run(consumer: Consumer) -> None:
    said = load_consumers()[consumer.name].formats[consumer.form].versions
    assert said == installed_versions(consumer.python, said)


@pytest.mark.parametrize(("name", "form"), DOORS, ids="-".join)
def test_every_row_that_claims_a_proof_has_one_here(name: str, form: str) -> None:
    tried = {
        (case.scheme.bits, case.scheme.symmetric, case.scheme.group_size or "channel")
        for case in CASES[form]
    }
    claimed = {
        (bits, row.symmetric, size)
        for row in load_consumers()[name].formats[form].accepts
        if row.proven
        for bits in row.bits
        for size in ((32,) if row.group_sizes == "any" else row.group_sizes)
    }
    assert claimed <= tried


def installed_versions(python: Path, packages: Mapping[str, str]) -> dict[str, str]:
    """Versions of ``packages`` in an environment, by the names asked for."""
    (site_packages,) = python.parent.parent.glob("lib/python*/site-packages")
    found = distributions(path=[str(site_packages)])
    installed = {canonical(d.metadata["Name"]): d.version for d in found}
    return {package: installed[canonical(package)] for package in packages}


def canonical(package: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", package).lower()


def squeeze(words: str) -> str:
    """Words as they compare: no difference in white space or quotation marks."""
    return re.sub(r"[\s`'\"]+", " ", words).strip()


def job(directory: Path, dtype: torch.dtype) -> Job:
    return Job(str(directory), str(dtype).removeprefix("torch."), PROMPTS, NUM_TOKENS)


def told(directory: Path) -> Answer:
    """Transformers in float32, in this process."""
    return reference(directory, PROMPTS, NUM_TOKENS)
