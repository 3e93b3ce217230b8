"""``llmopt bench quantize``: llmopt, its peers and the floor, on one model, in one run."""

from __future__ import annotations

import hashlib
import platform
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from llmopt.bench.environments import BuildError
from llmopt.bench.evaluating import Evaluator, held_out_blocks
from llmopt.bench.floor import Floor, count_work, measure_matrix_rate, memory_bound_bytes
from llmopt.bench.measuring import RUNNERS, Measurement, Request, RunError, measure
from llmopt.bench.peers import LLMOPT, Method, Quantizer
from llmopt.bench.rows import (
    BenchReport,
    Row,
    Setting,
    Status,
    current_commit,
    machine_name,
    measured_row,
    now,
    write_report,
)
from llmopt.calibration.text import read_documents
from llmopt.calibration.tokenizer import load_tokenizer
from llmopt.calibration.tokens import cut_blocks
from llmopt.checkpoint.durable import storage_errors
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import ModelStructure
from llmopt.errors import BadInputError, ExitCode, LlmoptError
from llmopt.progress import Progress, silent
from llmopt.quantization.scheme import IntBits, Scheme
from llmopt.recipe import Recipe, load_recipe
from llmopt.stages import SchemeSection
from llmopt_evals.errors import EvaluationError

BITS: IntBits = 4
GROUP_SIZE = 128
OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What is measured.

    Attributes:
        model: folder of the source.
        output: the JSON file; must not exist.
        methods: of which plain rounding is llmopt's alone.
        peers: beside llmopt.
        num_samples: calibration blocks.
        length: tokens of each.
        threads: of every quantizer.
        repeats: runs a row.
        held_out_tokens: that quality is measured on, or a block more.
        recipes: of llmopt, beside the ones that stand for a method.
        runners: folder of the quantizers' scripts.
    """

    model: Path
    output: Path
    methods: tuple[Method, ...]
    peers: tuple[Quantizer, ...]
    num_samples: int = 128
    length: int = 512
    threads: int = 2
    repeats: int = 1
    held_out_tokens: int = 65_536
    recipes: tuple[str, ...] = ()
    runners: Path = RUNNERS


@dataclass(frozen=True, slots=True)
class Entry:
    """A row to be: a quantizer, a method, and llmopt's recipe for it."""

    quantizer: Quantizer
    method: Method
    recipe: str | None = None

    @property
    def name(self) -> str:
        """What the row is called."""
        default = self.quantizer.recipes.get(self.method)
        special = self.recipe is not None and self.recipe != default
        return f"{self.quantizer.name} {self.recipe}" if special else self.quantizer.name

    @property
    def scheme(self) -> Scheme:
        """That of llmopt's recipe; of a peer, groups of 128 as its users get them by default."""
        if self.recipe is not None:
            section = load_recipe(self.recipe).quantize.scheme
            assert isinstance(section, SchemeSection), f"{self.recipe} gives GGUF types"
            return section.scheme()
        return Scheme(BITS, GROUP_SIZE, self.quantizer.methods[self.method])


def exit_code(report: BenchReport) -> ExitCode:
    """Whether the table is whole."""
    return exit_code_of(report.rows)


class HasStatus(Protocol):
    """A row of any benchmark."""

    @property
    def status(self) -> Status:
        """Whether it was measured."""
        ...


def exit_code_of(rows: Sequence[HasStatus]) -> ExitCode:
    """Whether all were measured: one that failed fails, one that is unavailable leaves a gap."""
    statuses = {row.status for row in rows}
    if "failed" in statuses:
        return ExitCode.FAIL
    return ExitCode.INCONCLUSIVE if "unavailable" in statuses else ExitCode.PASS


def bench_quantize(options: BenchOptions, progress: Progress = silent) -> BenchReport:
    """Measure every row; the report is on disk after each of them.

    Raises:
        BadInputError: a model that cannot be opened, an output that exists, too little text.
        StorageError: the disk refuses.
    """
    check_output_file(options.output)
    entries = plan_entries(options)
    blocks = held_out_blocks(options.model, options.held_out_tokens)
    tokens = calibration_tokens(options.model, options.num_samples, options.length)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="llmopt-bench-") as scratch:
        evaluator = Evaluator(options.model, blocks, Path(scratch))
        structure = evaluator.structure
        work = count_work(structure, options.num_samples, options.length)
        floor = Floor(work, measure_matrix_rate(options.threads))
        setting = describe_setting(options.model, structure, tokens, blocks, options.threads)
        for index, entry in enumerate(entries):
            progress("rows", index, len(entries))
            rows.append(_row(entry, options, tokens, evaluator, Path(scratch) / str(index)))
            complete = len(rows) == len(entries)
            report = BenchReport(setting, floor, tuple(rows), complete)
            write_report(options.output, report)
        progress("rows", len(entries), len(entries))
    return report


