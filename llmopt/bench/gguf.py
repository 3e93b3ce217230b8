"""``llmopt bench gguf``: GGUF files by llama.cpp's quantizer and by ours, judged alike.

All rows of a type start from one F32 file and one importance matrix, give every tensor the same
type, and are read back from their bytes by one decoder.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llmopt.bench.environments import BuildError
from llmopt.bench.evaluating import Evaluator, held_out_blocks
from llmopt.bench.gguf_source import Prepared, prepare_source
from llmopt.bench.measuring import RUNNERS, FileRequest, Measurement, RunError, measure
from llmopt.bench.peers import Quantizer
from llmopt.bench.quantize import calibration_tokens, check_output_file, describe_setting
from llmopt.bench.rows import SCHEMA_VERSION, Row, Setting, Spread, measured_row, spread
from llmopt.checkpoint.durable import storage_errors, write_bytes
from llmopt.errors import BadInputError, LlmoptError
from llmopt.formats.gguf.file import GGUFFile
from llmopt.formats.gguf.imatrix import read_imatrix
from llmopt.formats.gguf.mixtures import ChosenType, Mixture, tensor_types
from llmopt.formats.gguf.source import GGUFSource
from llmopt.progress import Progress, silent
from llmopt.quantization.ggml.nearest import is_nearest
from llmopt.quantization.ggml.packing import unpack_blocks
from llmopt.quantization.ggml.types import GGML_TYPES, fitting_type
from llmopt.targets.gguf.planning import find_kind
from llmopt_evals.errors import EvaluationError

DEFAULT_TYPES = ("Q3_K_M", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "IQ4_XS")
LLMOPT_METHODS = ("nearest", "compatible", "least-squares", "gptq")
NEAREST = "nearest"
"""Without importance, where no scale is searched then: uncut blocks. Q8_0 is never searched."""

LLAMA_CPP = Quantizer("llama.cpp", "run_llama_cpp", {}, environment="llama-cpp")
LLMOPT_GGUF = Quantizer("llmopt", "run_llmopt_gguf", {})
ENTRIES: tuple[tuple[Quantizer, str], ...] = (
    (LLAMA_CPP, "imatrix"),
    *((LLMOPT_GGUF, method) for method in LLMOPT_METHODS),
)
"""The rows of each type: who, and how."""


@dataclass(frozen=True, slots=True)
class FileKind:
    """What a name on the command line stands for.

    Attributes:
        name: a mixture's, or an element type's that is no mixture's.
        mixture: what kind of file it is.
        pure: whether every matrix gets the mixture's base type.
    """

    name: str
    mixture: Mixture
    pure: bool

    def has_row(self, method: str) -> bool:
        """Whether a method is one of its own for the type that most matrices get."""
        base = GGML_TYPES[self.mixture.base]
        return method != NEAREST or (is_nearest(base, None) and base.name != "Q8_0")

    def types(self, prepared: Prepared) -> dict[str, ChosenType]:
        """The type of every tensor, with an importance matrix, by llama.cpp's rules."""
        found = tensor_types(
            self.mixture, prepared.plan.facts, prepared.matrices, has_importance=True
        )
        if not self.pure:
            return found
        base, shapes = GGML_TYPES[self.mixture.base], dict(prepared.matrices)
        return {
            name: chosen
            if chosen.wanted.is_plain
            else ChosenType(fitting_type(base, shapes[name][-1]), base)
            for name, chosen in found.items()
        }


@dataclass(frozen=True, slots=True)
class GGUFOptions:
    """What is measured.

    Attributes:
        model: folder of the source.
        output: the JSON file; must not exist.
        kinds: of files.
        num_samples: calibration blocks.
        length: tokens of each.
        threads: of every quantizer.
        repeats: runs a row.
        held_out_tokens: that quality is measured on, or a block more.
        entries: the rows of each kind.
        runners: folder of the quantizers' scripts.
    """

    model: Path
    output: Path
    kinds: tuple[FileKind, ...]
    num_samples: int = 128
    length: int = 512
    threads: int = 2
    repeats: int = 1
    held_out_tokens: int = 65_536
    entries: tuple[tuple[Quantizer, str], ...] = ENTRIES
    runners: Path = RUNNERS


@dataclass(frozen=True, slots=True)
class GGUFRow:
    """One file.

    Attributes:
        run: who made it how, time, memory, size and quality; ``scheme`` is the type.
        rate: MB of float32 matrices a second of ``quantize_s``.
        weighted_error: over matrices with importance, the mean of
            ``sqrt(sum_j h_j (w - q)_j^2 / sum_j h_j w_j^2)``, h the importance.
        num_fallbacks: tensors whose rows the wanted type does not divide, stored in another.
    """

    run: Row
    rate: Spread | None = None
    weighted_error: float | None = None
    num_fallbacks: int | None = None


@dataclass(frozen=True, slots=True)
class GGUFReport:
    """The rows of one run."""

    setting: Setting
    f32_bytes: int
    rows: tuple[GGUFRow, ...]
    complete: bool


def find_file_kind(name: str) -> FileKind:
    """What a mixture's or an element type's name stands for; a mixture goes first.

    Raises:
        BadInputError: neither (names the closest), or nothing that is quantized.
    """
    mixture, pure = find_kind(name)
    if GGML_TYPES[mixture.base].is_plain:
        raise BadInputError(
            f"{name} is not quantized: every row would be the same",
            f"choose among {', '.join(DEFAULT_TYPES)}",
        )
    return FileKind(name, mixture, pure is not None)


