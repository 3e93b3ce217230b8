"""``llmopt bench decode``: llmopt's engine, its settings, its peers and the floor, in one run."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from llmopt.bench.decode.agreement import Agreement, compare
from llmopt.bench.decode.break_even import sentences
from llmopt.bench.decode.engines import LLAMA_CPP, Entry
from llmopt.bench.decode.measuring import Answer, DecodeRequest, Heard, ask
from llmopt.bench.decode.models import (
    ModelFiles,
    gguf_files,
    model_label,
    plain_files,
    quantized_files,
)
from llmopt.bench.decode.page import write_decode_page
from llmopt.bench.decode.rows import DecodeReport, DecodeRow, DecodeSetting, write_decode_json
from llmopt.bench.decode.table import decode_markdown
from llmopt.bench.decode.timing import summarise
from llmopt.bench.decode.traffic import CacheShape, cache_shape, measure_bandwidth
from llmopt.bench.decode.workloads import CHECK, MIXED, Workload, plan_workloads, token_stream
from llmopt.bench.environments import BuildError
from llmopt.bench.growth import LABEL
from llmopt.bench.measuring import RUNNERS, RunError
from llmopt.bench.rows import Status, current_commit, machine_name, now
from llmopt.checkpoint.artifact import check_output
from llmopt.checkpoint.durable import storage_errors, write_bytes
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.structure import ModelStructure, read_structure
from llmopt.errors import BadInputError, LlmoptError
from llmopt.progress import Progress, silent

JSON_NAME, MARKDOWN_NAME, PAGE_NAME = "decode.json", "decode.md", "decode.html"


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """What is measured.

    Attributes:
        model: folder of a checkpoint in 16 bit.
        output: folder for the reports; absent or empty.
        entries: who decodes.
        batches: numbers of requests.
        contexts: tokens of a prompt.
        new_tokens: that each request of a batch wants.
        repeats: runs that count.
        threads: of every engine.
        dtype: of activations and 16-bit weights, as torch calls it.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        recipe: that gives the INT4 weights.
        timeout_s: after which an engine's process is ended; none waits.
        runners: folder of the engines' scripts.
    """

    model: Path
    output: Path
    entries: tuple[Entry, ...]
    batches: tuple[int, ...] = (1, 4, 16)
    contexts: tuple[int, ...] = (128, 1024)
    new_tokens: int = 64
    repeats: int = 3
    threads: int = 2
    dtype: str = "bfloat16"
    device: str = "cpu"
    recipe: str = "int4-rtn"
    timeout_s: float | None = None
    runners: Path = RUNNERS


def bench_decode(options: DecodeOptions, progress: Progress = silent) -> DecodeReport:
    """Measure every row; the reports are on disk after each engine.

    Raises:
        BadInputError: a model that cannot be opened, a context longer than its own, a taken output.
        StorageError: the disk refuses.
    """
    check_output(options.output)
    reader = open_checkpoint(options.model)
    structure = read_structure(reader)
    longest = _check_contexts(options, structure)
    workloads = plan_workloads(
        token_stream(options.model),
        options.batches,
        options.contexts,
        options.new_tokens,
        options.repeats,
        longest,
    )
    with storage_errors(f"cannot make {options.output}"):
        options.output.mkdir(parents=True, exist_ok=True)
    setting = DecodeSetting(
        model=model_label(options.model),
        num_parameters=sum(reader.info(name).num_parameters for name in reader.names),
        is_grown=LABEL in reader.config,
        dtype=options.dtype,
        new_tokens=options.new_tokens,
        device=options.device,
        machine=_machine(torch.device(options.device)),
        threads=options.threads,
        bandwidth=measure_bandwidth(options.threads, options.device),
        python=platform.python_version(),
        commit=current_commit(),
        date=now(),
    )
    rows: list[DecodeRow] = []
    with tempfile.TemporaryDirectory(prefix=".models-", dir=options.output) as scratch:
        run = _Run(options, setting, structure, workloads, Path(scratch), progress)
        for index, entry in enumerate(options.entries):
            progress("engines", index, len(options.entries))
            rows += run.rows(entry)
            complete = index + 1 == len(options.entries)
            report = DecodeReport(setting, tuple(rows), complete)
            write_decode_reports(options.output, report)
        progress("engines", len(options.entries), len(options.entries))
    return report


def write_decode_reports(folder: Path, report: DecodeReport) -> None:
    """JSON, Markdown and HTML.

    Raises:
        StorageError: if the disk refuses.
    """
    write_decode_json(folder / JSON_NAME, report, sentences(report))
    write_bytes(folder / MARKDOWN_NAME, decode_markdown(report).encode())
    write_decode_page(folder / PAGE_NAME, report)


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else machine_name()


def _check_contexts(options: DecodeOptions, structure: ModelStructure) -> int | None:
    """The model's context, if it has one; every request must fit into it."""
    own = structure.context_length
    needed = max(options.contexts) + options.new_tokens
    if own is None or own >= needed:
        return own
    raise BadInputError(
        f"a context of {max(options.contexts):,} and {options.new_tokens} new tokens are more than "
        f"the {own:,} that the model was made for",
        "choose shorter contexts, or --grown, which allows longer ones",
    )


