"""The gate over what is on disk: source, artifact and plain rounding, walked block by block."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.checkpoint.placement import companion_folder
from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.tensor_source import TensorSource
from llmopt.comparison import Comparison, compare, compare_gguf
from llmopt.environment import check_device
from llmopt.errors import EXIT_CODES, BadInputError, BrokenArtifactError, ExitCode, NumericalError
from llmopt.formats.gguf.file import GGUFFile
from llmopt.formats.gguf.record import check_tensor_data, read_verdict
from llmopt.formats.gguf.source import GGUFSource
from llmopt.formats.gguf.tokenizer.foreign import tokenizer_notes
from llmopt.kv_cache.reading import KVCache
from llmopt.kv_cache.settings import KVCacheSettings
from llmopt.progress import Progress, silent
from llmopt.recipe import EvaluationSection, GateSection, Recipe
from llmopt.report.integrity import changed_files
from llmopt.report.json_file import read_json
from llmopt.report.schema import JSON_NAME
from llmopt.rounded import RoundedSource
from llmopt.scoring import WalkerScorer
from llmopt.spilled import SpilledSource
from llmopt.texts import EvaluationText, prepare_evaluation
from llmopt_evals.cache_evidence import check_cache_text, measure_cache_evidence
from llmopt_evals.errors import EvaluationError, NotFiniteError
from llmopt_evals.gate import check_text, run_gate
from llmopt_evals.scorer import Passage, Scorer, Scores
from llmopt_evals.units import HeldOutText

if TYPE_CHECKING:
    from llmopt_evals.judging import PairedTask
    from llmopt_evals.verdict import Verdict

ENGINES = ("llama.cpp",)
"""What can compute a candidate in the place of llmopt's own walk."""

