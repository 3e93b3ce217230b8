"""The stages of a recipe: what is done to a model, in order, and to which of its layers."""

from __future__ import annotations

import fnmatch
import re
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from llmopt.quantization.awq import AWQOptions
from llmopt.quantization.grid import Clip
from llmopt.quantization.scheme import ActivationOrder, IntBits, Scheme

Search = Literal["least-squares", "compatible"]
"""How scales and minimums of a GGUF type are found: ours, or as llama.cpp's own quantizer does."""


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SchemeSection(Section):
    """What a weight becomes; see :class:`llmopt.quantization.scheme.Scheme`."""

    bits: IntBits = 4
    group_size: int | None = Field(default=128, gt=0)
    symmetric: bool = True
    activation_order: ActivationOrder = "none"

    def scheme(self) -> Scheme:
        """The same as the mathematics knows it."""
        return Scheme(**self.model_dump())

    @property
    def label(self) -> str:
        """In a few words: ``W4A16 g128 sym``."""
        scheme = self.scheme()
        group = "channel" if scheme.group_size is None else f"g{scheme.group_size}"
        return f"{scheme.name} {group} {'sym' if scheme.symmetric else 'asym'}"


class GGMLSection(Section):
    """What a weight becomes in a GGUF file: one of ggml's types, or a mixture of them by name."""

    type: str

    @property
    def label(self) -> str:
        """Its name."""
        return self.type


PLAIN_TYPES = ("F32", "F16", "BF16")
"""GGUF types that have no blocks."""

SCHEME_KINDS: dict[str, type[Section]] = {"integer": SchemeSection, "ggml": GGMLSection}


def _scheme_kind(scheme: object) -> str:
    if isinstance(scheme, dict):
        return "ggml" if "type" in scheme else "integer"
    return "ggml" if isinstance(scheme, GGMLSection) else "integer"


AnyScheme = Annotated[
    Annotated[SchemeSection, Tag("integer")] | Annotated[GGMLSection, Tag("ggml")],
    Discriminator(_scheme_kind),
]


def _pattern(pattern: str) -> str:
    if not pattern.removeprefix("re:").strip():
        raise ValueError("the pattern is empty")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern


class Override(Section):
    """Another scheme for the linear layers whose module name matches.

    ``match`` is a shell pattern (``*.down_proj``), or a regular expression after ``re:``.
    """

    match: str
    scheme: AnyScheme

    @field_validator("match")
    @classmethod
    def _check_match(cls, pattern: str) -> str:
        return _pattern(pattern)


class AWQStage(Section):
    """Scale channels before they are quantized, where that leaves the 16-bit model as it is.

    See :mod:`llmopt.quantization.awq`. It stands before the quantize stage, whose solver may be
    either.
    """

    kind: Literal["awq"] = "awq"
    num_scales: int = Field(default=20, gt=0, description="exponents tried for every fold")
    duo_scaling: bool | Literal["both"] = Field(
        default="both", description="divide by the weight's magnitude too; both tries with, without"
    )

    def options(self) -> AWQOptions:
        """The same as the mathematics knows it."""
        return AWQOptions(self.num_scales, self.duo_scaling)


