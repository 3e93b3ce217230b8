"""Made-up but plausible reports, from four blocks to eighty."""

from __future__ import annotations

import math
import random

import pytest

from llmopt.checkpoint.companions import CompanionRecord, LeftOut
from llmopt.checkpoint.ledger import Fate, FateTotal, LedgerEntry
from llmopt.report.schema import (
    Calibration,
    CompanionFiles,
    Consumer,
    ContractCheck,
    Coverage,
    Environment,
    Evaluation,
    FileHash,
    LayerRecord,
    LedgerRecord,
    RecipeRecord,
    Report,
    RoundTrip,
    SchemeRecord,
    Sizes,
    Source,
)
from llmopt_evals.criteria import default_criteria, judge, judge_all
from llmopt_evals.statistics import Interval
from llmopt_evals.verdict import (
    CriterionResult,
    Look,
    NoiseFloor,
    PlotData,
    PositionBucket,
    Summary,
    UnitPoint,
    Verdict,
)

LINEARS = (
    ("self_attn.q_proj", (256, 256)),
    ("self_attn.k_proj", (128, 256)),
    ("self_attn.v_proj", (128, 256)),
    ("self_attn.o_proj", (256, 256)),
    ("mlp.gate_proj", (688, 256)),
    ("mlp.up_proj", (688, 256)),
    ("mlp.down_proj", (256, 688)),
)
SCHEME = SchemeRecord(name="W4A16", bits=4, group_size=64, symmetric=True)


def sha(seed: int) -> str:
    return f"{random.Random(seed).getrandbits(256):064x}"


CRITERIA = {
    # name: margin and, for each outcome, estimate, low, high
    "perplexity_ratio": (1.08, (1.0213, 1.0189, 1.0241), (3.87, 3.71, 4.02), (1.069, 1.051, 1.087)),
    "mean_kl": (0.08, (0.01932, 0.0182, 0.0206), (1.42, 1.35, 1.51), (0.01932, 0.0182, 0.0206)),
    "p99_kl": (0.8, (0.2119, 0.195, 0.233), (6.9, 6.5, 7.3), (0.78, 0.71, 0.84)),
    "top1_agreement": (0.86, (0.9412, 0.9382, 0.944), (0.51, 0.505, 0.519), (0.93, 0.92, 0.94)),
    "cloze_accuracy_drop": (0.03, (0.004, -0.003, 0.0112), (0.03, 0.01, 0.06), (0.01, 0.0, 0.02)),
    "kl_above_baseline": (
        0.0,
        (-0.0123, -0.0141, -0.0108),
        (0.2, 0.1, 0.3),
        (-0.01, -0.02, -0.001),
    ),
}
OUTCOMES = ("pass", "fail", "inconclusive")


def sample_criteria(outcome: str) -> tuple[CriterionResult, ...]:
    results = []
    for name, (margin, *values) in CRITERIA.items():
        estimate, low, high = values[OUTCOMES.index(outcome)]
        better = "higher" if name == "top1_agreement" else "lower"
        results.append(
            CriterionResult(
                name=name,
                better=better,
                margin=margin,
                estimate=estimate,
                low=low,
                high=high,
                confidence=0.9533,
                outcome=judge(Interval(estimate, low, high, 0.1), margin, better),
                power=0.98 if outcome == "pass" else 0.31,
                units_for_power=None if outcome == "fail" else 240,
            )
        )
    return tuple(results)


def sample_plots(scale: float, num_units: int) -> PlotData:
    chance = random.Random(3)
    edges = [-12 + 0.2 * index for index in range(71)]
    centre = math.log10(0.002 * scale)
    return PlotData(
        kl_log10_edges=edges,
        kl_counts=[int(20000 * math.exp(-((edge - centre) ** 2) / 0.6)) for edge in edges[:-1]],
        kl_quantiles={"0.5": 0.002 * scale, "0.99": 0.2119 * scale, "1": 4.0 * scale},
        units=[
            UnitPoint(
                name=f"pydoc/{index}",
                num_tokens=700 + index,
                perplexity_ratio=math.exp(chance.gauss(0.02 * scale, 0.02)),
                mean_kl=0.019 * scale,
            )
            for index in range(num_units)
        ],
        positions=[
            PositionBucket(
                start=64 * index,
                stop=64 * index + 64,
                num_tokens=3000,
                mean_kl=0.019 * scale * (1 + 0.1 * chance.random()),
            )
            for index in range(16)
        ],
    )


