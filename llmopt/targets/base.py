"""What is made of a checkpoint: another checkpoint, or one GGUF file.

The road is the same for both. They differ in how a part is compressed and laid out, how the parts
become a whole, how the whole is read back and opened as a candidate, and in how it is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import JsonValue
from torch import Tensor

from llmopt.agreement import Agreement
from llmopt.calibration.forwards import BlockForwards
from llmopt.calibration.hidden_states import HiddenStates
from llmopt.calibration.walker import BlockWalker
from llmopt.checkpoint.artifact import Artifact
from llmopt.checkpoint.companions import Companions
from llmopt.checkpoint.journal import BlockEntry
from llmopt.checkpoint.ledger import Ledger, LedgerEntry
from llmopt.checkpoint.placement import Placement
from llmopt.comparison import Comparison
from llmopt.errors import Outcome
from llmopt.progress import Progress
from llmopt.report.schema import FileHash, GGUFFileRecord, LayerRecord, RoundTrip, Sizes
from llmopt.writing import Part


@dataclass(frozen=True, slots=True)
class Seen:
    """A part with the calibration text in view.

    Attributes:
        walker: started with the calibration batches.
        inputs: of the block; for what lies outside the blocks, the outputs of the last one.
        forwards: of the block, whose module is to be changed; ``None`` outside the blocks.
    """

    walker: BlockWalker
    inputs: HiddenStates
    forwards: BlockForwards | None


@dataclass(frozen=True, slots=True)
class CompressedPart:
    """The tensors of one shard, and what there is to say of them.

    Attributes:
        tensors: as they are staged, by name.
        digests: what the round trip compares, by name.
        entries: what became of the source tensors behind them.
        layers: a record a quantized matrix.
        payload: whatever else the target needs again after a resume.
    """

    tensors: Mapping[str, Tensor]
    digests: Mapping[str, str]
    entries: tuple[LedgerEntry, ...]
    layers: tuple[LayerRecord, ...] = ()
    payload: Mapping[str, JsonValue] = field(default_factory=dict)


class Target(Protocol):
    """One kind of output of one job."""

    @property
    def contract(self) -> Agreement:
        """What must hold before the first block is read."""
        ...

    @property
    def bits(self) -> int:
        """The bit width whose margins are the starting point."""
        ...

    @property
    def context_length(self) -> int | None:
        """Tokens within which it computes what the source computes; ``None`` without a limit."""
        ...

    @property
    def given_sha256(self) -> str:
        """Of what it reads besides the source and the texts; empty if there is nothing."""
        ...

    @property
    def placement(self) -> Placement:
        """What it is where people see it."""
        ...

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is compressed together, blocks first."""
        ...

    @property
    def num_bytes(self) -> int:
        """Disk space of everything that is staged, scratch files not counted."""
        ...

    def compress(self, part: Part, seen: Seen | None) -> CompressedPart:
        """Solve a part and lay it out; ``seen`` is ``None`` where the recipe needs no text.

        Raises:
            BadInputError: the calibration text starves experts; names them.
            NumericalError: NaN or infinity on the way; names the layer and the sample.
        """
        ...

    def finish(self, artifact: Artifact, progress: Progress) -> Companions:
        """Make one whole of the staged parts.

        Raises:
            StorageError: if the disk refuses.
        """
        ...

    def read_back(
        self, artifact: Artifact, source_digests: Mapping[str, str], progress: Progress
    ) -> RoundTrip:
        """Compare what is on disk with what was solved, by a decoder that shares no code.

        Raises:
            RoundTripError: naming what differs.
        """
        ...

    def open_candidate(self, artifact: Artifact) -> Comparison:
        """The staged bytes beside the source, as a reader of them has them."""
        ...

    def seal(self, artifact: Artifact, outcome: Outcome) -> None:
        """Write the verdict into the output where it has a place for it."""
        ...

    def sizes(self, artifact: Artifact, ledger: Ledger) -> Sizes:
        """Weights in the source and in the output."""
        ...

    def files(self, artifact: Artifact) -> dict[str, FileHash]:
        """Every file of the output but the report's own."""
        ...

    def describe(self, artifact: Artifact) -> GGUFFileRecord | None:
        """What the report says of a GGUF file; ``None`` of a directory."""
        ...


def solved_digests(entries: Sequence[BlockEntry]) -> dict[str, str]:
    """What was solved, by name, over all parts that the journal has."""
    return {name: digest for entry in entries for name, digest in entry.digests.items()}
