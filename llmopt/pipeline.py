"""The road: source, recipe, contract, blocks, staged artifact, round trip, gate, publish."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import TypeAdapter

from llmopt.checkpoint.artifact import Artifact
from llmopt.checkpoint.companions import Companions, copy_companions
from llmopt.checkpoint.ledger import Ledger, LedgerEntry
from llmopt.checkpoint.publish import publish
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.shards import write_index
from llmopt.compressing import write_parts
from llmopt.errors import EXIT_CODES, BrokenArtifactError, ExitCode, Outcome, RoundTripError
from llmopt.evaluation import compare, judge, one_error_family
from llmopt.job import Job, prepare, stage_artifact
from llmopt.naming import config_names, ignored_names
from llmopt.progress import Progress, silent
from llmopt.recipe import Recipe
from llmopt.report.failure import write_failure
from llmopt.report.schema import Report, RoundTrip
from llmopt.reporting import assemble_failure, assemble_report, read_records, write_report
from llmopt.roundtrip import check_round_trip
from llmopt.writing import write_config
from llmopt_evals.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Result:
    """Where a run ended.

    Attributes:
        path: the published directory, or the quarantine.
        published: whether it is the former.
        exit_code: what the command line exits with.
        report: everything that was found out.
    """

    path: Path
    published: bool
    exit_code: ExitCode
    report: Report


@one_error_family()
def quantize(
    source: Path | str,
    recipe: Recipe | Path | str,
    output: Path | str,
    *,
    resume: bool = False,
    device: str = "cpu",
    progress: Progress = silent,
) -> Result:
    """Quantize a checkpoint, judge what was written, and publish it if it passed.

    Args:
        source: folder of a Hugging Face checkpoint; it is only read.
        recipe: a recipe, its name, or its YAML file.
        output: folder that will appear if the gate passes; it must not exist or be empty.
        resume: go on where an interrupted run for the same output stopped.
        device: where blocks compute.
        progress: told of every step.

    Raises:
        LlmoptError: with what is wrong and what to do; nothing is visible at ``output`` then.
    """
    stopwatch = _Stopwatch()
    with stopwatch("prepare"):
        job = prepare(Path(source), recipe, Path(output), resume, device, progress)
    with stage_artifact(job, Path(output), resume) as artifact:
        with stopwatch("quantize"):
            write_parts(job, artifact, progress)
        with stopwatch("finish"):
            ledger, companions = finish_directory(job, artifact)
        records = read_records(artifact.journal.blocks)
        try:
            with stopwatch("round trip"):
                round_trip = _read_back(job, artifact, progress)
            with stopwatch("gate"):
                verdict = _judge(job, artifact, progress)
        except (RoundTripError, BrokenArtifactError) as error:
            seconds, name = stopwatch.seconds, artifact.output.name
            failure = assemble_failure(
                job, artifact.directory, name, records.layers, companions, error, seconds
            )
            write_failure(artifact.directory, failure)
            place = publish(artifact, _Broken()).path
            raise type(error)(f"{error.what}; it is in {place}", error.remedy) from error
        report = assemble_report(
            job,
            artifact.directory,
            artifact.output.name,
            records,
            ledger,
            companions,
            round_trip,
            verdict,
            stopwatch.seconds,
        )
        write_report(artifact.directory, report)
        result = publish(artifact, verdict)
    return Result(result.path, result.published, EXIT_CODES[verdict.outcome], report)


@dataclass(slots=True)
class _Stopwatch:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - start


class _Broken:
    """The verdict on what differs from what was solved, or cannot even be measured."""

    outcome: Outcome = "fail"


def finish_directory(job: Job, artifact: Artifact) -> tuple[Ledger, Companions]:
    """Index, config, companions; the ledger must sum to the source."""
    entries = artifact.journal.blocks
    write_index(artifact.directory, [entry.shard for entry in entries])
    form = job.contract.form
    schemes = config_names(job.structure, job.contract.schemes)
    ignored = ignored_names(
        job.reader, job.structure, job.contract.kept, patterns=form.takes_patterns
    )
    write_config(artifact.directory, job.reader.config, form, form.config(schemes, ignored))
    companions = copy_companions(job.reader.path, artifact.directory)
    adapter = TypeAdapter(list[LedgerEntry])
    ledger = Ledger(
        line for entry in entries for line in adapter.validate_python(entry.payload["ledger"])
    )
    ledger.check(job.reader)
    return ledger, companions


def _read_back(job: Job, artifact: Artifact, progress: Progress) -> RoundTrip:
    entries = artifact.journal.blocks
    solved = {module: digest for entry in entries for module, digest in entry.digests.items()}
    schemes = {
        job.structure.disk_module(name): scheme for name, scheme in job.contract.schemes.items()
    }
    quantized = {f"{module}.weight" for module in solved}
    written = {name for entry in entries for name in entry.shard.names}
    kept = {
        name: digest
        for name, digest in job.digests.items()
        if name in written and name not in quantized
    }
    scaled = TypeAdapter(dict[str, str])
    for entry in entries:  # their bytes are no longer the source's
        kept |= scaled.validate_python(entry.payload["scaled"])
    return check_round_trip(artifact.directory, solved, schemes, kept, progress)


def _judge(job: Job, artifact: Artifact, progress: Progress) -> Verdict:
    """Judge the staged bytes; nothing that was in memory while quantizing is used."""
    comparison = replace(
        compare(open_checkpoint(artifact.directory), job.reader),
        is_plain_rounding=job.recipe.is_plain_rounding,
    )
    return judge(
        comparison,
        job.texts.evaluation.text,
        job.recipe.gate,
        artifact.scratch,
        device=job.device,
        progress=progress,
    )
