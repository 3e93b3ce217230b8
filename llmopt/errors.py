"""The one exception family: what is wrong, where, and what to do about it."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from typing import Literal


class ExitCode(IntEnum):
    """What a command's exit status says; 1 is left to unforeseen crashes."""

    PASS = 0
    BAD_INPUT = 2
    FAIL = 3
    INCONCLUSIVE = 4


Outcome = Literal["pass", "fail", "inconclusive"]

EXIT_CODES: dict[Outcome, ExitCode] = {
    "pass": ExitCode.PASS,
    "fail": ExitCode.FAIL,
    "inconclusive": ExitCode.INCONCLUSIVE,
}
"""The exit code of each verdict."""


class LlmoptError(Exception):
    """An error for a person to act on.

    Args:
        what: what is wrong and where (file, tensor, layer, key).
        remedy: what the reader should do about it.
    """

    exit_code = ExitCode.BAD_INPUT

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}\n  what to do: {remedy}")
        self.what = what
        self.remedy = remedy


class BadInputError(LlmoptError):
    """Source, recipe, text or option that cannot be worked with."""


class ContractError(BadInputError):
    """The recipe, the source and the target consumers do not fit together."""


class NumericalError(LlmoptError):
    """NaN or infinity where a number is owed; names the layer and the sample."""


class StorageError(LlmoptError):
    """The disk refused: full, read-only, or gone."""


class RoundTripError(LlmoptError):
    """What was read back from disk is not what was calibrated: a defect of llmopt, not the user."""

    exit_code = ExitCode.FAIL


class BrokenArtifactError(LlmoptError):
    """The artifact itself computes NaN or infinity where its source does not."""

    exit_code = ExitCode.FAIL


class AlreadyConcludedError(LlmoptError):
    """The run to resume was killed after its output was in place: nothing is left to do.

    Attributes:
        outcome: the verdict it came to; ``exit_code`` follows it.
        destination: the published directory, or the quarantine.
    """

    def __init__(self, outcome: Outcome, destination: Path) -> None:
        super().__init__(
            f"the run to resume had come to its end ({outcome}): {destination} is complete",
            "nothing; for a new run choose another output or remove that one",
        )
        self.outcome = outcome
        self.destination = destination
        self.exit_code = EXIT_CODES[outcome]
