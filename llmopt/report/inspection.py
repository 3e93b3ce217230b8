"""What stands at a path, as ``llmopt inspect`` shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmopt.report.schema import Report


@dataclass(frozen=True, slots=True)
class TensorLine:
    """One tensor on disk."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint, an artifact or a single file.

    Attributes:
        path: what was looked at.
        kind: ``artifact`` when a report lies beside the weights.
        tensors: in file order.
        architecture: of ``config.json``, ``None`` for a single file.
        format: how quantized weights are stored, ``None`` for none.
        schemes: quantized linear layers by scheme (``W4A16 g128``).
        unread: why llmopt cannot tell the schemes, ``None`` where it can.
        report: of an artifact.
        changed: lines of ``changed_files``; empty when the artifact is as it was gated.
        metadata: of a GGUF file, in short.
        verdict: that a GGUF file says of itself, ``None`` for one that llmopt did not gate.
        intact: whether its tensors still have their hash; ``None`` where it has none.
    """

    path: Path
    kind: Literal["artifact", "checkpoint", "file", "GGUF file"]
    tensors: tuple[TensorLine, ...]
    architecture: str | None = None
    format: str | None = None
    schemes: Mapping[str, int] = field(default_factory=dict)
    unread: str | None = None
    report: Report | None = None
    changed: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    verdict: str | None = None
    intact: bool | None = None
