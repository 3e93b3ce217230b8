"""Everything a run found out, gathered into one report."""

from __future__ import annotations

import datetime
import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import JsonValue, TypeAdapter

import llmopt
from llmopt.calibration.overlap import MAX_OVERLAPPING_DOCUMENTS
from llmopt.checkpoint.companions import Companions
from llmopt.checkpoint.journal import BlockEntry
from llmopt.checkpoint.ledger import Ledger
from llmopt.errors import BrokenArtifactError, RoundTripError
from llmopt.report.card import write_card
from llmopt.report.failure import Failure
from llmopt.report.html import write_html
from llmopt.report.json_file import write_json
from llmopt.report.schema import (
    CacheScaleRecord,
    Calibration,
    CompanionFiles,
    Coverage,
    DeclinedFold,
    Evaluation,
    ExpertTokens,
    LayerRecord,
    LedgerRecord,
    RecipeRecord,
    Record,
    Report,
    RoundTrip,
    ScaleRecord,
    Source,
)

if TYPE_CHECKING:
    from llmopt.checkpoint.artifact import Artifact
    from llmopt.job import Job
    from llmopt_evals.verdict import Verdict


_Record = TypeVar("_Record", bound=Record)


@dataclass(frozen=True, slots=True)
class BlockRecords:
    """What the journal keeps for the report.

    Attributes:
        layers: one record a quantized layer.
        scales: one a fold of the awq stage.
        declined: layers that no scale could be folded into.
        cache_scales: one a block whose fp8 cache has scales.
    """

    layers: tuple[LayerRecord, ...]
    scales: tuple[ScaleRecord, ...] = ()
    declined: tuple[DeclinedFold, ...] = ()
    cache_scales: tuple[CacheScaleRecord, ...] = ()


def read_records(entries: Sequence[BlockEntry]) -> BlockRecords:
    """The records of all parts that the journal has."""
    return BlockRecords(
        tuple(_read(LayerRecord, entries, "layers")),
        tuple(_read(ScaleRecord, entries, "scales")),
        tuple(_read(DeclinedFold, entries, "declined")),
        tuple(_read(CacheScaleRecord, entries, "cache_scales")),
    )


def _read(record: type[_Record], entries: Sequence[BlockEntry], key: str) -> Iterator[_Record]:
    for entry in entries:
        for data in TypeAdapter(list[JsonValue]).validate_python(entry.payload.get(key, [])):
            yield record.model_validate(data)


def assemble_report(
    job: Job,
    artifact: Artifact,
    records: BlockRecords,
    ledger: Ledger,
    companions: Companions,
    round_trip: RoundTrip,
    verdict: Verdict,
    timings: Mapping[str, float],
) -> Report:
    """The report of a finished run.

    Args:
        job: what was known before the first block.
        artifact: staged, complete but for the report.
        records: of the quantized layers, and of the scales folded before.
        ledger: of all source tensors.
        companions: files carried and left out.
        round_trip: what reading back found.
        verdict: the gate's.
        timings: seconds by stage.
    """
    return Report(
        llmopt_version=llmopt.__version__,
        created=_now(),
        name=artifact.output.name,
        format=job.recipe.output.format,
        source=_source(job, companions),
        recipe=_recipe(job),
        consumers=job.target.contract.consumers,
        contract=job.target.contract.checks,
        calibration=_calibration(job),
        evaluation=_evaluation(job),
        environment=job.environment,
        layers=records.layers,
        scales=records.scales,
        cache_scales=records.cache_scales,
        ledger=LedgerRecord(totals=ledger.summary(), entries=ledger.entries),
        companions=CompanionFiles(carried=companions.copied, left_out=companions.left_out),
        round_trip=round_trip,
        sizes=job.target.sizes(artifact, ledger),
        coverage=_coverage(records, _expert_layers(job)),
        verdict=verdict,
        margins_for_bits=job.target.bits,
        timings=dict(timings),
        files=job.target.files(artifact),
        gguf=job.target.describe(artifact),
    )


def assemble_failure(
    job: Job,
    artifact: Artifact,
    layers: Sequence[LayerRecord],
    companions: Companions,
    error: RoundTripError | BrokenArtifactError,
    timings: Mapping[str, float],
) -> Failure:
    """The report of a run whose artifact broke before it had a verdict; arguments as above."""
    return Failure(
        llmopt_version=llmopt.__version__,
        created=_now(),
        name=artifact.output.name,
        stage="round trip" if isinstance(error, RoundTripError) else "gate",
        what=error.what,
        remedy=error.remedy,
        source=_source(job, companions),
        recipe=_recipe(job),
        environment=job.environment,
        layers=tuple(layers),
        timings=dict(timings),
        files=job.target.files(artifact),
    )


