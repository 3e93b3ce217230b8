"""A checkpoint directory: shards, config and companions, as transformers and vLLM open them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

from pydantic import JsonValue, TypeAdapter

from llmopt.cache_scales import CacheScales, find_scales
from llmopt.calibration.forwards import BlockForwards
from llmopt.checkpoint.artifact import Artifact
from llmopt.checkpoint.companions import Companions, copy_companions, plan_companions
from llmopt.checkpoint.ledger import Fate, Ledger
from llmopt.checkpoint.placement import FOLDER, Placement
from llmopt.checkpoint.reader import CheckpointReader, open_checkpoint
from llmopt.checkpoint.scan import tensor_digest
from llmopt.checkpoint.shards import write_index
from llmopt.checkpoint.structure import ModelStructure
from llmopt.comparison import Comparison, compare, margin_bits
from llmopt.contract import Contract, draw_contract
from llmopt.errors import Outcome
from llmopt.formats.kv_cache import CONFIG_KEY, cache_scheme, own_section
from llmopt.naming import config_names, ignored_names
from llmopt.progress import Progress
from llmopt.recipe import Recipe
from llmopt.report.integrity import hash_files
from llmopt.report.schema import FileHash, GGUFFileRecord, RoundTrip, Sizes
from llmopt.rounding import round_block, round_seen_block
from llmopt.roundtrip import check_round_trip
from llmopt.scaling import BlockScaling, scale_block
from llmopt.solving import SolvedLinear, solve_block
from llmopt.targets.base import CompressedPart, Seen, solved_digests
from llmopt.writing import Part, assemble_part, plan_parts, write_config


class CheckpointTarget:
    """See :class:`llmopt.targets.base.Target`.

    Args:
        reader: the source.
        structure: of it.
        recipe: with integer schemes.
        device: where blocks compute.
    """

    placement: Placement = FOLDER
    given_sha256 = ""

    def __init__(
        self, reader: CheckpointReader, structure: ModelStructure, recipe: Recipe, device: str
    ) -> None:
        self._reader = reader
        self._structure = structure
        self._recipe = recipe
        self._device = device
        self.contract: Contract = draw_contract(reader, structure, recipe)
        self.parts = plan_parts(reader, structure)

    @cached_property
    def bits(self) -> int:
        """The width that most of the quantized parameters have."""
        weights = self._structure.skeleton.get_parameter
        return margin_bits(
            (scheme.bits, weights(f"{name}.weight").numel())
            for name, scheme in self.contract.schemes.items()
        )

    @property
    def context_length(self) -> int | None:
        """The source's."""
        return self._structure.context_length

    @property
    def num_bytes(self) -> int:
        """Weights and companions."""
        reader = self._reader
        weights = sum(reader.info(name).num_bytes for name in reader.names)
        for name, scheme in self.contract.schemes.items():
            info = reader.info(self._structure.disk_name(f"{name}.weight"))
            rows, columns = info.shape
            bits = self.contract.form.bits_per_weight(scheme, (rows, columns), info.dtype)
            weights += int(info.num_parameters * bits / 8) - info.num_bytes
        return weights + plan_companions(reader.path).num_bytes

    def compress(self, part: Part, seen: Seen | None) -> CompressedPart:
        """Quantize the linear layers of a block; copy what lies outside the blocks."""
        solved: list[SolvedLinear] = []
        scaling = BlockScaling()
        if part.block is not None and seen is None:
            solved = round_block(
                self._structure,
                self._reader,
                part.block,
                self._recipe.quantize,
                self.contract.schemes,
                self._device,
            )
        elif part.block is not None and seen is not None:
            assert seen.forwards is not None
            solved, scaling = self._solve(seen.forwards)
            if self._recipe.cache_scales:
                return self._lay_out(part, solved, scaling, self._cache_scales(seen.forwards))
        return self._lay_out(part, solved, scaling)

    def _cache_scales(self, forwards: BlockForwards) -> CacheScales:
        # In the model's own type, as transformers loads them into parameters of it.
        dtype = self._reader.info(self._structure.embed_disk_name).dtype
        return find_scales(forwards, dtype)

    def _solve(self, forwards: BlockForwards) -> tuple[list[SolvedLinear], BlockScaling]:
        scaling = self._scale(forwards)
        solve = round_seen_block
        if self._recipe.quantize.solver == "gptq":
            solve = solve_block
            scaling.statistics.clear()  # it gathers its own; two sets need not fit in memory
        solved = solve(
            forwards,
            self._recipe.quantize,
            self.contract.schemes,
            self._recipe.calibration.min_expert_tokens,
            scaling,
        )
        scaling.statistics.clear()
        return solved, scaling

    def _scale(self, forwards: BlockForwards) -> BlockScaling:
        if self._recipe.awq is None:
            return BlockScaling()
        return scale_block(
            forwards,
            self._recipe.awq.options(),
            self.contract.schemes,
            self._recipe.calibration.min_expert_tokens,
        )

    def _lay_out(
        self,
        part: Part,
        solved: list[SolvedLinear],
        scaling: BlockScaling,
        cache: CacheScales | None = None,
    ) -> CompressedPart:
        scaled = {self._structure.disk_name(name): v for name, v in scaling.tensors.items()}
        form = self.contract.form
        written = assemble_part(part, self._reader, self._structure, form, solved, scaled)
        added = {} if cache is None else dict(cache.tensors)
        own = scaled | added
        digests: dict[str, JsonValue] = {k: tensor_digest(v.cpu()) for k, v in own.items()}
        return CompressedPart(
            tensors=written.tensors | added,
            digests={linear.module: linear.tensor.digest() for linear in solved},
            entries=written.entries + (() if cache is None else cache.entries),
            layers=tuple(linear.record for linear in solved),
            payload={
                "scales": [record.model_dump(mode="json") for record in scaling.records],
                "declined": [fold.model_dump(mode="json") for fold in scaling.declined],
                "cache_scales": [] if cache is None else [cache.record.model_dump(mode="json")],
                "written": digests,
            },
        )

    def finish(self, artifact: Artifact, progress: Progress) -> Companions:
        """Index, config, companions."""
        write_index(artifact.directory, [entry.shard for entry in artifact.journal.blocks])
        structure, form = self._structure, self.contract.form
        schemes = config_names(structure, self.contract.schemes)
        kept = self.contract.kept
        ignored = ignored_names(self._reader, structure, kept, patterns=form.takes_patterns)
        section = form.config(schemes, ignored)
        config = dict(self._reader.config)
        if (cache := self._recipe.quantized_cache) is not None:
            config[CONFIG_KEY] = own_section(cache)
            if cache.has_static_scales:
                section["kv_cache_scheme"] = cache_scheme()
        write_config(artifact.directory, config, form, section)
        return copy_companions(self._reader.path, artifact.directory)

    def read_back(
        self, artifact: Artifact, source_digests: Mapping[str, str], progress: Progress
    ) -> RoundTrip:
        """Codes of packed weights; the bytes of all others."""
        entries = artifact.journal.blocks
        solved = solved_digests(entries)
        schemes = {
            self._structure.disk_module(name): scheme
            for name, scheme in self.contract.schemes.items()
        }
        quantized = {f"{module}.weight" for module in solved}
        written = {name for entry in entries for name in entry.shard.names}
        kept = {
            name: digest
            for name, digest in source_digests.items()
            if name in written and name not in quantized
        }
        own = TypeAdapter(dict[str, str])
        for entry in entries:  # their bytes are not, or no longer, the source's
            kept |= own.validate_python(entry.payload["written"])
        return check_round_trip(artifact.directory, solved, schemes, kept, progress)

    def open_candidate(self, artifact: Artifact) -> Comparison:
        """The staged folder; nothing that was in memory while quantizing is used."""
        comparison = compare(open_checkpoint(artifact.directory), self._reader)
        return replace(comparison, is_plain_rounding=self._recipe.is_plain_rounding)

    def seal(self, artifact: Artifact, outcome: Outcome) -> None:
        """Nothing: the verdict lies in the report."""

    def sizes(self, artifact: Artifact, ledger: Ledger) -> Sizes:
        """Of the shards; bits per weight are over what was quantized, scales in."""
        reader, summary = self._reader, ledger.summary()
        source_bytes = sum(reader.info(name).num_bytes for name in reader.names)
        files = artifact.directory.glob("*.safetensors")
        artifact_bytes = sum(file.stat().st_size for file in files)
        quantized = summary[Fate.QUANTIZED]
        kept_bytes = source_bytes - quantized.num_bytes - summary[Fate.TIED].num_bytes
        return Sizes(
            source_bytes=source_bytes,
            artifact_bytes=artifact_bytes,
            ratio=artifact_bytes / source_bytes,
            bits_per_weight=8 * (artifact_bytes - kept_bytes) / quantized.num_parameters,
        )

    def files(self, artifact: Artifact) -> dict[str, FileHash]:
        """Of the folder."""
        return hash_files(artifact.directory)

    def describe(self, artifact: Artifact) -> GGUFFileRecord | None:
        """A directory has no such record."""
        return None