_TOKENS_PER_BATCH = 4096
_NOISE_TOKENS_PER_BATCH = 1024  # another batch shape than the one everything else is scored in


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What ``llmopt eval`` found.

    Attributes:
        verdict: the gate's.
        notes: what a reader must know, for example files changed since the artifact was gated.
        exit_code: as the gate's.
    """

    verdict: Verdict
    notes: tuple[str, ...]
    exit_code: ExitCode


@contextmanager
def one_error_family() -> Iterator[None]:
    """Errors of the evaluation package leave as llmopt's own; decorates what users call.

    Raises:
        BadInputError: in the place of an ``EvaluationError``.
    """
    try:
        yield
    except EvaluationError as error:
        raise BadInputError(error.what, error.remedy) from error


def judge(
    comparison: Comparison,
    text: HeldOutText,
    gate: GateSection,
    scratch: Path,
    *,
    device: str = "cpu",
    through: Scorer | None = None,
    progress: Progress = silent,
) -> Verdict:
    """Run the gate.

    Args:
        comparison: what is judged, beside its source.
        text: held out.
        gate: the criteria.
        scratch: folder for working files.
        device: where blocks compute.
        through: an engine that computes the candidate; its bytes, dequantized, without one.
        progress: told of every step.

    Raises:
        EvaluationError: too little text for the criteria, NaN logits of the source.
        BrokenArtifactError: the candidate computes NaN or infinity.
    """
    # Reading these tables costs what dequantizing, or rounding, them costs.
    artifact = SpilledSource(comparison.candidate, comparison.tables, scratch)

    def scorer(
        source: TensorSource,
        label: str,
        tokens: int = _TOKENS_PER_BATCH,
        cache: KVCache | None = None,
    ) -> WalkerScorer:
        return WalkerScorer(
            comparison.candidate_structure if source is artifact else comparison.structure,
            source,
            scratch,
            device=device,
            tokens_per_batch=tokens,
            kv_cache=cache,
            label=f"score the {label}",
            progress=progress,
        )

    reference = scorer(comparison.reader, "source")
    cache = comparison.kv_cache
    candidate = _Judged(through or scorer(artifact, "artifact", cache=cache))
    baseline: Scorer | None = candidate if comparison.is_plain_rounding else None
    if comparison.schemes and not comparison.is_plain_rounding:
        rounded = RoundedSource(comparison.reader, comparison.schemes)
        structure = comparison.structure
        named = (structure.embed_disk_name, structure.head_disk_name)
        tables = {
            name: partial(rounded.read_rows, name)
            for name in named
            if name is not None and name in comparison.schemes
        }
        # The scheme is that of the cache too.
        baseline = scorer(SpilledSource(rounded, tables, scratch), "plain rounding", cache=cache)
    try:
        of_cache = None
        if cache is not None:
            of_cache = measure_cache_evidence(
                cache.settings.label,
                text,
                context_length=shared_context(comparison),
                reference=reference,
                candidate=candidate,
                sixteen_bit=_Judged(scorer(artifact, "artifact with a 16-bit cache")),
                options=gate.long_context,
                seed=gate.seed,
                progress=progress,
                first_quantized=cache.settings.first_quantized,
            )
        run = run_gate(
            reference,
            candidate,
            text=text,
            criteria=gate.criteria(comparison.bits, None if cache is None else cache.settings),
            baseline=baseline,
            noise=scorer(comparison.reader, "noise floor", _NOISE_TOKENS_PER_BATCH),
            cloze=gate.cloze,
            tasks=_run_tasks(comparison, gate, reference, candidate),
            cache=of_cache,
            seed=gate.seed,
            progress=progress,
        )
    except NotFiniteError as error:
        if error.model != "candidate":
            raise
        raise _broken(error.what) from error
    return run.verdict


def check_gate(
    gate: GateSection,
    bits: int,
    text: HeldOutText,
    cache: KVCacheSettings | None = None,
    context_length: int | None = None,
) -> None:
    """Refuse before the work what the gate would refuse after it.

    Args:
        gate: the criteria.
        bits: whose margins are the starting point.
        text: held out.
        cache: the quantized cache, if there is to be one.
        context_length: the model's.

    Raises:
        EvaluationError: no margins for this width, a task that is unknown or cannot be run here,
            too little text for the cloze items, or for contexts that read a quantized cache.
    """
    criteria = gate.criteria(bits, cache)
    check_text(text, criteria, gate.cloze, gate.seed)
    if cache is not None:
        check_cache_text(text, context_length, gate.long_context, gate.seed, cache.first_quantized)
    check_tasks(gate)


def check_tasks(gate: GateSection) -> None:
    """Refuse a task that is unknown or cannot be run here.

    Raises:
        EvaluationError: says which, and the nearest known one.
    """
    if gate.tasks:
        from llmopt_evals.tasks import find_tasks, own_tasks

        find_tasks(list(gate.tasks), own_tasks())


class _Judged:
    """The candidate: where it computes NaN, the artifact is at fault and not the user's text."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def score(self, sequences: Sequence[Passage]) -> Scores:
        try:
            return self._scorer.score(sequences)
        except NumericalError as error:
            raise _broken(error.what) from error


def _broken(what: str) -> BrokenArtifactError:
    return BrokenArtifactError(
        f"the artifact does not compute: {what}",
        "do not use it; look at its scales and its unquantized tensors",
    )


def scratch_bytes(text: HeldOutText, gate: GateSection, hidden_size: int) -> int:
    """Disk space for the hidden states of one look: two float32 files a scorer, three scorers."""
    tokens = sum(len(block) for unit in text.units for block in unit.blocks)
    branches = gate.cloze.num_choices * gate.cloze.continuation_tokens
    tokens += gate.cloze.num_items * (gate.cloze.context_tokens + branches)
    return 3 * 2 * tokens * hidden_size * 4


