"""Which element type each tensor of a file gets, by the recipe and by llama.cpp's rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

import torch

from llmopt.checkpoint.structure import ModelStructure
from llmopt.checkpoint.tensor_source import TensorSource
from llmopt.errors import BadInputError
from llmopt.formats.gguf.architectures.plan import FilePlan, PlannedTensor
from llmopt.formats.gguf.mixtures import MIXTURES, ChosenType, Mixture, tensor_types
from llmopt.formats.gguf.tokenizer import TokenizerMetadata
from llmopt.quantization.ggml.types import GGML_TYPES, GGMLType, fitting_type
from llmopt.stages import GGMLSection, QuantizeStage

_PLAIN_OF = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class GGUFPlan:
    """A file that can be written.

    Attributes:
        file: its metadata and tensors.
        mixture: what kind of file llama.cpp takes it for.
        types: of every tensor, by its name in the file.
        tokenizer: its metadata.
        asked: the type or mixture, as the recipe names it.
    """

    file: FilePlan
    mixture: Mixture
    types: Mapping[str, ChosenType]
    tokenizer: TokenizerMetadata
    asked: str

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Tensors whose rows the wanted type does not divide, a sentence's part each."""
        return tuple(
            f"{tensor.gguf_name} {chosen.type.name} instead of {chosen.wanted.name}"
            for tensor in self.file.tensors
            if (chosen := self.types[tensor.gguf_name]).is_fallback
        )

    @property
    def quantized(self) -> tuple[PlannedTensor, ...]:
        """The tensors that are stored in blocks."""
        return tuple(t for t in self.file.tensors if not self.types[t.gguf_name].type.is_plain)


@dataclass(frozen=True, slots=True)
class Matrix:
    """One source matrix on its way into a file.

    Attributes:
        gguf_name: of the tensor that it becomes, or becomes a part of.
        part: which of that tensor's sources it is: the expert.
        name: its tensor in the checkpoint.
        linear: its module in the decoder block; ``None`` outside the blocks.
        chosen: how it is stored.
    """

    gguf_name: str
    part: int
    name: str
    linear: str | None
    chosen: ChosenType

    @property
    def module(self) -> str:
        """The name of its module in the checkpoint."""
        return self.name.removesuffix(".weight")


def matrices_of(
    plan: GGUFPlan, tensors: tuple[PlannedTensor, ...], linears: Mapping[str, str]
) -> Iterator[Matrix]:
    """The source matrices of those among ``tensors`` that are stored in blocks.

    Args:
        plan: of the file.
        tensors: some of the file's.
        linears: of one block: tensor in the checkpoint -> module in the block.
    """
    for tensor in tensors:
        chosen = plan.types[tensor.gguf_name]
        if chosen.type.is_plain:
            continue
        for part, name in enumerate(tensor.sources):
            yield Matrix(tensor.gguf_name, part, name, linears.get(name), chosen)


def find_kind(name: str) -> tuple[Mixture, GGMLType | None]:
    """What a stage's type means: a kind of file, and, of a bare type, that type for everything.

    Raises:
        BadInputError: neither; names the closest.
    """
    if name in MIXTURES:
        return MIXTURES[name], None
    if name in GGML_TYPES:
        same = (mixture for mixture in MIXTURES.values() if mixture.base == name)
        return next(same), GGML_TYPES[name]
    known = [*MIXTURES, *(kind for kind in GGML_TYPES if kind not in MIXTURES)]
    close = get_close_matches(name.upper(), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise BadInputError(
        f"{name!r} is no GGUF type that llmopt writes", f"{hint}the types are {', '.join(known)}"
    )


def choose_types(
    file: FilePlan,
    stage: QuantizeStage,
    source: TensorSource,
    structure: ModelStructure,
) -> dict[str, ChosenType]:
    """The type of every tensor: the mixture's, unless an override or ``ignore`` says otherwise.

    Args:
        file: what it will hold.
        stage: of the recipe.
        source: the checkpoint; what is ignored keeps its element type.
        structure: of it.

    Raises:
        BadInputError: an unknown type; a mixture where one type is wanted; experts that share a
            tensor and are given different types.
    """
    assert isinstance(stage.scheme, GGMLSection)
    mixture, pure = find_kind(stage.scheme.type)
    shapes = [(tensor.gguf_name, tensor.shape) for tensor in file.tensors]
    types = tensor_types(mixture, file.facts, shapes, has_importance=stage.weighs_inputs)
    modules = _modules_of(structure)
    # What stays float32 even there: vectors and routers.
    fixed = tensor_types(MIXTURES["Q8_0"], file.facts, shapes, has_importance=False)
    for tensor in file.tensors:
        if fixed[tensor.gguf_name].wanted.name == "F32":
            continue
        if pure is not None:
            types[tensor.gguf_name] = _fitting(pure, tensor)
        given = {_given(stage, modules[name], source.info(name).dtype) for name in tensor.sources}
        if len(given) > 1:
            named = ", ".join(sorted("the mixture's" if one is None else one.name for one in given))
            raise BadInputError(
                f"the experts of {tensor.gguf_name} are one tensor in a GGUF file, and the recipe "
                f"gives them several types: {named}",
                "let the pattern match all experts of a block (`*.experts.*.down_proj`)",
            )
        for kind in given - {None}:
            assert kind is not None
            types[tensor.gguf_name] = _fitting(kind, tensor)
    return types


def _fitting(kind: GGMLType, tensor: PlannedTensor) -> ChosenType:
    return ChosenType(fitting_type(kind, tensor.shape[-1]), kind)


def _modules_of(structure: ModelStructure) -> dict[str, tuple[str, ...]]:
    """The modules that each tensor of the checkpoint is the weight of.

    An embedding that serves as head goes by both names.
    """
    modules: dict[str, tuple[str, ...]] = {
        disk: (memory.removesuffix(".weight"),) for memory, disk in structure.disk_names.items()
    }
    if structure.tied_head:
        anatomy = structure.anatomy
        modules[structure.embed_disk_name] = (anatomy.embedding, anatomy.head)
    return modules


def _given(stage: QuantizeStage, modules: tuple[str, ...], dtype: torch.dtype) -> GGMLType | None:
    """What the recipe says of one source tensor; ``None`` leaves it to the mixture."""
    assert isinstance(stage.scheme, GGMLSection)
    asked = [stage.ggml_type_for(module) for module in modules]
    if None in asked:
        return GGML_TYPES[_PLAIN_OF[dtype]]
    overridden = [
        name for name, module in zip(asked, modules, strict=True) if stage.overridden(module)
    ]
    if not overridden:
        return None
    return _single_type(overridden[0])


def _single_type(asked: str | None) -> GGMLType:
    assert asked is not None
    if asked not in GGML_TYPES:
        find_kind(asked)  # says so if nobody knows it
        raise BadInputError(
            f"an override gives a layer one type, and {asked} is a mixture of several",
            f"the types are {', '.join(GGML_TYPES)}",
        )
    return GGML_TYPES[asked]
