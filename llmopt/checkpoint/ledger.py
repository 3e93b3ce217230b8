"""What became of each source tensor: quantized, scaled, copied, tied or dropped, and why.

Tensors that the output has and the source has not are listed too: they were added.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from llmopt.checkpoint.tensor_source import TensorSource
from llmopt.errors import ExitCode, LlmoptError


class LedgerError(LlmoptError):
    """The ledger does not sum to the source: a defect of llmopt, not of the user."""

    exit_code = ExitCode.FAIL


class Fate(StrEnum):
    """What a source tensor ends as; ``added`` is what no source tensor became."""

    QUANTIZED = "quantized"
    SCALED = "scaled"
    COPIED = "copied"
    TIED = "tied"
    DROPPED = "dropped"
    ADDED = "added"


class LedgerEntry(BaseModel):
    """The fate of one source tensor; sizes are the source's, and so 0 of what was added."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    fate: Fate
    reason: str
    num_bytes: int
    num_parameters: int


class FateTotal(BaseModel):
    """Sums over the tensors of one fate; sizes are the source's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_tensors: int
    num_parameters: int
    num_bytes: int


class Ledger:
    """The fates recorded so far; ``entries`` of an earlier run may be given back."""

    def __init__(self, entries: Iterable[LedgerEntry] = ()) -> None:
        self._entries: list[LedgerEntry] = list(entries)

    @property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """All entries, in the order recorded."""
        return tuple(self._entries)

    def record(
        self, name: str, fate: Fate, reason: str, num_bytes: int, num_parameters: int
    ) -> None:
        """Adds the fate of a source tensor, with its size in the source."""
        self._entries.append(
            LedgerEntry(
                name=name,
                fate=fate,
                reason=reason,
                num_bytes=num_bytes,
                num_parameters=num_parameters,
            )
        )

    def check(self, source: TensorSource) -> None:
        """Holds the ledger against the source.

        Raises:
            LedgerError: for a source tensor with no fate or two, an entry without a source
                tensor that was not added, one that was and is there, or a size that is not the
                source's.
        """
        names = [entry.name for entry in self._entries]
        added = {entry.name for entry in self._entries if entry.fate is Fate.ADDED}
        recorded, expected = set(names), set(source.names)
        problems = [f"{name} has no fate" for name in source.names if name not in recorded]
        problems += [f"{name} has {names.count(name)} fates" for name in _repeated(names)]
        problems += [f"{name} is not in the source" for name in sorted(recorded - expected - added)]
        problems += [
            f"{name} was added, but the source has it" for name in sorted(added & expected)
        ]
        for entry in self._entries:
            if entry.name in expected:
                info = source.info(entry.name)
                if (entry.num_bytes, entry.num_parameters) != (info.num_bytes, info.num_parameters):
                    problems.append(
                        f"{entry.name} is recorded with {entry.num_bytes} bytes, "
                        f"{entry.num_parameters} parameters; the source has {info.num_bytes}, "
                        f"{info.num_parameters}"
                    )
        if problems:
            more = f"; {len(problems) - 5} more" if len(problems) > 5 else ""
            raise LedgerError(
                f"the ledger does not sum to the source: {'; '.join(problems[:5])}{more}",
                "report this with the recipe and the model's name: it is a defect of llmopt",
            )

    def summary(self) -> dict[Fate, FateTotal]:
        """Totals of every fate, those without a tensor included."""
        return {
            fate: FateTotal(
                num_tensors=len(entries),
                num_parameters=sum(entry.num_parameters for entry in entries),
                num_bytes=sum(entry.num_bytes for entry in entries),
            )
            for fate in Fate
            for entries in [[entry for entry in self._entries if entry.fate is fate]]
        }


def _repeated(names: list[str]) -> list[str]:
    seen: set[str] = set()
    repeated: dict[str, None] = {}
    for name in names:
        if name in seen:
            repeated[name] = None
        seen.add(name)
    return list(repeated)
