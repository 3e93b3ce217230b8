"""What a run found out, in one record: the JSON, the model card and the page show this and no more.

Numbers are unrounded. Sizes are bytes, times seconds, hashes SHA-256 in hexadecimal; file names
are relative to the artifact with forward slashes.
"""

from __future__ import annotations

import re
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, NonNegativeFloat, NonNegativeInt

from llmopt.checkpoint.companions import CompanionRecord, LeftOut
from llmopt.checkpoint.ledger import Fate, FateTotal, LedgerEntry
from llmopt_evals.verdict import Verdict

SCHEMA_VERSION: Final = 1
JSON_NAME = "llmopt.json"
CARD_NAME = "README.md"
HTML_NAME = "report.html"
CONVERSION_NAME = "conversion.json"
REPORT_FILES = frozenset({JSON_NAME, CARD_NAME, HTML_NAME, CONVERSION_NAME})
"""The report's own files: they cannot hold their own hash."""


class Record(BaseModel):
    """Base of all records: frozen, unknown keys refused, infinities survive JSON as strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Source(Record):
    """The checkpoint that was compressed."""

    name: str
    sha256: str = Field(description="content hash over all tensors and config.json")
    num_bytes: NonNegativeInt
    num_parameters: NonNegativeInt
    architecture: str
    dtype: str
    license: str | None = None
    card: str | None = Field(
        default=None, description="file the source's own model card was kept as"
    )


class RecipeRecord(Record):
    """The recipe as it was understood, defaults included."""

    name: str
    sha256: str
    data: dict[str, JsonValue]


class ContractCheck(Record):
    """One thing that was checked before the first block was read."""

    name: str
    passed: bool
    detail: str = ""


class Consumer(Record):
    """An engine the artifact is made for."""

    name: str
    version: str = Field(default="", description="range or version that the contract was held to")
    checks: tuple[ContractCheck, ...] = ()

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why it would refuse the artifact; empty if it would open it."""
        return tuple(check.detail for check in self.checks if not check.passed)


class Calibration(Record):
    """The text the solver's statistics came from."""

    source: str
    sha256: str
    num_documents: NonNegativeInt
    num_tokens: NonNegativeInt
    num_samples: NonNegativeInt
    sequence_length: NonNegativeInt
    num_truncated_documents: NonNegativeInt = 0
    num_dropped_tokens: NonNegativeInt = 0
    num_duplicated_bos_removed: NonNegativeInt = 0
    notes: tuple[str, ...] = Field(default=(), description="for example: no pad token")


class Evaluation(Record):
    """The held-out text that the gate measured on."""

    sources: tuple[str, ...]
    sha256: str
    num_units: NonNegativeInt
    num_tokens: NonNegativeInt
    num_overlapping_dropped: NonNegativeInt = Field(
        default=0, description="documents also in the calibration text"
    )
    num_left_out: NonNegativeInt = Field(
        default=0, description="documents beyond the cap on evaluation text"
    )
    notes: tuple[str, ...] = ()


class Environment(Record):
    """Where the run happened."""

    python: str
    llmopt: str
    torch: str
    transformers: str
    device: str
    num_threads: NonNegativeInt
    dtype: str = Field(description="element type of the calibration pass")
    platform: str = ""


class SchemeRecord(Record):
    """What a weight became; ``group_size`` ``None`` is one scale a row.

    A type of ggml's says by its name what its blocks are like.
    """

    name: str
    bits: int
    group_size: int | None
    symmetric: bool
    activation_order: str = "none"
    is_ggml: bool = False

    @property
    def label(self) -> str:
        """As tables show it: ``W4A16 g128``, ``Q4_K``."""
        if self.is_ggml:
            return self.name
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"{self.name} {group}{'' if self.symmetric else ' asym'}"


class LayerRecord(Record):
    """One quantized linear layer.

    ``weight_error`` is ``|W - Q|^2 / |W|^2``. ``output_error`` is the relative squared error of the
    layer's output on the calibration text, ``|(W - Q) X|^2 / |W X|^2``, and ``plain_output_error``
    the same under plain rounding; both ``None`` when the solver saw no text.
    """

    name: str
    block: NonNegativeInt | None = Field(description="None outside the decoder blocks")
    shape: tuple[int, int] = Field(description="(out, in)")
    scheme: SchemeRecord
    solver: str
    weight_error: NonNegativeFloat
    output_error: NonNegativeFloat | None = None
    plain_output_error: NonNegativeFloat | None = None
    damping: NonNegativeFloat | None = Field(default=None, description="of the mean diagonal")
    num_damping_escalations: NonNegativeInt = 0
    num_dead_columns: NonNegativeInt = 0
    num_tokens: NonNegativeInt = Field(default=0, description="calibration tokens that entered")
    input_max_abs: NonNegativeFloat = 0.0

    @property
    def kind(self) -> str:
        """The name without its place: ``self_attn.q_proj``, ``mlp.experts.*.up_proj``."""
        if self.block is None:
            return self.name
        tail = re.split(rf"(?:^|\.){self.block}\.", self.name, maxsplit=1)[-1]
        return ".".join("*" if part.isdigit() else part for part in tail.split("."))


class ScaleRecord(Record):
    """Channels that were scaled before quantizing, and what that brought."""

    block: NonNegativeInt
    producer: str = Field(description="relative to the block; what the scales were folded into")
    readers: tuple[str, ...] = Field(description="what takes them back; * for any expert")
    alpha: float = Field(ge=0, le=1, description="0 where nothing beat leaving them as they are")
    duo: bool = Field(description="whether the weight's magnitude was divided by")
    error_ratio: NonNegativeFloat = Field(
        description="the readers' output error under plain rounding, scaled / unscaled"
    )
    smallest: NonNegativeFloat
    largest: NonNegativeFloat