def bench_gguf(options: GGUFOptions, progress: Progress = silent) -> GGUFReport:
    """Measure every row; the report is on disk after each of them.

    Raises:
        BadInputError: a model that cannot be opened, or that llama.cpp has no equivalent for; an
            output that exists; too little text.
        StorageError: the disk refuses.
    """
    check_output_file(options.output)
    tokens = calibration_tokens(options.model, options.num_samples, options.length)
    rows: list[GGUFRow] = []
    with tempfile.TemporaryDirectory(prefix="llmopt-bench-") as scratch:
        folder = Path(scratch)
        prepared = prepare_source(options.model, tokens, folder, progress)
        blocks = held_out_blocks(options.model, options.held_out_tokens)
        evaluator = Evaluator(options.model, blocks, folder)
        setting = describe_setting(
            options.model, evaluator.structure, tokens, blocks, options.threads
        )
        planned = [
            (kind, quantizer, method)
            for kind in options.kinds
            for quantizer, method in options.entries
            if kind.has_row(method)
        ]
        for index, (kind, quantizer, method) in enumerate(planned):
            progress("rows", index, len(planned))
            run = _Run(kind, quantizer, method, options, prepared, folder / str(index))
            rows.append(run.row(evaluator))
            complete = len(rows) == len(planned)
            report = GGUFReport(setting, prepared.num_f32_bytes, tuple(rows), complete)
            write_gguf_report(options.output, report)
        progress("rows", len(planned), len(planned))
    return report


def write_gguf_report(path: Path, report: GGUFReport) -> None:
    """Write the JSON file, whole or not at all.

    Raises:
        StorageError: if the disk refuses.
    """
    data = {"version": SCHEMA_VERSION, **asdict(report)}
    write_bytes(path, (json.dumps(data, indent=1) + "\n").encode())


def weighted_error(prepared: Prepared, output: GGUFFile) -> float:
    """See :class:`GGUFRow`; 0 where nothing that has importance is in blocks."""
    source, matrix = GGUFFile(prepared.source), read_imatrix(prepared.imatrix)
    errors: list[float] = []
    for name in matrix.entries:
        info = output.info(name)
        importance = matrix.importance(name, info.shape)
        if info.type.is_plain or importance is None:
            continue
        columns = info.shape[-1]
        importance = importance.reshape(-1, 1, columns)
        rows = output.data(name).reshape(-1, info.row_bytes)
        found = unpack_blocks(rows, info.type, columns).dequantize()
        wanted = source.data(name).view(torch.float32).reshape(len(importance), -1, columns)
        lost = (importance * (found.view_as(wanted) - wanted).square()).sum(dim=(1, 2))
        whole = (importance * wanted.square()).sum(dim=(1, 2))
        errors += (lost / whole.clamp(min=torch.finfo(torch.float32).tiny)).sqrt().tolist()
    return statistics.fmean(errors) if errors else 0.0


@dataclass(frozen=True, slots=True)
class _Run:
    """A row to be, and where its files lie."""

    kind: FileKind
    quantizer: Quantizer
    method: str
    options: GGUFOptions
    prepared: Prepared
    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "output.gguf"

    def row(self, evaluator: Evaluator) -> GGUFRow:
        head = self.quantizer.name, self.method, self.kind.name
        try:
            python = self.quantizer.python()
        except BuildError as error:
            return GGUFRow(Row(*head, "unavailable", reason=str(error)))
        types = self.kind.types(self.prepared)
        try:
            runs = self._measure(python, types)
            source = GGUFSource(self.output)
            _check_types(source.file, types)
            quality = evaluator.measure(source, self.output.name)
            found = weighted_error(self.prepared, source.file)
        except (RunError, LlmoptError, EvaluationError) as error:
            return GGUFRow(Row(*head, "failed", reason=str(error)))
        run = measured_row(*head, runs, self.output.stat().st_size, quality)
        megabytes = self.prepared.num_f32_bytes / 1e6
        rate = spread([megabytes / run.response.quantize_s for run in runs])
        with storage_errors(f"cannot remove {self.folder}"):
            shutil.rmtree(self.folder)
        return GGUFRow(run, rate, found, sum(chosen.is_fallback for chosen in types.values()))

    def _measure(self, python: Path, types: dict[str, ChosenType]) -> Sequence[Measurement]:
        """One measurement a repeat; the last output stays."""
        options, prepared = self.options, self.prepared
        request = FileRequest(
            model=str(options.model.resolve()),
            source=str(prepared.source),
            imatrix=str(prepared.imatrix),
            hessians=str(prepared.hessians),
            output=str(self.output),
            file_type=self.kind.mixture.file_type,
            pure=self.kind.pure,
            types={name: chosen.type.name for name, chosen in types.items()},
            method=self.method,
            threads=options.threads,
        )
        runs = []
        for _ in range(options.repeats):
            with storage_errors(f"cannot prepare {self.folder}"):
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
            module, variables = self.quantizer.module, self.quantizer.variables
            runs.append(measure(python, module, request, self.folder, variables, options.runners))
        return runs


def _check_types(file: GGUFFile, types: dict[str, ChosenType]) -> None:
    """Hold that what is compared has the same types.

    Raises:
        RunError: a tensor is of another type than llama.cpp's rules say, or is not there.
    """
    found = {name: file.info(name).type.name for name in file.names}
    wanted = {name: chosen.type.name for name, chosen in types.items()}
    odd = sorted(name for name in found.keys() | wanted if found.get(name) != wanted.get(name))
    if odd:
        raise RunError(f"{odd[0]} is {found.get(odd[0])}, not {wanted.get(odd[0])}")