def describe_setting(
    model: Path,
    structure: ModelStructure,
    tokens: torch.Tensor,
    blocks: Sequence[torch.Tensor],
    threads: int,
) -> Setting:
    """What the rows of a benchmark have in common.

    Args:
        model: folder of the source.
        structure: of it.
        tokens: ``(samples, length) int64`` to calibrate on.
        blocks: held-out tokens, each ``(T,) int64``.
        threads: of every quantizer.
    """
    reader = open_checkpoint(model)
    return Setting(
        model=model.resolve().name,
        num_parameters=sum(reader.info(name).num_parameters for name in reader.names),
        num_samples=len(tokens),
        length=tokens.shape[1],
        tokens_sha256=hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        held_out_tokens=sum(map(len, blocks)),
        memory_bound_bytes=memory_bound_bytes(structure, tokens.numel()),
        threads=threads,
        machine=machine_name(),
        python=platform.python_version(),
        commit=current_commit(),
        date=now(),
    )


def plan_entries(options: BenchOptions) -> list[Entry]:
    """The rows to be: plain rounding, then each method by llmopt and by the peers that have it.

    Raises:
        BadInputError: a recipe that is not there, or cannot be read.
    """
    entries: list[Entry] = []
    for method in dict.fromkeys(("rtn", *options.methods)):
        recipes = [LLMOPT.recipes[method]]
        recipes += [name for name in options.recipes if method_of(load_recipe(name)) == method]
        for recipe in dict.fromkeys(recipes):
            load_recipe(recipe)
            entries.append(Entry(LLMOPT, method, recipe))
        entries += [Entry(peer, method) for peer in options.peers if method in peer.methods]
    return entries


def method_of(recipe: Recipe) -> Method:
    """Which peers a recipe stands beside; what GPTQ solves is GPTQ's, scaled before or not."""
    if recipe.quantize.solver == "gptq":
        return "gptq"
    return "rtn" if recipe.awq is None else "awq"


def calibration_tokens(model: Path, num_samples: int, length: int) -> torch.Tensor:
    """``(num_samples, length) int64`` of the built-in text, as llmopt itself would cut them.

    Raises:
        BadInputError: too little text for so many blocks.
    """
    tokenizer = load_tokenizer(model).tokenizer
    documents = read_documents("builtin", split="calibration", tokenizer=tokenizer)
    return cut_blocks(
        documents,
        tokenizer,
        num_samples=num_samples,
        sequence_length=length,
        seed=0,
    ).blocks


def check_output_file(path: Path) -> None:
    """Hold that the report can be written before an hour is spent on it.

    Raises:
        BadInputError: it exists, or its folder does not.
    """
    if path.exists():
        raise BadInputError(f"{path} exists", "name another file, or remove this one")
    if not path.parent.is_dir():
        raise BadInputError(f"{path.parent} is not a directory", "make it, or name another")


def scheme_name(scheme: Scheme) -> str:
    """``W4A16 g128 sym``."""
    group = "channel" if scheme.group_size is None else f"g{scheme.group_size}"
    return f"{scheme.name} {group} {'sym' if scheme.symmetric else 'asym'}"


def _row(
    entry: Entry, options: BenchOptions, tokens: torch.Tensor, evaluator: Evaluator, folder: Path
) -> Row:
    quantizer, method = entry.quantizer, entry.method
    scheme = scheme_name(entry.scheme)
    try:
        python = quantizer.python()
    except BuildError as error:
        return Row(entry.name, method, scheme, "unavailable", reason=str(error))
    try:
        runs = _runs(entry, python, options, tokens, folder)
        quality = evaluator(folder / OUTPUT)
    except (RunError, LlmoptError, EvaluationError) as error:
        return Row(entry.name, method, scheme, "failed", reason=str(error))
    size = sum(file.stat().st_size for file in (folder / OUTPUT).glob("*.safetensors"))
    shutil.rmtree(folder)
    return measured_row(entry.name, method, scheme, runs, size, quality)


def _runs(
    entry: Entry,
    python: Path,
    options: BenchOptions,
    tokens: torch.Tensor,
    folder: Path,
) -> list[Measurement]:
    """One measurement a repeat; the last output stays in ``folder``."""
    scheme = entry.scheme
    request = Request(
        model=str(options.model.resolve()),
        output=str(folder / OUTPUT),
        token_ids=tokens.tolist(),
        method=entry.method,
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        threads=options.threads,
        options={"recipe": entry.recipe} if entry.recipe else {},
    )
    variables = {
        name: value.format(threads=options.threads)
        for name, value in entry.quantizer.variables.items()
    }
    runs = []
    for _ in range(options.repeats):
        with storage_errors(f"cannot prepare {folder}"):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        module = entry.quantizer.module
        runs.append(measure(python, module, request, folder, variables, options.runners))
    return runs