class CacheScaleRecord(Record):
    """Static scales of an fp8 cache of one block."""

    block: NonNegativeInt
    attention: str = Field(description="the module's name on disk")
    largest_key: NonNegativeFloat = Field(description="magnitude after the rotary embedding")
    largest_value: NonNegativeFloat
    k_scale: NonNegativeFloat
    v_scale: NonNegativeFloat


class DeclinedFold(Record):
    """A layer whose channels cannot be scaled without changing the model."""

    block: NonNegativeInt
    producer: str
    reason: str


class LedgerRecord(Record):
    """What became of every source tensor; the totals sum to the source."""

    totals: dict[Fate, FateTotal]
    entries: tuple[LedgerEntry, ...]


class CompanionFiles(Record):
    """Tokenizer, chat template, generation settings, licence: carried over byte for byte."""

    carried: tuple[CompanionRecord, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


class RoundTrip(Record):
    """The artifact re-read by an independent decoder."""

    num_tensors: NonNegativeInt
    num_mismatches: NonNegativeInt


class Sizes(Record):
    """Weights in the source and in the artifact."""

    source_bytes: NonNegativeInt
    artifact_bytes: NonNegativeInt
    ratio: NonNegativeFloat = Field(description="artifact / source")
    bits_per_weight: NonNegativeFloat = Field(description="over the quantized weights, scales in")


class ExpertTokens(Record):
    """How many calibration tokens were routed to each expert of a mixture."""

    num_experts: NonNegativeInt = Field(description="quantized ones, over all blocks")
    fewest: NonNegativeInt
    median: NonNegativeFloat
    most: NonNegativeInt


class Coverage(Record):
    """What went wrong on the way without stopping it; NaN and overflow do stop it."""

    num_singular_hessians: NonNegativeInt = 0
    num_dead_columns: NonNegativeInt = 0
    min_tokens_per_layer: NonNegativeInt | None = Field(
        default=None, description="None when the solver saw no calibration text"
    )
    expert_tokens: ExpertTokens | None = Field(
        default=None, description="None also where no expert was quantized"
    )
    num_folds: NonNegativeInt = Field(default=0, description="scales searched for and folded")
    declined_folds: dict[str, str] = Field(
        default={}, description="layer -> why no scale could be folded into it, in any block"
    )


class GGUFTensorRecord(Record):
    """One tensor of a GGUF file."""

    name: str
    type: str
    wanted: str | None = Field(
        default=None, description="the type that was asked for, where its rows do not divide"
    )
    num_bytes: NonNegativeInt
    weighed: bool = Field(default=False, description="whether importance weighed its errors")


class GGUFFileRecord(Record):
    """What there is to say of a GGUF file besides what holds of every artifact."""

    file: str
    num_bytes: NonNegativeInt = Field(description="of the file")
    architecture: str = Field(description="general.architecture")
    mixture: str = Field(description="the type or mixture that the recipe names")
    tokenizer: str = Field(description="tokenizer.ggml.model")
    pre_tokenizer: str | None = Field(default=None, description="tokenizer.ggml.pre")
    importance: str = Field(description="calibration, the name of an imatrix file, or none")
    imatrix_sha256: str | None = None
    tensor_sha256: str = Field(description="over the file's tensor data")
    notes: tuple[str, ...] = Field(
        default=(), description="what llama.cpp does otherwise, or could not be told"
    )
    tensors: tuple[GGUFTensorRecord, ...]

    @property
    def types(self) -> dict[str, int]:
        """How many tensors each type has, the one with the most bytes first."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors:
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.num_bytes
        used = sorted(sizes, key=lambda name: -sizes[name])
        return {name: sum(tensor.type == name for tensor in self.tensors) for name in used}

    def bytes_of(self, name: str) -> int:
        """Bytes of all tensors of a type."""
        return sum(tensor.num_bytes for tensor in self.tensors if tensor.type == name)

    @property
    def fallbacks(self) -> tuple[GGUFTensorRecord, ...]:
        """Tensors whose rows the wanted type does not divide."""
        return tuple(tensor for tensor in self.tensors if tensor.wanted is not None)

    @property
    def num_weighed(self) -> int:
        """Tensors whose errors were weighed by importance."""
        return sum(tensor.weighed for tensor in self.tensors)


class FileHash(Record):
    """A file of the artifact as it was gated."""

    sha256: str
    num_bytes: NonNegativeInt


class Report(Record):
    """All that is known of one artifact."""

    schema_version: Literal[1] = SCHEMA_VERSION
    llmopt_version: str
    created: str = Field(description="UTC, ISO 8601")
    name: str = Field(description="the artifact's")
    format: str
    source: Source
    recipe: RecipeRecord
    consumers: tuple[Consumer, ...]
    contract: tuple[ContractCheck, ...] = Field(
        default=(), description="checks that belong to no single consumer"
    )
    calibration: Calibration | None = Field(description="None when the solver needs no text")
    evaluation: Evaluation
    environment: Environment
    layers: tuple[LayerRecord, ...]
    scales: tuple[ScaleRecord, ...] = Field(default=(), description="of the awq stage")
    cache_scales: tuple[CacheScaleRecord, ...] = Field(default=(), description="of an fp8 cache")
    ledger: LedgerRecord
    companions: CompanionFiles
    round_trip: RoundTrip
    sizes: Sizes
    coverage: Coverage
    margins_for_bits: int | None = Field(
        default=None, description="bit width whose fixed margins were the starting point"
    )
    verdict: Verdict
    timings: dict[str, NonNegativeFloat] = Field(description="seconds by stage, in order")
    files: dict[str, FileHash] = Field(description="every file but the report's own")
    gguf: GGUFFileRecord | None = Field(default=None, description="of format gguf")
