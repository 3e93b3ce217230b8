"""What each consumer accepts of each format, as data (``consumers.yaml``), and why not the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from llmopt.formats.accepted import Accepted
from llmopt.formats.expert_support import ExpertSchemes, ExpertSupport
from llmopt.formats.gguf_support import GGUFSupport
from llmopt.kv_cache.settings import KVCacheSettings, KVKind
from llmopt.quantization.scheme import ActivationOrder, Scheme

Shard = Literal["in", "out"]
"""The dimension that ranks divide: input features of o and down, output of q/k/v and gate/up."""

# Model types whose rotary base is this in transformers 4 where config.json does not say; of those
# that auto-gptq opens.
_ROPE_THETA_10000 = {"llama", "mistral", "qwen2", "gemma"}

_Refused = Literal[
    "bits",
    "symmetric",
    "group_size",
    "activation_order",
    "dtype",
    "in_multiple",
    "out_multiple",
    "mixed_schemes",
    "checkpoint_format",
    "asymmetric_checkpoint_formats",
    "kept_layers",
    "model_types",
    "tied_head",
    "transformers_4",
    "experts",
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FormatSupport(_Section):
    """What one consumer does with one format; the head of ``consumers.yaml`` explains the keys."""

    versions: dict[str, str]
    accepts: tuple[Accepted, ...]
    activation_orders: tuple[ActivationOrder, ...]
    dtypes: tuple[Literal["bfloat16", "float16", "float32"], ...]
    in_multiple: int = Field(gt=0)
    out_multiple: int = Field(gt=0)
    mixed_schemes: bool
    fuses_shared_inputs: bool
    checkpoint_formats: tuple[str, ...] | None = None
    asymmetric_checkpoint_formats: tuple[str, ...] | None = None
    kept_layers: bool = True
    model_types: tuple[str, ...] | None = None
    tied_head: bool = True
    transformers_4: bool = False
    experts: ExpertSupport | None = None
    kv_caches: dict[KVKind, bool] = {}
    reasons: dict[_Refused, str]

    def cache_words(self, cache: KVCacheSettings) -> str:
        """What becomes of a quantized cache that a checkpoint is for."""
        if cache.kind not in self.kv_caches:
            return (
                f"opens it and keeps a 16-bit cache: {cache.kind} as it was judged is "
                "llmopt.decoding's"
            )
        proof = "run" if self.kv_caches[cache.kind] else "read in the engine's source, not run"
        return f"keeps an {cache.kind} cache by the scales of the checkpoint ({proof})"

    def proven(self, scheme: Scheme) -> bool:
        """Whether this scheme has been run and compared, not only read about."""
        return scheme.activation_order in self.activation_orders and any(
            row.proven and row.covers(scheme) for row in self.accepts
        )

    @property
    def version(self) -> str:
        """The versions that the facts are of, in words."""
        return ", ".join(f"{package} {version}" for package, version in self.versions.items())

    def refusals(
        self,
        scheme: Scheme,
        in_features: int,
        out_features_fused: int,
        tensor_parallel_size: int,
        dtype: torch.dtype,
        *,
        shard: Shard | None = None,
    ) -> list[str]:
        """Why it would not run a linear layer, empty if it would.

        ``out_features_fused`` is of the whole group that it fuses (q/k/v, gate/up). ``shard`` is
        the dimension that ranks divide; where it is not known both are checked.
        """
        refused = self._scheme_refusals(scheme, dtype)
        sizes: tuple[tuple[Shard, str, int, int], ...] = (
            ("in", "input", in_features, self.in_multiple),
            ("out", "fused output", out_features_fused, self.out_multiple),
        )
        for side, label, size, multiple in sizes:
            ranks = tensor_parallel_size if shard in (None, side) else 1
            share, rest = divmod(size, ranks)
            if rest:
                refused.append(f"{size} {label} features do not divide among {ranks} ranks")
            elif share % multiple:
                reason = self.reasons["in_multiple" if side == "in" else "out_multiple"]
                refused.append(
                    f"{share} {label} features a rank are no multiple of {multiple}: {reason}"
                )
            elif side == "in" and scheme.group_size and share % scheme.group_size:
                refused.append(
                    f"groups of {scheme.group_size} do not divide {share} input features a rank"
                )
        return refused

    def mixture_refusal(self, schemes: Collection[Scheme]) -> str | None:
        """Why it would not open a checkpoint of these schemes together, or ``None``."""
        if self.mixed_schemes or len(set(schemes)) < 2:
            return None
        return f"several schemes in one checkpoint: {self.reasons['mixed_schemes']}"

    def kept_refusal(self, kept: Collection[str]) -> str | None:
        """Why it would not open a checkpoint with these linear layers in 16 bit, or ``None``."""
        if self.kept_layers or not kept:
            return None
        return f"{len(kept)} layers in 16 bit: {self.reasons['kept_layers']}"

    def expert_refusals(
        self, blocks: Sequence[ExpertSchemes], others: Collection[Scheme]
    ) -> list[str]:
        """Why it would not open a mixture of experts (:meth:`ExpertSupport.refusals`)."""
        if self.experts is None:
            why = self.reasons.get("experts", "nobody has tried it with packed experts")
            return [f"mixtures of experts: {why}"]
        return self.experts.refusals(blocks, others)

    def config_refusal(self, config: Mapping[str, JsonValue]) -> str | None:
        """Why it would not open a model of this ``config.json``, or misread it, or ``None``."""
        model_type = config.get("model_type")
        if self.model_types is not None and model_type not in self.model_types:
            return f"model_type {model_type}: {self.reasons['model_types']}"
        tied = config.get("tie_word_embeddings", model_type == "gemma")  # as transformers takes it
        if tied and not self.tied_head:
            return f"the head is the embedding: {self.reasons['tied_head']}"
        rope = config.get("rope_parameters")
        if not self.transformers_4 or "rope_theta" in config or not isinstance(rope, dict):
            return None
        told = (model_type, rope.get("rope_type", "default"), rope.get("rope_theta"))
        if told[0] in _ROPE_THETA_10000 and told[1:] == ("default", 10000.0):
            return None
        return f"rope_theta is under rope_parameters alone: {self.reasons['transformers_4']}"

    def checkpoint_format_refusal(
        self, checkpoint_format: str | None, schemes: Collection[Scheme] = ()
    ) -> str | None:
        """Why it would not open this variant of the format with ``schemes``, or ``None``."""
        if checkpoint_format is None:
            return None
        told = f"checkpoint_format {checkpoint_format}"
        opened, asymmetric = self.checkpoint_formats, self.asymmetric_checkpoint_formats
        if opened is not None and checkpoint_format not in opened:
            return f"{told}: {self.reasons['checkpoint_format']}"
        if (
            asymmetric is not None
            and checkpoint_format not in asymmetric
            and not all(scheme.symmetric for scheme in schemes)
        ):
            return f"asymmetric, {told}: {self.reasons['asymmetric_checkpoint_formats']}"
        return None

    def _scheme_refusals(self, scheme: Scheme, dtype: torch.dtype) -> list[str]:
        reasons = self.reasons
        refused: list[str] = []
        if not any(row.covers(scheme) for row in self.accepts):
            same_bits = [row for row in self.accepts if scheme.bits in row.bits]
            if not same_bits:
                refused.append(f"{scheme.bits} bits: {reasons['bits']}")
            elif not any(row.symmetric == scheme.symmetric for row in same_bits):
                kind = "symmetric" if scheme.symmetric else "asymmetric"
                refused.append(f"{kind} {scheme.bits} bits: {reasons['symmetric']}")
            else:
                refused.append(f"group size {scheme.group_size}: {reasons['group_size']}")
        if scheme.activation_order not in self.activation_orders:
            order = scheme.activation_order
            refused.append(f"activation order {order}: {reasons['activation_order']}")
        name = str(dtype).removeprefix("torch.")
        if name not in self.dtypes:
            refused.append(f"{name} models: {reasons['dtype']}")
        return refused


class Consumer(_Section):
    """One consumer: what it does with each format that it opens, and why not with the others.

    Attributes:
        title: its name for a reader.
        formats: by the name that recipes use.
        gguf: what it opens of GGUF files.
        lacks: why it does not open the formats that are not among them.
    """

    title: str
    formats: dict[str, FormatSupport] = {}
    gguf: GGUFSupport | None = None
    lacks: dict[str, str] = {}

    @model_validator(mode="after")
    def _check_formats(self) -> Consumer:
        opened = {*self.formats, *(["gguf"] if self.gguf else [])}
        if both := opened & self.lacks.keys():
            raise ValueError(f"{self.title} opens and lacks {', '.join(sorted(both))}")
        return self

    @property
    def version(self) -> str:
        """The versions that the facts are of, over all formats, in words."""
        versions = {
            package: version
            for support in self.formats.values()
            for package, version in support.versions.items()
        }
        if self.gguf is not None:
            versions |= self.gguf.versions
        return ", ".join(f"{package} {version}" for package, version in versions.items())


class _Table(_Section):
    schema_version: Literal[2]
    consumers: dict[str, Consumer]


@cache
def load_consumers() -> dict[str, Consumer]:
    """Every consumer by the name that recipes use."""
    text = files("llmopt.formats").joinpath("consumers.yaml").read_text(encoding="utf-8")
    return _Table.model_validate(yaml.safe_load(text)).consumers
