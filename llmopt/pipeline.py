"""The road: source, recipe, contract, blocks, staged artifact, round trip, gate, publish."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from llmopt.checkpoint.artifact import Artifact
from llmopt.checkpoint.companions import Companions
from llmopt.checkpoint.ledger import Ledger, LedgerEntry
from llmopt.checkpoint.publish import publish
from llmopt.compressing import write_parts
from llmopt.errors import EXIT_CODES, BrokenArtifactError, ExitCode, Outcome, RoundTripError
from llmopt.evaluation import judge, one_error_family
from llmopt.job import Job, prepare, stage_artifact
from llmopt.progress import Progress, silent
from llmopt.recipe import Recipe
from llmopt.report.failure import write_failure
from llmopt.report.schema import Report
from llmopt.reporting import assemble_failure, assemble_report, read_records, write_report
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
        output: folder, or ``.gguf`` file, that will appear if the gate passes; there must be
            nothing at the path (an empty folder is nothing).
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
            ledger, companions = finish(job, artifact, progress)
        records = read_records(artifact.journal.blocks)
        try:
            with stopwatch("round trip"):
                round_trip = job.target.read_back(artifact, job.digests, progress)
            with stopwatch("gate"):
                verdict = _judge(job, artifact, progress)
        except (RoundTripError, BrokenArtifactError) as error:
            job.target.seal(artifact, "fail")
            failure = assemble_failure(
                job, artifact, records.layers, companions, error, stopwatch.seconds
            )
            write_failure(artifact.directory, failure)
            place = publish(artifact, _Broken()).path
            raise type(error)(f"{error.what}; it is in {place}", error.remedy) from error
        job.target.seal(artifact, verdict.outcome)
        report = assemble_report(
            job,
            artifact,
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


def finish(job: Job, artifact: Artifact, progress: Progress) -> tuple[Ledger, Companions]:
    """Make one whole of the parts; the ledger must sum to the source."""
    companions = job.target.finish(artifact, progress)
    adapter = TypeAdapter(list[LedgerEntry])
    ledger = Ledger(
        line
        for entry in artifact.journal.blocks
        for line in adapter.validate_python(entry.payload["ledger"])
    )
    ledger.check(job.reader)
    return ledger, companions


def _judge(job: Job, artifact: Artifact, progress: Progress) -> Verdict:
    """Judge the staged bytes; nothing that was in memory while quantizing is used."""
    return judge(
        job.target.open_candidate(artifact),
        job.texts.evaluation.text,
        job.recipe.gate,
        artifact.scratch,
        device=job.device,
        progress=progress,
    )
