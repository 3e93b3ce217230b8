"""The one door: a staged artifact becomes visible with a passing verdict, or goes to quarantine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llmopt.checkpoint.artifact import Artifact, remove_staging
from llmopt.checkpoint.durable import TEMPORARY_SUFFIX, fsync_path, fsync_tree, storage_errors
from llmopt.checkpoint.journal import Conclusion
from llmopt.errors import BadInputError, Outcome


class Verdict(Protocol):
    """What ``publish`` asks of a verdict."""

    @property
    def outcome(self) -> Outcome:
        """``pass`` publishes; anything else does not."""
        ...


@dataclass(frozen=True, slots=True)
class PublishResult:
    """Where the artifact is now, and whether that is the output path."""

    path: Path
    published: bool


def publish(artifact: Artifact, verdict: Verdict) -> PublishResult:
    """Moves the artifact to its output path, or in one rename to a quarantine beside it.

    Everything is on disk before the first rename; working files are removed after the last; the
    artifact is closed. Nothing else in llmopt makes an output visible.

    Raises:
        BadInputError: if something came to lie at the output path meanwhile; it stays staged.
        StorageError: if the disk refuses; it stays staged.
    """
    outcome = verdict.outcome
    assert outcome in ("pass", "fail", "inconclusive"), outcome
    published = outcome == "pass"
    destination = artifact.output if published else _quarantine(artifact.output)
    placement, staging = artifact.placement, artifact.staging
    with storage_errors(f"cannot publish {destination}"):
        for path in artifact.directory.rglob(f".*{TEMPORARY_SUFFIX}"):
            path.unlink()
        for folder in placement.folders:
            fsync_tree(staging / folder)
        artifact.journal.conclude(Conclusion(outcome=outcome, destination=destination.name))
        try:
            (placement.show if published else placement.shelve)(staging, destination)
        except FileExistsError as error:
            artifact.journal.conclude(None)
            raise BadInputError(
                f"{error.filename2 or error.filename} came into being while the run was at work",
                "move it away and continue with --resume",
            ) from error
        except OSError:
            artifact.journal.conclude(None)
            raise
        fsync_path(staging)
        fsync_path(destination.parent)
    with storage_errors(f"{destination} is complete, but {staging} cannot be removed"):
        remove_staging(staging)
    artifact.close()
    return PublishResult(destination, published)


def _quarantine(output: Path) -> Path:
    """``NAME.quarantine`` beside the output, numbered from 2 if there is one already."""
    number = 1
    while True:
        suffix = ".quarantine" if number == 1 else f".quarantine-{number}"
        path = output.parent / (output.name + suffix)
        if not os.path.lexists(path):
            return path
        number += 1