class QuantizeStage(Section):
    """Quantize the linear layers of every decoder block; for GGUF embedding and head as well."""

    kind: Literal["quantize"] = "quantize"
    solver: Literal["rtn", "gptq"] = "gptq"
    scheme: AnyScheme = SchemeSection()
    search: Search | None = Field(
        default=None, description="of a GGUF type's scales; least-squares if not given"
    )
    importance: bool | None = Field(
        default=None,
        description="weigh GGUF types by the mean square of each input; true if not given",
    )
    clip: Clip = "none"
    damping: float = Field(default=0.01, gt=0, le=1, description="of the Hessian's mean diagonal")
    refine_scales: bool = Field(
        default=False, description="fit the group scales to the inputs once the codes are known"
    )
    static_groups: bool = Field(
        default=True, description="all scales fixed before the first column"
    )
    true_sequential: bool = Field(default=True, description="later layers see earlier rounding")
    ignore: tuple[str, ...] = Field(default=(), description="module patterns kept in 16 bit")
    overrides: tuple[Override, ...] = ()

    def scheme_for(self, module: str) -> Scheme | None:
        """The scheme of a linear layer; ``None`` keeps it in 16 bit. The first override wins."""
        section = self._section_for(module)
        assert not isinstance(section, GGMLSection), "the stage gives GGUF types"
        return None if section is None else section.scheme()

    def ggml_type_for(self, module: str) -> str | None:
        """The GGUF type or mixture of a layer; ``None`` keeps it in 16 bit."""
        section = self._section_for(module)
        assert not isinstance(section, SchemeSection), "the stage gives integer schemes"
        return None if section is None else section.type

    def overridden(self, module: str) -> bool:
        """Whether an override decides about a layer that is not ignored."""
        ignored = any(matches(pattern, module) for pattern in self.ignore)
        return not ignored and any(matches(item.match, module) for item in self.overrides)

    def _section_for(self, module: str) -> SchemeSection | GGMLSection | None:
        if any(matches(pattern, module) for pattern in self.ignore):
            return None
        for override in self.overrides:
            if matches(override.match, module):
                return override.scheme
        return self.scheme

    @property
    def is_ggml(self) -> bool:
        """Whether it gives GGUF types."""
        return isinstance(self.scheme, GGMLSection)

    @property
    def found_by(self) -> Search:
        """How scales of GGUF types are found."""
        return self.search or "least-squares"

    @property
    def weighs_inputs(self) -> bool:
        """Whether errors of GGUF types are weighed by importance."""
        return self.is_ggml and self.importance is not False and not self.is_plain

    @property
    def is_plain(self) -> bool:
        """Whether it only changes the element type: F32, F16 or BF16, where nothing is solved."""
        sections = (self.scheme, *(override.scheme for override in self.overrides))
        return all(isinstance(one, GGMLSection) and one.type in PLAIN_TYPES for one in sections)

    @property
    def sees_text(self) -> bool:
        """Whether it goes by statistics of the calibration text."""
        return not self.is_plain and (
            self.solver == "gptq"
            or self.clip == "activation"
            or self.refine_scales
            or self.weighs_inputs
        )

    @field_validator("ignore")
    @classmethod
    def _check_ignore(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_pattern(pattern) for pattern in patterns)

    @model_validator(mode="after")
    def _check_kinds(self) -> QuantizeStage:
        for override in self.overrides:
            if isinstance(override.scheme, GGMLSection) != self.is_ggml:
                raise ValueError(
                    f"the override of {override.match!r} gives "
                    f"{'an integer scheme' if self.is_ggml else 'a GGUF type'} and the stage "
                    f"{'GGUF types' if self.is_ggml else 'integer schemes'}; a model has one kind"
                )
        refused = _refused_of_ggml(self) if self.is_ggml else _refused_of_integers(self)
        if refused:
            raise ValueError("; ".join(f"{key}: {why}" for key, why in refused.items()))
        return self


def _refused_of_ggml(stage: QuantizeStage) -> dict[str, str]:
    """Options that mean nothing for GGUF types, and why."""
    refused = {}
    if stage.clip != "none":
        refused["clip"] = "ggml's blocks find their scales by `search`, which shrinks ranges itself"
    if stage.refine_scales:
        refused["refine_scales"] = "`search: least-squares` fits the scales of GGUF types already"
    if not stage.static_groups:
        refused["static_groups"] = "GGUF types fix the scales of a block before its first column"
    if stage.solver == "rtn" and stage.damping != 0.01:
        refused["damping"] = "rounding has no Hessian to damp; only solver gptq has"
    return refused


def _refused_of_integers(stage: QuantizeStage) -> dict[str, str]:
    refused = {}
    if stage.search is not None:
        refused["search"] = "only GGUF types (scheme: {type: ...}) have it; integers have `clip`"
    if stage.importance is not None:
        refused["importance"] = "only GGUF types (scheme: {type: ...}) have it"
    return refused


STAGES: dict[str, type[Section]] = {"awq": AWQStage, "quantize": QuantizeStage}


def _stage_kind(stage: object) -> str:
    kind = stage.get("kind", "quantize") if isinstance(stage, dict) else getattr(stage, "kind", "")
    return str(kind)


Stage = Annotated[
    Annotated[AWQStage, Tag("awq")] | Annotated[QuantizeStage, Tag("quantize")],
    Discriminator(
        _stage_kind,
        custom_error_type="unknown_stage",
        custom_error_message=f"a stage's kind is one of {', '.join(STAGES)}",
    ),
]


def matches(pattern: str, module: str) -> bool:
    """Whether a module name matches a shell pattern, or a regular expression after ``re:``."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], module) is not None
    return fnmatch.fnmatchcase(module, pattern)
