"""What every quantizer of GGUF files starts from: a file, an importance matrix, second moments.

All statistics are of the unquantized model, so that every row weighs errors alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmopt.calibration.block_pass import advance, collect
from llmopt.calibration.hidden_states import HiddenStatePair
from llmopt.calibration.statistics import InputStatistics
from llmopt.calibration.walker import BlockWalker, calibration_walker
from llmopt.checkpoint.durable import storage_errors, write_bytes
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import read_structure
from llmopt.formats.gguf.architectures import FilePlan, plan_file
from llmopt.formats.gguf.imatrix import ImportanceEntry, ImportanceMatrix, write_imatrix
from llmopt.formats.gguf.mixtures import MIXTURES, QUANTIZATION_VERSION, Mixture
from llmopt.formats.gguf.values import TypedValue, string, uint32
from llmopt.formats.gguf.writer import TensorEntry, write_gguf
from llmopt.imatrix import head_name, importance_entries
from llmopt.job import calibration_batches
from llmopt.progress import Progress, silent
from llmopt.quantization.ggml.packing import pack_plain
from llmopt.quantization.ggml.types import GGML_TYPES
from llmopt.targets.gguf.solving import head_statistics

INDEX = "index.json"
_KEY = "hessian"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What quantizers share.

    Attributes:
        plan: of the file.
        source: the file itself, F32, without a tokenizer.
        imatrix: an importance matrix for every matrix of a block and for the head.
        hessians: folder for :class:`StoredHessians`.
    """

    plan: FilePlan
    source: Path
    imatrix: Path
    hessians: Path

    @property
    def matrices(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of all tensors of the file."""
        return [(tensor.gguf_name, tensor.shape) for tensor in self.plan.tensors]

    @property
    def num_f32_bytes(self) -> int:
        """Of the matrices in float32: what rates are of."""
        shapes = [tensor.shape for tensor in self.plan.tensors if tensor.is_matrix]
        return sum(torch.Size(shape).numel() for shape in shapes) * torch.float32.itemsize


def prepare_source(
    model: Path, tokens: Tensor, folder: Path, progress: Progress = silent
) -> Prepared:
    """Write the file and walk the model over the calibration tokens.

    Args:
        model: folder of the checkpoint.
        tokens: ``(samples, length) int64``.
        folder: to write into.
        progress: told of every block.

    Raises:
        BadInputError: a model that llama.cpp has no equivalent for.
        NumericalError: NaN or infinity in an input.
        StorageError: the disk refuses.
    """
    reader = open_checkpoint(model)
    structure = read_structure(reader)
    plan = plan_file(structure, reader.config)
    found = Prepared(plan, folder / "source.gguf", folder / "imatrix.gguf", folder / "hessians")
    planned = {tensor.gguf_name: tensor for tensor in plan.tensors}

    def packed(entry: TensorEntry) -> Tensor:
        parts = [reader.read(name).float() for name in planned[entry.name].sources]
        return pack_plain(planned[entry.name].assemble(parts), entry.type)

    entries = [TensorEntry(name, GGML_TYPES["F32"], shape) for name, shape in found.matrices]
    metadata = file_metadata(plan, MIXTURES["F32"])
    write_gguf(found.source, plan.architecture, metadata, entries, packed)
    with storage_errors(f"cannot make {found.hessians}"):
        found.hessians.mkdir()
    walker = calibration_walker(structure, reader, "cpu")
    importance = _walk(walker, plan, tokens, found.hessians, progress)
    samples, length = tokens.shape
    write_imatrix(found.imatrix, ImportanceMatrix(importance, ("builtin",), samples, length))
    return found


def file_metadata(plan: FilePlan, mixture: Mixture) -> dict[str, TypedValue]:
    """A file's values; there is no tokenizer among them, which no quantizer looks at."""
    return {
        "general.name": string("benchmark"),
        **plan.metadata,
        "general.file_type": uint32(mixture.file_type),
        "general.quantization_version": uint32(QUANTIZATION_VERSION),
    }


class StoredHessians:
    """Second moments of inputs by tensor of the file.

    Args:
        folder: of :class:`Prepared`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._index: Mapping[str, list[str | None]] = json.loads(
            (folder / INDEX).read_text("utf-8")
        )

    def of(self, name: str) -> Sequence[Tensor | None]:
        """``(in, in) float32`` for each matrix of a tensor; none where no token was seen."""
        return [None if file is None else self._read(file) for file in self._index.get(name, [])]

    def _read(self, file: str) -> Tensor:
        with safe_open(self._folder / file, framework="pt") as tensors:
            hessian: Tensor = tensors.get_tensor(_KEY)
        return hessian


@dataclass(frozen=True, slots=True)
class _Energy:
    """What is kept of a group's statistics; see :class:`llmopt.imatrix.InputEnergy`."""

    energy: Tensor
    num_tokens: int


def _walk(
    walker: BlockWalker, plan: FilePlan, tokens: Tensor, folder: Path, progress: Progress
) -> dict[str, ImportanceEntry]:
    """Entries of the importance matrix; second moments go to ``folder``, one file a group."""
    structure = walker.structure
    batches = calibration_batches(tokens)
    shapes = [batch.shape for batch in batches]
    states = HiddenStatePair.create(folder, shapes, structure.hidden_size, walker.dtype)
    walker.start(batches, states.inputs(0))
    energies: dict[str, _Energy] = {}
    files: dict[str, str | None] = {}
    for block in range(structure.num_blocks):
        progress("statistics", block, structure.num_blocks)
        inputs, outputs = states.inputs(block), states.outputs(block)
        with walker.materialise(block) as module:
            seen = collect(walker, block, module, inputs, structure.input_groups(block))
            for place, (group, statistics) in enumerate(seen.items()):
                file = _store(statistics, folder, f"block-{block}-{place}.safetensors")
                energy = _Energy(statistics.energy.clone(), statistics.num_tokens)
                for linear in group:
                    name = structure.disk_name(f"{structure.block_prefix(block)}.{linear}.weight")
                    energies[name], files[name] = energy, file
            advance(walker, block, module, inputs, outputs)
    progress("statistics", structure.num_blocks, structure.num_blocks)
    head = head_statistics(walker, states.inputs(structure.num_blocks))
    energies[head_name(structure)] = _Energy(head.energy, head.num_tokens)
    index = {
        tensor.gguf_name: [files[name] for name in tensor.sources]
        for tensor in plan.tensors
        if tensor.is_matrix and files.keys() >= set(tensor.sources)
    }
    write_bytes(folder / INDEX, json.dumps(index).encode())
    return importance_entries(plan, energies)


def _store(statistics: InputStatistics, folder: Path, file: str) -> str | None:
    """Write a group's second moments; none where no token was seen."""
    if not statistics.num_tokens:
        return None
    with storage_errors(f"cannot write {folder / file}"):
        save_file({_KEY: statistics.hessian.contiguous()}, folder / file)
    return file