def write_report(directory: Path, report: Report) -> None:
    """Write the report as JSON, as a model card and as a page.

    Raises:
        StorageError: if the disk refuses.
    """
    write_json(report, directory)
    write_card(report, directory)
    write_html(report, directory)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _recipe(job: Job) -> RecipeRecord:
    return RecipeRecord(
        name=job.recipe.name,
        sha256=job.recipe.sha256(),
        data=job.recipe.model_dump(mode="json"),
    )


def _source(job: Job, companions: Companions) -> Source:
    reader = job.reader
    infos = [reader.info(name) for name in reader.names]
    dtypes = Counter[str]()
    for info in infos:
        dtypes[str(info.dtype).removeprefix("torch.")] += info.num_bytes
    card = next((c.file for c in companions.copied if c.source_file == "README.md"), None)
    return Source(
        name=reader.path.resolve().name,
        sha256=job.source_sha256,
        num_bytes=sum(info.num_bytes for info in infos),
        num_parameters=sum(info.num_parameters for info in infos),
        architecture=type(job.structure.skeleton).__name__,
        dtype=dtypes.most_common(1)[0][0],
        card=card,
    )


def _calibration(job: Job) -> Calibration | None:
    calibration = job.texts.calibration
    if calibration is None:
        return None
    coverage = calibration.coverage
    notes = [] if coverage.has_pad_token else ["the tokenizer has no pad token; none is needed"]
    if job.tokenizer.disagreement:
        notes.append(job.tokenizer.disagreement)
    samples, length = calibration.blocks.shape
    return Calibration(
        source=job.recipe.calibration.source,
        sha256=job.texts.calibration_sha256,
        num_documents=coverage.documents_used,
        num_tokens=int(calibration.blocks.numel()),
        num_samples=int(samples),
        sequence_length=int(length),
        num_truncated_documents=coverage.documents_truncated,
        num_dropped_tokens=coverage.tokens_dropped,
        num_duplicated_bos_removed=coverage.duplicated_bos_removed,
        notes=tuple(notes),
    )


def _evaluation(job: Job) -> Evaluation:
    evaluation = job.texts.evaluation
    dropped = evaluation.overlapping
    notes = evaluation.notes
    if dropped:
        limit = f"{MAX_OVERLAPPING_DOCUMENTS:.0%}"
        notes += (f"dropped because calibration saw them ({limit} allowed): {', '.join(dropped)}",)
    return Evaluation(
        sources=evaluation.sources,
        sha256=evaluation.sha256,
        num_units=len(evaluation.text.units),
        num_tokens=sum(unit.num_predictions for unit in evaluation.text.units),
        num_overlapping_dropped=len(dropped),
        num_left_out=evaluation.num_left_out,
        notes=notes,
    )


def _coverage(records: BlockRecords, in_experts: Collection[str]) -> Coverage:
    layers = records.layers
    # What a GGUF file holds outside the blocks is rounded without text, or with the head's inputs.
    tokens = [layer.num_tokens for layer in layers if layer.block is not None]
    reasons: dict[str, dict[str, None]] = {}
    for fold in records.declined:
        reasons.setdefault(fold.producer, {})[fold.reason] = None
    return Coverage(
        num_singular_hessians=sum(layer.num_damping_escalations > 0 for layer in layers),
        num_dead_columns=sum(layer.num_dead_columns for layer in layers),
        min_tokens_per_layer=min(tokens) if any(tokens) else None,
        expert_tokens=_expert_tokens(layers, in_experts) if any(tokens) else None,
        num_folds=sum(scale.alpha > 0 for scale in records.scales),
        declined_folds={producer: "; ".join(found) for producer, found in reasons.items()},
    )


def _expert_layers(job: Job) -> set[str]:
    structure = job.structure
    names = (
        f"{structure.block_prefix(block)}.{linear}"
        for block in range(structure.num_blocks)
        for linear in structure.linear_names(block)
    )
    return {structure.disk_module(name) for name in names if structure.is_in_expert(name)}


def _expert_tokens(
    layers: Sequence[LayerRecord], in_experts: Collection[str]
) -> ExpertTokens | None:
    # All layers of an expert see the same tokens.
    tokens = {
        layer.name.rpartition(".")[0]: layer.num_tokens
        for layer in layers
        if layer.name in in_experts
    }
    if not tokens:
        return None
    return ExpertTokens(
        num_experts=len(tokens),
        fewest=min(tokens.values()),
        median=statistics.median(tokens.values()),
        most=max(tokens.values()),
    )
