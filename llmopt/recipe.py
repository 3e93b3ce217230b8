"""What the user asks for: ordered stages, an output format, evaluation text and a gate.

A recipe is data only. It is read from a YAML file (the project's own stand in ``recipes/``),
validated before anything else happens, and written into the report as it was understood.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from llmopt.errors import BadInputError
from llmopt.quantization.awq import AWQOptions
from llmopt.quantization.grid import Clip
from llmopt.quantization.scheme import ActivationOrder, IntBits, Scheme
from llmopt_evals.cloze import ClozeOptions
from llmopt_evals.criteria import Criteria, Criterion, Metric, RelativeCriterion, default_criteria

RECIPE_FOLDERS = (
    Path(__file__).parent / "_recipes",  # an installed wheel
    Path(__file__).parent.parent / "recipes",  # a checkout
)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SchemeSection(_Section):
    """What a weight becomes; see :class:`llmopt.quantization.scheme.Scheme`."""

    bits: IntBits = 4
    group_size: int | None = Field(default=128, gt=0)
    symmetric: bool = True
    activation_order: ActivationOrder = "none"

    def scheme(self) -> Scheme:
        """The same as the mathematics knows it."""
        return Scheme(**self.model_dump())


def _pattern(pattern: str) -> str:
    if not pattern.removeprefix("re:").strip():
        raise ValueError("the pattern is empty")
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern


class Override(_Section):
    """Another scheme for the linear layers whose module name matches.

    ``match`` is a shell pattern (``*.down_proj``), or a regular expression after ``re:``.
    """

    match: str
    scheme: SchemeSection

    @field_validator("match")
    @classmethod
    def _check_match(cls, pattern: str) -> str:
        return _pattern(pattern)


class AWQStage(_Section):
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


class QuantizeStage(_Section):
    """Quantize the linear layers of every decoder block."""

    kind: Literal["quantize"] = "quantize"
    solver: Literal["rtn", "gptq"] = "gptq"
    scheme: SchemeSection = SchemeSection()
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
        if any(matches(pattern, module) for pattern in self.ignore):
            return None
        for override in self.overrides:
            if matches(override.match, module):
                return override.scheme.scheme()
        return self.scheme.scheme()

    @property
    def sees_text(self) -> bool:
        """Whether it goes by statistics of the calibration text."""
        return self.solver == "gptq" or self.clip == "activation" or self.refine_scales

    @field_validator("ignore")
    @classmethod
    def _check_ignore(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_pattern(pattern) for pattern in patterns)


_STAGES: dict[str, type[_Section]] = {"awq": AWQStage, "quantize": QuantizeStage}


def _stage_kind(stage: object) -> str:
    kind = stage.get("kind", "quantize") if isinstance(stage, dict) else getattr(stage, "kind", "")
    return str(kind)


Stage = Annotated[
    Annotated[AWQStage, Tag("awq")] | Annotated[QuantizeStage, Tag("quantize")],
    Discriminator(
        _stage_kind,
        custom_error_type="unknown_stage",
        custom_error_message=f"a stage's kind is one of {', '.join(_STAGES)}",
    ),
]


class CalibrationSection(_Section):
    """Text that the solver's statistics come from."""

    source: str = Field(default="builtin", description="builtin, a file, or a data set's name")
    num_samples: int = Field(default=128, gt=0)
    sequence_length: int = Field(default=512, ge=16)
    min_expert_tokens: int = Field(
        default=32, ge=1, description="an expert that fewer tokens are routed to ends the run"
    )
    seed: int = 0


class EvaluationSection(_Section):
    """Held-out text that the gate measures on; the user's own held-out part always joins."""

    sources: tuple[str, ...] = ("builtin",)
    own_text_share: float = Field(default=0.2, gt=0, lt=1, description="of the calibration text")


class OutputSection(_Section):
    """The format on disk and who must be able to open it."""

    format: str = "compressed-tensors"
    checkpoint_format: Literal["gptq", "gptq_v2"] | None = Field(
        default=None, description="of format gptq: how zero points are stored; gptq if not given"
    )
    consumers: tuple[str, ...] = ("transformers", "vllm", "vllm-cpu")
    tensor_parallel_size: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _check_checkpoint_format(self) -> OutputSection:
        if self.checkpoint_format is not None and self.format != "gptq":
            raise ValueError(f"format {self.format} has no checkpoint_format; only gptq has")
        return self


class GateSection(_Section):
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

    def criteria(self, bits: int) -> Criteria:
        """The criteria for a model most of whose quantized parameters have ``bits`` bits.

        Raises:
            EvaluationError: no margins are fixed for this width.
        """
        fixed = default_criteria(bits)
        changed = [
            criterion.model_copy(
                update={"margin": self.margins.get(criterion.metric, criterion.margin)}
            )
            for criterion in fixed.criteria
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


class Recipe(_Section):
    """One job: stages, output, calibration, evaluation, gate."""

    name: str
    description: str = ""
    stages: tuple[Stage, ...]
    calibration: CalibrationSection = CalibrationSection()
    evaluation: EvaluationSection = EvaluationSection()
    output: OutputSection = OutputSection()
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
    def calibrates(self) -> bool:
        """Whether any stage goes by statistics of the calibration text."""
        return self.awq is not None or self.quantize.sees_text

    @property
    def is_plain_rounding(self) -> bool:
        """Whether it is what calibrated recipes are measured against."""
        stage = self.quantize
        return not self.calibrates and stage.solver == "rtn" and stage.clip == "none"

    def sha256(self) -> str:
        """Content hash of the recipe as it was understood, defaults included."""
        data = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(data.encode()).hexdigest()


def matches(pattern: str, module: str) -> bool:
    """Whether a module name matches a shell pattern, or a regular expression after ``re:``."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], module) is not None
    return fnmatch.fnmatchcase(module, pattern)


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
    shown = [str(part) for part, kind in zip(parts, is_kind, strict=False) if not kind]
    location = ".".join(shown)
    if fault["type"] != "extra_forbidden":
        words = fault["msg"].removeprefix("Value error, ")
        return f"{location}: {words} (got {fault['input']!r})"
    known = list(_section_at(fault["loc"][:-1]).model_fields)
    return f"unknown key {location!r}{_nearest(str(fault['loc'][-1]), known)}"


def _section_at(location: Sequence[int | str]) -> type[BaseModel]:
    section: type[BaseModel] = Recipe
    for part in location:
        if section is Recipe and part in _STAGES:
            section = _STAGES[str(part)]
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