@dataclass(slots=True)
class _Run:
    """What is made once and used by many rows."""

    options: DecodeOptions
    setting: DecodeSetting
    structure: ModelStructure
    workloads: Sequence[Workload]
    scratch: Path
    progress: Progress
    files: dict[str, ModelFiles] = field(default_factory=dict)
    references: dict[str, Answer] = field(default_factory=dict)

    @property
    def device_kind(self) -> str:
        return torch.device(self.options.device).type

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.options.dtype)
        return found

    def shape(self, entry: Entry) -> CacheShape:
        # llama.cpp's plain cache is of F16, whatever the others compute in.
        plain_bytes = 2 if entry.engine == LLAMA_CPP else self.dtype.itemsize
        return cache_shape(self.structure.text_config, plain_bytes)

    def rows(self, entry: Entry) -> list[DecodeRow]:
        """Those of an engine, one for each of its workloads but the check."""
        asked = [workload for workload in self.workloads if entry.runs(workload.name)]
        wanted = [workload for workload in asked if workload.name != CHECK]
        try:
            python = entry.python()
            entry.check_device(python, self.device_kind)
        except BuildError as error:
            return [self._row(entry, load, "unavailable", str(error)) for load in wanted]
        try:
            files = self._files_of(entry.weights)
            request = self._request(entry, files, asked)
            with storage_errors(f"cannot work in {self.scratch}"):
                folder = Path(tempfile.mkdtemp(dir=self.scratch))
            heard = ask(
                python,
                entry.module,
                request,
                folder,
                self.options.runners,
                self.options.timeout_s,
            )
        except (RunError, LlmoptError) as error:
            return [self._row(entry, load, "failed", str(error)) for load in wanted]
        agreement = self._agreement(entry, heard)
        return [self._measured(entry, load, heard, files, agreement) for load in wanted]

    def _files_of(self, weights: str) -> ModelFiles:
        if weights not in self.files:
            model = self.options.model
            if weights == "16-bit":
                made = plain_files(model, self.dtype)
            elif weights == "int4":
                folder = self.scratch / "int4"
                made = quantized_files(
                    model, self.options.recipe, folder, self.dtype, self.progress
                )
            else:
                made = gguf_files(model, weights, self.scratch / f"{weights}.gguf")
            self.files[weights] = made
        return self.files[weights]

    def _request(self, entry: Entry, files: ModelFiles, asked: Sequence[Workload]) -> DecodeRequest:
        options = self.options
        return DecodeRequest(
            model=str(files.path.resolve()),
            is_packed=files.is_packed,
            kv=entry.kv,
            variant=entry.variant,
            dtype=options.dtype,
            device=options.device,
            threads=options.threads,
            vocabulary=self.structure.vocabulary_size,
            max_context=max(load.longest for load in asked),
            max_sequences=max(load.batch for load in asked),
            kv_bytes=max(
                int(load.batch * self.shape(entry).read_bytes("16-bit", load.longest))
                for load in asked
            ),
            workloads=tuple(asked),
            options=entry.options,
        )

    def _agreement(self, entry: Entry, heard: Heard) -> Agreement | None:
        answer = heard.answers.get(CHECK)
        if answer is None or answer.error:
            return None
        if entry.reference is None:
            # The reference itself, or an engine whose weights nobody else has.
            if entry.engine == "transformers":
                self.references[entry.weights] = answer
            return None
        reference = self.references.get(entry.reference)
        if reference is None:
            return None
        return compare(answer.tokens, reference.tokens, reference.gaps, reference.noise)

    def _measured(
        self,
        entry: Entry,
        load: Workload,
        heard: Heard,
        files: ModelFiles,
        agreement: Agreement | None,
    ) -> DecodeRow:
        error = heard.error(load.name)
        if error or heard.opened is None:
            return self._row(entry, load, "failed", error)
        if agreement is not None and agreement.is_beyond_noise and entry.owes_tokens:
            reason = (
                f"its tokens are not the reference's: {agreement}, and another batch shape moves a "
                f"lead by {agreement.noise:.3f} at most"
            )
            return replace(self._row(entry, load, "failed", reason), agreement=agreement)
        answer = heard.answers[load.name]
        step_bytes = floor = None
        if load.name != MIXED:
            cached = load.batch * self.shape(entry).read_bytes(entry.kv, load.mean_context)
            step_bytes = files.read_bytes + cached
            floor = load.batch * self.setting.bandwidth.bytes_per_s / step_bytes
        return replace(
            self._row(entry, load, "measured"),
            repeats=len(answer.times_s),
            timing=summarise(answer.times_s, whole=load.name == MIXED),
            # A GPU's counter knows nothing of the interpreter.
            peak_bytes=answer.peak_bytes
            - (heard.opened.own_rss_bytes if self.device_kind == "cpu" else 0),
            step_bytes=step_bytes,
            floor_tokens_per_s=floor,
            agreement=agreement,
            versions=heard.opened.versions,
            notes=tuple(heard.opened.notes),
        )

    def _row(self, entry: Entry, load: Workload, status: Status, reason: str = "") -> DecodeRow:
        setting = self.setting
        return DecodeRow(
            engine=entry.engine,
            variant=entry.variant,
            weights=entry.weights,
            kv=entry.kv,
            workload=load.name,
            batch=load.batch,
            context=None if load.name == MIXED else len(load.prompts[0]),
            status=status,
            model=setting.model,
            is_grown=setting.is_grown,
            machine=setting.machine,
            commit=setting.commit,
            reason=reason,
        )
