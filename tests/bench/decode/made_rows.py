"""Rows of a decode benchmark that nobody ran."""

from __future__ import annotations

from typing import Any

from llmopt.bench.decode.rows import DecodeReport, DecodeRow, DecodeSetting
from llmopt.bench.decode.timing import Timing
from llmopt.bench.decode.traffic import Bandwidth
from llmopt.bench.rows import Spread

SETTING = DecodeSetting(
    model="demo <grown> to 300 M",
    num_parameters=300_000_000,
    is_grown=True,
    dtype="bfloat16",
    new_tokens=64,
    device="cpu",
    machine="A processor, 2 cores",
    threads=2,
    bandwidth=Bandwidth(30e9, "a sum in float32", 2),
    python="3.11",
    commit="abc",
    date="2026-01-01",
)


def made_row(rate: float, width: float = 0.01, **changes: Any) -> DecodeRow:
    """A measured row of llmopt's; its spread is ``width`` of the rate to either side."""
    spread = Spread(rate * (1 - width), rate, rate * (1 + width))
    batch, context = changes.pop("batch", 1), changes.pop("context", 128)
    values: dict[str, Any] = {
        "engine": "llmopt",
        "variant": "",
        "weights": "16-bit",
        "kv": "16-bit",
        "workload": "mixed" if context is None else f"{batch}x{context}",
        "batch": batch,
        "context": context,
        "status": "measured",
        "model": SETTING.model,
        "is_grown": SETTING.is_grown,
        "machine": SETTING.machine,
        "commit": SETTING.commit,
        "repeats": 3,
        "timing": Timing(spread, Spread(0.1, 0.2, 0.3), 0.010, 0.030),
        "peak_bytes": 1 << 30,
        "step_bytes": None if context is None else 600e6,
        "floor_tokens_per_s": None if context is None else batch * 50.0,
        "versions": {"torch": "2"},
        **changes,
    }
    return DecodeRow(**values)


def made_report(*rows: DecodeRow) -> DecodeReport:
    """A report of these rows."""
    return DecodeReport(SETTING, rows, True)