def sample_verdict(outcome: str = "pass", num_units: int = 96) -> Verdict:
    criteria = sample_criteria(outcome)
    look = Look(
        num_units=num_units,
        num_tokens=73112,
        num_items=2400,
        alpha=0.0467,
        outcome=judge_all([item.outcome for item in criteria]),
        criteria=criteria,
    )
    assert look.outcome == outcome
    ratio, kl = criteria[0].estimate, criteria[1].estimate
    return Verdict(
        outcome=outcome,
        criteria=criteria,
        looks=(look, look),
        num_planned_looks=2,
        num_available_units=num_units,
        num_units=num_units,
        num_tokens=73112,
        num_items=2400,
        criteria_asked=default_criteria(4),
        summary=Summary(
            reference_perplexity=14.2031,
            candidate_perplexity=14.2031 * ratio,
            reference_cloze_accuracy=0.812,
            candidate_cloze_accuracy=0.812 - criteria[4].estimate,
            baseline_mean_kl=kl - criteria[5].estimate,
        ),
        noise_floor=NoiseFloor(mean_kl=3.1e-7, p99_kl=2.2e-6, num_tokens=4096),
        plots=sample_plots(30.0 if outcome == "fail" else 1.0, num_units),
        notes=("41 short sources were joined into units.",),
        seed=0,
    )


def sample_layers(num_blocks: int) -> tuple[LayerRecord, ...]:
    chance = random.Random(7)
    layers = []
    for block in range(num_blocks):
        for index, (kind, shape) in enumerate(LINEARS):
            plain = (
                0.004
                * (1 + 0.3 * index)
                * math.exp(chance.gauss(0, 0.2))
                * (1 + 1.5 * block / num_blocks)
            )
            layers.append(
                LayerRecord(
                    name=f"model.layers.{block}.{kind}",
                    block=block,
                    shape=shape,
                    scheme=SCHEME,
                    solver="gptq",
                    weight_error=plain * 1.1,
                    output_error=plain * chance.uniform(0.35, 0.75),
                    plain_output_error=plain,
                    damping=0.1 if (block, index) == (0, 6) else 0.01,
                    num_damping_escalations=1 if (block, index) == (0, 6) else 0,
                    num_dead_columns=3 if (block, index) == (0, 6) else 0,
                    num_tokens=65536,
                    input_max_abs=chance.uniform(2, 40),
                )
            )
    return tuple(layers)