@one_error_family()
def evaluate(
    artifact: Path | str,
    against: Path | str,
    *,
    recipe: Recipe | None = None,
    text: str | Sequence[str] | None = None,
    device: str = "cpu",
    engine: str | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Judge a model on disk against the one it came from.

    Args:
        artifact: folder of a quantized model, or of an unquantized one of the same architecture;
            or a GGUF file.
        against: folder of the source.
        recipe: criteria and evaluation sources; the defaults for the bit width without one.
        text: evaluation sources in place of the recipe's.
        device: where blocks compute.
        engine: ``llama.cpp`` computes a GGUF file as it is served; without a word its tensors are
            dequantized and computed as the source's are.
        progress: told of every step.

    Raises:
        LlmoptError: a folder that cannot be opened, or models that cannot be compared.
        BrokenArtifactError: the model computes NaN or infinity.
    """
    check_device(device)
    gate = recipe.gate if recipe else GateSection()
    sources = text or (recipe.evaluation if recipe else EvaluationSection()).sources
    path, source = Path(artifact), open_checkpoint(Path(against))
    is_file = path.is_file()
    _check_engine(engine, path)
    comparison = compare_gguf(path, source) if is_file else compare(open_checkpoint(path), source)
    held_out = prepare_evaluation(
        [sources] if isinstance(sources, str) else sources,
        comparison.tokenizer,
        context_length=shared_context(comparison),
    )
    notes = (_file_notes if is_file else _integrity_notes)(path, held_out)
    if is_file:
        size = comparison.candidate_structure.vocabulary_size
        notes += tokenizer_notes(GGUFFile(path).metadata, source.path, size)
    with ExitStack() as open_until_judged:
        scratch = open_until_judged.enter_context(
            tempfile.TemporaryDirectory(prefix="llmopt-eval-")
        )
        through = None
        if engine is not None:
            from llmopt.serving.llama_cpp_scorer import llama_cpp_scorer

            through = open_until_judged.enter_context(llama_cpp_scorer(path, progress=progress))
            notes = (*notes, f"computed by {engine}, which rounds activations too")
        verdict = judge(
            comparison,
            held_out.text,
            gate,
            Path(scratch),
            device=device,
            through=through,
            progress=progress,
        )
    return Evaluation(verdict, notes, EXIT_CODES[verdict.outcome])


def _check_engine(engine: str | None, path: Path) -> None:
    if engine is None:
        return
    if engine not in ENGINES:
        raise BadInputError(f"unknown engine {engine!r}", f"choose one of {', '.join(ENGINES)}")
    if not path.is_file():
        raise BadInputError(
            f"{engine} computes a GGUF file, and {path} is none", "give a .gguf file"
        )


def shared_context(comparison: Comparison) -> int | None:
    """Tokens within which both compute what they were made for."""
    structures = (comparison.structure, comparison.candidate_structure)
    lengths = [s.context_length for s in structures if s.context_length is not None]
    return min(lengths, default=None)


def _integrity_notes(artifact: Path, held_out: EvaluationText) -> tuple[str, ...]:
    file = artifact / JSON_NAME
    if not file.is_file():
        return ("no llmopt.json: this model was not gated by llmopt before",)
    report = read_json(file)
    changed = tuple(
        f"changed since it was gated: {line}" for line in changed_files(artifact, report)
    )
    if held_out.sha256 != report.evaluation.sha256:
        return (*changed, "measured on another text than when it was gated")
    return changed


def _file_notes(file: Path, held_out: EvaluationText) -> tuple[str, ...]:
    """What a reader must know of a GGUF file: its hash, its verdict, the text it was gated on."""
    try:
        verdict = read_verdict(GGUFSource(file).file)
        if verdict is None:
            return ("no verdict inside: this file was not gated by llmopt before",)
        check_tensor_data(file)
    except BadInputError as error:
        return (error.what,)
    notes = () if verdict.get("outcome") == "pass" else (f"its own verdict is {verdict}",)
    report = companion_folder(file) / JSON_NAME
    if not report.is_file():
        return (*notes, f"its report {report} is not there")
    if read_json(report).evaluation.sha256 != held_out.sha256:
        return (*notes, "measured on another text than when it was gated")
    return notes


def _run_tasks(
    comparison: Comparison,
    gate: GateSection,
    reference: Scorer,
    candidate: Scorer,
) -> list[PairedTask]:
    if not gate.tasks:
        return []
    from llmopt_evals.tasks import own_tasks, run_tasks

    return run_tasks(
        list(gate.tasks), reference, candidate, comparison.tokenizer, include_path=own_tasks()
    )
