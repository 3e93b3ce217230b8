"""One GGUF file and its folder of reports, as llama.cpp opens it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import yaml
from pydantic import JsonValue
from torch import Tensor

from llmopt.checkpoint.artifact import Artifact
from llmopt.checkpoint.companions import Companions, copy_companions, plan_companions
from llmopt.checkpoint.durable import write_bytes
from llmopt.checkpoint.journal import file_sha256
from llmopt.checkpoint.ledger import Fate, Ledger, LedgerEntry
from llmopt.checkpoint.placement import SINGLE_FILE, Placement
from llmopt.checkpoint.reader import CheckpointReader, MappedFile
from llmopt.checkpoint.structure import ModelStructure
from llmopt.comparison import UNQUANTIZED_BITS, Comparison, compare_gguf, margin_bits
from llmopt.errors import BadInputError, Outcome
from llmopt.formats.gguf.architectures.plan import PlannedTensor
from llmopt.formats.gguf.file import GGUFFile
from llmopt.formats.gguf.mixtures import QUANTIZATION_VERSION
from llmopt.formats.gguf.record import TENSOR_DATA_KEY, set_verdict
from llmopt.formats.gguf.values import TypedValue, string, uint32
from llmopt.formats.gguf.writer import TensorEntry, write_gguf
from llmopt.progress import Progress
from llmopt.quantization.ggml.packing import pack_blocks, pack_plain, unpack_plain
from llmopt.quantization.ggml.tensor import digest_values
from llmopt.recipe import Recipe
from llmopt.report.integrity import hash_files
from llmopt.report.schema import (
    FileHash,
    GGUFFileRecord,
    GGUFTensorRecord,
    RoundTrip,
    Sizes,
)
from llmopt.roundtrip import check_gguf_round_trip
from llmopt.targets.base import CompressedPart, Seen, solved_digests
from llmopt.targets.gguf.contract import GGUFContract, draw_gguf_contract
from llmopt.targets.gguf.naming import model_name
from llmopt.targets.gguf.planning import GGUFPlan, Matrix, matrices_of
from llmopt.targets.gguf.solving import (
    SolvedMatrix,
    Weighing,
    head_statistics,
    round_matrices,
    round_seen_block,
    solve_block,
)
from llmopt.writing import Part, plan_parts

RECIPE_NAME = "recipe.yaml"


class GGUFTarget:
    """See :class:`llmopt.targets.base.Target`.

    Args:
        reader: the source.
        structure: of it.
        recipe: with GGUF types.
        device: where blocks compute.
    """

    placement: Placement = SINGLE_FILE

    def __init__(
        self, reader: CheckpointReader, structure: ModelStructure, recipe: Recipe, device: str
    ) -> None:
        self._reader = reader
        self._structure = structure
        self._recipe = recipe
        self._device = device
        self.contract: GGUFContract = draw_gguf_contract(reader, structure, recipe)
        self.parts = plan_parts(reader, structure)

    @property
    def plan(self) -> GGUFPlan:
        """Of the file; there is one once the contract holds."""
        assert self.contract.plan is not None, "the contract does not hold"
        return self.contract.plan

    @cached_property
    def bits(self) -> int:
        """The width that most of the quantized parameters have."""
        sizes = [
            (self.plan.types[t.gguf_name].type.bits, _num_elements(t)) for t in self.plan.quantized
        ]
        return margin_bits(sizes) if sizes else UNQUANTIZED_BITS

    @property
    def context_length(self) -> int | None:
        """What the file says: shorter than the source's where llama.cpp has no sliding window."""
        file = self.plan.file
        value = file.metadata[f"{file.architecture}.context_length"].value
        assert isinstance(value, int)
        return value

    @cached_property
    def given_sha256(self) -> str:
        """Of the importance matrix that the recipe names."""
        given = self._recipe.calibration.imatrix
        return "" if given is None else file_sha256(Path(given))

    @property
    def num_bytes(self) -> int:
        """Shards and file, which lie side by side; companions; tables dequantized for judging."""
        plan = self.plan
        file = sum(self._entry(tensor).num_bytes for tensor in plan.file.tensors)
        tables = sum(_num_elements(t) for t in plan.quantized if not t.gguf_name.startswith("blk."))
        companions = plan_companions(self._reader.path).num_bytes
        return 2 * file + companions + 2 * 4 * tables

    def compress(self, part: Part, seen: Seen | None) -> CompressedPart:
        """Quantize the matrices of a part; what stays plain goes as it is, vectors as float32."""
        planned = self._planned(part)
        linears = self._linears(part.block)
        matrices = list(matrices_of(self.plan, planned, linears))
        solved = {item.matrix: item for item in self._solve(part, matrices, seen)}
        by_name = {matrix.name: item for matrix, item in solved.items()}
        tensors: dict[str, Tensor] = {}
        digests: dict[str, str] = {}
        for tensor in planned:
            mine = [solved[matrix] for matrix in matrices if matrix.gguf_name == tensor.gguf_name]
            if mine:
                tensors[tensor.gguf_name] = tensor.assemble(
                    [pack_blocks(item.tensor).cpu() for item in mine]
                )
                digests[tensor.gguf_name] = digest_values(item.tensor for item in mine)
            else:
                tensors[tensor.gguf_name] = self._pack_plain(tensor)
                digests[tensor.gguf_name] = digest_values(self._stored_values(tensor))
        return CompressedPart(
            tensors=tensors,
            digests=digests,
            entries=tuple(self._ledger_entry(name, by_name) for name in part.names),
            layers=tuple(item.record for item in solved.values()),
            payload={"weighed": list(_weighed(solved.values()))},
        )

    def _solve(
        self, part: Part, matrices: list[Matrix], seen: Seen | None
    ) -> Sequence[SolvedMatrix]:
        stage = self._recipe.quantize
        shapes = {tensor.gguf_name: tensor.shape for tensor in self.plan.file.tensors}
        weighing = Weighing(stage.weighs_inputs, self.contract.imatrix, shapes)
        if seen is not None and part.block is not None:
            assert seen.forwards is not None
            solve = solve_block if stage.solver == "gptq" else round_seen_block
            return solve(
                seen.forwards,
                matrices,
                stage,
                weighing,
                self._recipe.calibration.min_expert_tokens,
            )
        statistics = {}
        head = self._head_name
        if seen is not None and weighing.wanted and any(m.name == head for m in matrices):
            statistics = {head: head_statistics(seen.walker, seen.inputs)}
        return list(
            round_matrices(
                self._reader, matrices, stage, weighing, part.block, self._device, statistics
            )
        )

    @property
    def _head_name(self) -> str:
        """The tensor that the head's matrix is read from."""
        structure = self._structure
        name = structure.embed_disk_name if structure.tied_head else structure.head_disk_name
        assert name is not None
        return name

    def _planned(self, part: Part) -> tuple[PlannedTensor, ...]:
        """The file's tensors that are made of a part; constants go with the last part."""
        names = set(part.names)
        return tuple(
            tensor
            for tensor in self.plan.file.tensors
            if (tensor.sources[0] in names if tensor.sources else part == self.parts[-1])
        )

    def _linears(self, block: int | None) -> dict[str, str]:
        """A block's linear layers: tensor in the checkpoint -> module in the block."""
        if block is None:
            return {}
        structure = self._structure
        prefix = structure.block_prefix(block)
        return {
            structure.disk_name(f"{prefix}.{linear}.weight"): linear
            for linear in structure.linear_names(block)
        }

    def _pack_plain(self, tensor: PlannedTensor) -> Tensor:
        kind = self.plan.types[tensor.gguf_name].type
        values = tensor.assemble([self._reader.read(name) for name in tensor.sources])
        return pack_plain(values, kind)

    def _stored_values(self, tensor: PlannedTensor) -> Iterator[Tensor]:
        """What a plain tensor stores, its rows in the checkpoint's order."""
        kind = self.plan.types[tensor.gguf_name].type
        in_order = replace(tensor, transform=replace(tensor.transform, heads=None, stacked=False))
        for name in tensor.sources or (None,):
            values = in_order.assemble([] if name is None else [self._reader.read(name)])
            yield unpack_plain(pack_plain(values, kind), kind)

    def _ledger_entry(self, name: str, solved: Mapping[str, SolvedMatrix]) -> LedgerEntry:
        info = self._reader.info(name)
        fate, reason = self._fate(name, solved)
        return LedgerEntry(
            name=name,
            fate=fate,
            reason=reason,
            num_bytes=info.num_bytes,
            num_parameters=info.num_parameters,
        )

    def _fate(self, name: str, solved: Mapping[str, SolvedMatrix]) -> tuple[Fate, str]:
        if name in solved:
            item = solved[name]
            how = ", by importance" if item.weighed else ""
            return Fate.QUANTIZED, f"{item.record.scheme.name} by {item.record.solver}{how}"
        for dropped in self.plan.file.dropped:
            if dropped.name == name:
                tied = name == self._structure.head_disk_name
                return Fate.TIED if tied else Fate.DROPPED, dropped.reason
        tensor = next(t for t in self.plan.file.tensors if name in t.sources)
        return Fate.COPIED, f"as {self.plan.types[tensor.gguf_name].type.name}"

    def _entry(self, tensor: PlannedTensor) -> TensorEntry:
        kind = self.plan.types[tensor.gguf_name].type
        return TensorEntry(tensor.gguf_name, kind, tensor.shape)

    def finish(self, artifact: Artifact, progress: Progress) -> Companions:
        """Gather the shards into the file; put companions and recipe into the folder."""
        places = {
            name: MappedFile(artifact.shards / entry.shard.file)
            for entry in artifact.journal.blocks
            for name in entry.shard.names
        }
        entries = [self._entry(tensor) for tensor in self.plan.file.tensors]
        done = iter(range(len(entries)))

        def packed(entry: TensorEntry) -> Tensor:
            progress("assemble", next(done), len(entries))
            return places[entry.name].read(entry.name)

        architecture = self.plan.file.architecture
        name = model_name(self._reader.path, self._reader.config)
        write_gguf(artifact.file, architecture, self._metadata(name), entries, packed)
        progress("assemble", len(entries), len(entries))
        recipe = yaml.safe_dump(self._recipe.model_dump(mode="json"), sort_keys=False)
        companions = copy_companions(self._reader.path, artifact.directory)
        write_bytes(artifact.directory / RECIPE_NAME, recipe.encode())
        return companions

    def _metadata(self, name: str) -> dict[str, TypedValue]:
        plan = self.plan
        return {
            "general.name": string(name),
            **plan.file.metadata,
            "general.file_type": uint32(plan.mixture.file_type),
            "general.quantization_version": uint32(QUANTIZATION_VERSION),
            **plan.tokenizer.values,
        }

    def read_back(
        self, artifact: Artifact, source_digests: Mapping[str, str], progress: Progress
    ) -> RoundTrip:
        """Every tensor's values, by the ``gguf`` package."""
        return check_gguf_round_trip(
            artifact.file, solved_digests(artifact.journal.blocks), progress
        )

    def open_candidate(self, artifact: Artifact) -> Comparison:
        """The staged file, dequantized."""
        comparison = compare_gguf(artifact.file, self._reader)
        return replace(comparison, is_plain_rounding=self._recipe.is_plain_rounding)

    def seal(self, artifact: Artifact, outcome: Outcome) -> None:
        """The verdict stands in the file's metadata, in a place of fixed length."""
        verdict: dict[str, JsonValue] = {"outcome": outcome, "recipe": self._recipe.name[:200]}
        try:
            set_verdict(artifact.file, verdict)
        except BadInputError:
            # A file that broke may not even have the place; its name and its report say enough.
            if outcome != "fail":
                raise

    def sizes(self, artifact: Artifact, ledger: Ledger) -> Sizes:
        """Of the file, metadata and tokenizer included; bits are over what is in blocks."""
        reader = self._reader
        source_bytes = sum(reader.info(name).num_bytes for name in reader.names)
        file_bytes = artifact.file.stat().st_size
        entries = [self._entry(tensor) for tensor in self.plan.quantized]
        parameters = sum(_num_elements(tensor) for tensor in self.plan.quantized)
        bits = 8 * sum(entry.num_bytes for entry in entries) / parameters if parameters else 0.0
        return Sizes(
            source_bytes=source_bytes,
            artifact_bytes=file_bytes,
            ratio=file_bytes / source_bytes,
            bits_per_weight=bits,
        )

    def files(self, artifact: Artifact) -> dict[str, FileHash]:
        """Of the folder, and the file itself."""
        file = artifact.file
        whole = FileHash(sha256=file_sha256(file), num_bytes=file.stat().st_size)
        return {file.name: whole, **hash_files(artifact.directory)}

    def describe(self, artifact: Artifact) -> GGUFFileRecord:
        """Types by tensor, fallbacks, importance, tokenizer, hash."""
        plan, file = self.plan, GGUFFile(artifact.file)
        weighed = {
            name for entry in artifact.journal.blocks for name in _strings(entry.payload["weighed"])
        }
        pre = file.metadata.get("tokenizer.ggml.pre")
        return GGUFFileRecord(
            file=artifact.output.name,
            num_bytes=file.num_bytes,
            architecture=plan.file.architecture,
            mixture=plan.asked,
            tokenizer=str(file.metadata["tokenizer.ggml.model"]),
            pre_tokenizer=None if pre is None else str(pre),
            importance=self._importance_label(),
            imatrix_sha256=self.given_sha256 or None,
            tensor_sha256=str(file.metadata[TENSOR_DATA_KEY]),
            notes=(*plan.file.notes, *plan.tokenizer.notes),
            tensors=tuple(
                GGUFTensorRecord(
                    name=tensor.gguf_name,
                    type=chosen.type.name,
                    wanted=chosen.wanted.name if chosen.is_fallback else None,
                    num_bytes=self._entry(tensor).num_bytes,
                    weighed=tensor.gguf_name in weighed,
                )
                for tensor in plan.file.tensors
                for chosen in [plan.types[tensor.gguf_name]]
            ),
        )

    def _importance_label(self) -> str:
        if not self._recipe.quantize.weighs_inputs:
            return "none"
        given = self._recipe.calibration.imatrix
        return "calibration" if given is None else Path(given).name


def _weighed(solved: Iterable[SolvedMatrix]) -> dict[str, None]:
    """The file's tensors that importance weighed, each once."""
    return dict.fromkeys(item.matrix.gguf_name for item in solved if item.weighed)


def _num_elements(tensor: PlannedTensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count


def _strings(value: object) -> list[str]:
    assert isinstance(value, list)
    return [str(item) for item in value]