def sample_report(num_blocks: int = 4, *, outcome: str = "pass", **changes) -> Report:
    verdict = sample_verdict(outcome)
    layers = sample_layers(num_blocks)
    linear_parameters = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    entries = [
        LedgerEntry(
            name=f"{layer.name}.weight",
            fate=Fate.QUANTIZED,
            reason="W4A16 g64 by gptq",
            num_bytes=2 * layer.shape[0] * layer.shape[1],
            num_parameters=layer.shape[0] * layer.shape[1],
        )
        for layer in layers
    ]
    entries += [
        LedgerEntry(
            name="model.embed_tokens.weight",
            fate=Fate.COPIED,
            reason="not a linear layer of a block",
            num_bytes=2 * 4096 * 256,
            num_parameters=4096 * 256,
        ),
        LedgerEntry(
            name="lm_head.weight",
            fate=Fate.TIED,
            reason="the same tensor as model.embed_tokens.weight",
            num_bytes=0,
            num_parameters=0,
        ),
    ]
    source_bytes = sum(entry.num_bytes for entry in entries)
    quantized_bytes = int(linear_parameters * 4.25 / 8)
    artifact_bytes = quantized_bytes + 2 * 4096 * 256
    values = dict(
        llmopt_version="0.1.0",
        created="2026-11-21T03:10:00Z",
        name="demo-int4",
        format="compressed-tensors (pack-quantized)",
        source=Source(
            name="llmopt-demo-4m",
            sha256=sha(1),
            num_bytes=source_bytes,
            num_parameters=linear_parameters + 4096 * 256,
            architecture="LlamaForCausalLM",
            dtype="bfloat16",
            license="apache-2.0",
        ),
        recipe=RecipeRecord(
            name="int4-gptq",
            sha256=sha(2),
            data={"name": "int4-gptq", "stages": [{"kind": "quantize", "solver": "gptq"}]},
        ),
        consumers=(
            Consumer(
                name="transformers",
                version=">= 5.0",
                checks=(
                    ContractCheck(name="element type", passed=True, detail="4 bit, symmetric"),
                    ContractCheck(
                        name="groups divide every input", passed=True, detail="64 divides 256, 688"
                    ),
                ),
            ),
            Consumer(
                name="vllm",
                version=">= 0.20, CPU and CUDA",
                checks=(
                    ContractCheck(
                        name="one scheme per fused group", passed=True, detail="q/k/v, gate/up"
                    ),
                    ContractCheck(
                        name="output features divide", passed=True, detail="after fusion"
                    ),
                ),
            ),
        ),
        contract=(ContractCheck(name="tokenizer and chat template present", passed=True),),
        calibration=Calibration(
            source="builtin",
            sha256=sha(3),
            num_documents=412,
            num_tokens=65536,
            num_samples=128,
            sequence_length=512,
            num_truncated_documents=17,
            num_dropped_tokens=1203,
            num_duplicated_bos_removed=0,
            notes=("The tokenizer has no pad token; none is needed, blocks are full.",),
        ),
        evaluation=Evaluation(
            sources=("builtin",),
            sha256=sha(4),
            num_units=96,
            num_tokens=73_112,
            num_overlapping_dropped=2,
        ),
        environment=Environment(
            python="3.11.9",
            llmopt="0.1.0",
            torch="2.13.0",
            transformers="5.19.0",
            device="cpu",
            num_threads=2,
            dtype="float32",
            platform="Linux x86_64",
        ),
        layers=layers,
        ledger=LedgerRecord(
            totals={
                Fate.QUANTIZED: FateTotal(
                    num_tensors=len(layers),
                    num_parameters=linear_parameters,
                    num_bytes=2 * linear_parameters,
                ),
                Fate.COPIED: FateTotal(
                    num_tensors=1, num_parameters=4096 * 256, num_bytes=2 * 4096 * 256
                ),
                Fate.TIED: FateTotal(num_tensors=1, num_parameters=0, num_bytes=0),
                Fate.DROPPED: FateTotal(num_tensors=0, num_parameters=0, num_bytes=0),
            },
            entries=tuple(entries),
        ),
        companions=CompanionFiles(
            carried=(
                CompanionRecord(
                    file="tokenizer.json",
                    source_file="tokenizer.json",
                    sha256=sha(5),
                    num_bytes=231_004,
                ),
                CompanionRecord(
                    file="generation_config.json",
                    source_file="generation_config.json",
                    sha256=sha(6),
                    num_bytes=132,
                ),
            ),
            left_out=(LeftOut(file="model.gguf", reason="weights in another format"),),
        ),
        round_trip=RoundTrip(num_tensors=len(layers), num_mismatches=0),
        sizes=Sizes(
            source_bytes=source_bytes,
            artifact_bytes=artifact_bytes,
            ratio=artifact_bytes / source_bytes,
            bits_per_weight=4.25,
        ),
        coverage=Coverage(num_dead_columns=3, num_singular_hessians=1, min_tokens_per_layer=65536),
        verdict=verdict,
        timings={
            "contract": 0.21,
            "calibrate and quantize": 21.4,
            "round trip": 0.8,
            "evaluate": 14.9,
        },
        files={
            "config.json": FileHash(sha256=sha(8), num_bytes=1422),
            "model.safetensors": FileHash(sha256=sha(9), num_bytes=artifact_bytes),
            "tokenizer.json": FileHash(sha256=sha(5), num_bytes=231_004),
        },
    )
    return Report(**{**values, **changes})


@pytest.fixture(scope="session")
def make_report():
    """``make_report(num_blocks=4, outcome="pass", **changed_fields) -> Report``."""
    return sample_report


@pytest.fixture(scope="session")
def make_verdict():
    """``make_verdict(outcome) -> Verdict``."""
    return sample_verdict
