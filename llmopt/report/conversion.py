"""The report of a conversion: what became what, and that both mean the same.

It lies beside the weights as ``conversion.json``, with a model card that says the same to a reader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt

from llmopt.checkpoint.durable import write_bytes
from llmopt.errors import Outcome
from llmopt.report.schema import (
    CARD_NAME,
    CONVERSION_NAME,
    CompanionFiles,
    Consumer,
    FileHash,
    Record,
)


class ConvertedFrom(Record):
    """The checkpoint that was converted."""

    name: str
    format: str
    checkpoint_format: str | None
    sha256: str = Field(description="over codes, scales, zero points, and all other tensors")
    gated: Outcome | None = Field(description="its own verdict, if llmopt gave it one")


class ConversionReport(Record):
    """All that is known of one conversion.

    Attributes:
        schemes: quantized layers by scheme.
        num_quantized: weights whose codes, scales, zero points and group index were read back.
        num_copied: other tensors, compared byte for byte.
        different: names of tensors that are not equal.
        outcome: ``pass`` if there are none.
    """

    schema_version: Literal[1] = 1
    llmopt_version: str
    created: str
    name: str
    source: ConvertedFrom
    format: str
    checkpoint_format: str | None
    schemes: dict[str, NonNegativeInt]
    consumers: tuple[Consumer, ...]
    companions: CompanionFiles
    num_quantized: NonNegativeInt
    num_copied: NonNegativeInt
    different: str | None = None
    outcome: Outcome
    files: dict[str, FileHash]


def write_conversion(directory: Path, report: ConversionReport) -> None:
    """Write the report as JSON and as a model card.

    Raises:
        StorageError: if the disk refuses.
    """
    variant = f" ({report.checkpoint_format})" if report.checkpoint_format else ""
    was = report.source
    if report.outcome == "pass":
        verdict = (
            f"Every code, scale, zero point and group index of {report.num_quantized} quantized "
            f"weights was read back by a second decoder and equals the source's; "
            f"{report.num_copied} other tensors are the same bytes."
        )
    else:
        verdict = f"It must not be used: {report.different}"
    opens = ", ".join(f"{consumer.name} ({consumer.version})" for consumer in report.consumers)
    gated = f" llmopt judged the source: {was.gated}." if was.gated else ""
    card = (
        f"# {report.name}\n\n"
        f"llmopt {report.llmopt_version} converted {was.name} from {was.format} to "
        f"{report.format}{variant} without quantizing anew.{gated}\n\n"
        f"{verdict}\n\n"
        f"Held to what these consumers open: {opens}. `{CONVERSION_NAME}` has the details.\n"
    )
    write_bytes(directory / CARD_NAME, card.encode())
    write_bytes(directory / CONVERSION_NAME, (report.model_dump_json(indent=1) + "\n").encode())
