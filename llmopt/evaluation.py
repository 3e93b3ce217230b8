"""The gate over what is on disk: source, artifact and plain rounding, walked block by block."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmopt.calibration.tokenizer import PROBE_TEXT, encode, load_tokenizer
from llmopt.checkpoint.reader import CheckpointReader, open_checkpoint
from llmopt.checkpoint.structure import ModelStructure, read_structure
from llmopt.checkpoint.tensor_source import TensorSource
from llmopt.environment import check_device
from llmopt.errors import (
    EXIT_CODES,
    BadInputError,
    BrokenArtifactError,
    ExitCode,
    NumericalError,
)
from llmopt.formats.config_file import quantization_config
from llmopt.formats.dequantized import DequantizedSource
from llmopt.progress import Progress, silent
from llmopt.quantization.scheme import Scheme
from llmopt.recipe import EvaluationSection, GateSection, Recipe
from llmopt.report.integrity import changed_files
from llmopt.report.json_file import read_json
from llmopt.report.schema import JSON_NAME
from llmopt.rounded import RoundedSource
from llmopt.scoring import WalkerScorer
from llmopt.texts import EvaluationText, prepare_evaluation
from llmopt_evals.errors import EvaluationError, NotFiniteError
from llmopt_evals.gate import check_text, run_gate
from llmopt_evals.scorer import Passage, Scorer, Scores
from llmopt_evals.units import HeldOutText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmopt_evals.judging import PairedTask
    from llmopt_evals.verdict import Verdict

_TOKENS_PER_BATCH = 4096
UNQUANTIZED_BITS = 8  # an unquantized candidate is held to the strictest margins there are
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


@dataclass(frozen=True, slots=True)
class Comparison:
    """A candidate on disk and all that judging it needs.

    Attributes:
        reader: the source checkpoint.
        structure: of the source.
        candidate: the candidate's weights under the source's names.
        candidate_structure: of the candidate, from its own ``config.json``.
        schemes: by the source's tensor names; none if the candidate is not quantized.
        is_plain_rounding: whether the candidate is its own yardstick of the relative criterion.
        bits: the width that most of the quantized parameters have; it decides the margins.
        tokenizer: the source's.
    """

    reader: CheckpointReader
    structure: ModelStructure
    candidate: TensorSource
    candidate_structure: ModelStructure
    schemes: Mapping[str, Scheme]
    is_plain_rounding: bool
    bits: int
    tokenizer: PreTrainedTokenizerBase


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
    progress: Progress = silent,
) -> Verdict:
    """Run the gate.

    Raises:
        EvaluationError: too little text for the criteria, NaN logits of the source.
        BrokenArtifactError: the candidate computes NaN or infinity.
    """

    def scorer(source: TensorSource, label: str, tokens: int = _TOKENS_PER_BATCH) -> WalkerScorer:
        own = source is comparison.candidate
        return WalkerScorer(
            comparison.candidate_structure if own else comparison.structure,
            source,
            scratch,
            device=device,
            tokens_per_batch=tokens,
            label=f"score the {label}",
            progress=progress,
        )

    reference = scorer(comparison.reader, "source")
    candidate = _Judged(scorer(comparison.candidate, "artifact"))
    baseline: Scorer | None = candidate if comparison.is_plain_rounding else None
    if comparison.schemes and not comparison.is_plain_rounding:
        rounded = RoundedSource(comparison.reader, comparison.schemes)
        baseline = scorer(rounded, "plain rounding")
    try:
        run = run_gate(
            reference,
            candidate,
            text=text,
            criteria=gate.criteria(comparison.bits),
            baseline=baseline,
            noise=scorer(comparison.reader, "noise floor", _NOISE_TOKENS_PER_BATCH),
            cloze=gate.cloze,
            tasks=_run_tasks(comparison, gate, reference, candidate),
            seed=gate.seed,
            progress=progress,
        )
    except NotFiniteError as error:
        if error.model != "candidate":
            raise
        raise _broken(error.what) from error
    return run.verdict


def check_gate(gate: GateSection, bits: int, text: HeldOutText) -> None:
    """Refuse before the work what the gate would refuse after it.

    Raises:
        EvaluationError: no margins for this width, a task that is unknown or cannot be run here,
            too little text for the cloze items.
    """
    criteria = gate.criteria(bits)
    check_text(text, criteria, gate.cloze, gate.seed)
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

    def __init__(self, scorer: WalkerScorer) -> None:
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


def margin_bits(sizes: Iterable[tuple[Scheme, int]]) -> int:
    """The bit width that most of the quantized parameters have, the wider one of two equals."""
    parameters: Counter[int] = Counter()
    for scheme, num_parameters in sizes:
        parameters[scheme.bits] += num_parameters
    return max(parameters, key=lambda bits: (parameters[bits], bits))


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
    progress: Progress = silent,
) -> Evaluation:
    """Judge a model on disk against the one it came from.

    Args:
        artifact: folder of a quantized model, or of an unquantized one of the same architecture.
        against: folder of the source.
        recipe: criteria and evaluation sources; the defaults for the bit width without one.
        text: evaluation sources in place of the recipe's.
        device: where blocks compute.
        progress: told of every step.

    Raises:
        LlmoptError: a folder that cannot be opened, or models that cannot be compared.
        BrokenArtifactError: the model computes NaN or infinity.
    """
    check_device(device)
    gate = recipe.gate if recipe else GateSection()
    sources = text or (recipe.evaluation if recipe else EvaluationSection()).sources
    candidate = open_checkpoint(Path(artifact))
    comparison = compare(candidate, open_checkpoint(Path(against)))
    held_out = prepare_evaluation(
        [sources] if isinstance(sources, str) else sources,
        comparison.tokenizer,
        context_length=comparison.structure.context_length,
    )
    notes = _integrity_notes(candidate.path, held_out)
    with tempfile.TemporaryDirectory(prefix="llmopt-eval-") as scratch:
        verdict = judge(
            comparison, held_out.text, gate, Path(scratch), device=device, progress=progress
        )
    return Evaluation(verdict, notes, EXIT_CODES[verdict.outcome])


def compare(candidate: CheckpointReader, reader: CheckpointReader) -> Comparison:
    """Set a model on disk beside its source.

    The candidate is what its own files say: its config decides how it computes.

    Raises:
        BadInputError: tensors that are missing, surplus or of another shape than the source's,
            another vocabulary, or a tokenizer that gives other tokens.
    """
    structure = read_structure(reader)
    tokenizer = load_tokenizer(reader.path).tokenizer
    quantized = quantization_config(candidate) is not None
    source = DequantizedSource(candidate) if quantized else candidate
    own = read_structure(source)
    _check_same_model(candidate.path, source, own, reader, structure)
    _check_same_tokens(candidate.path, tokenizer)
    schemes: dict[str, Scheme] = {}
    bits = UNQUANTIZED_BITS
    if isinstance(source, DequantizedSource):
        schemes = {f"{m}.weight": source.scheme_of(m) for m in source.quantized_modules}
        sizes = [(schemes[name], source.info(name).num_parameters) for name in schemes]
        bits = margin_bits(sizes)
    return Comparison(reader, structure, source, own, schemes, False, bits, tokenizer)


def _check_same_model(
    path: Path,
    source: TensorSource,
    own: ModelStructure,
    reader: CheckpointReader,
    structure: ModelStructure,
) -> None:
    remedy = "compare a model with the very checkpoint it was made from"
    theirs, ours = set(reader.names), set(source.names)
    if structure.tied_head and structure.head_disk_name is not None:
        theirs.discard(structure.head_disk_name)
        ours.discard(structure.head_disk_name)
    for names, word in ((theirs - ours, "lacks"), (ours - theirs, "adds")):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise BadInputError(f"{path} {word} {len(names)} tensors, for example {some}", remedy)
    for name in sorted(theirs):
        mine, other = source.info(name).shape, reader.info(name).shape
        if tuple(mine) != tuple(other):
            raise BadInputError(
                f"{name} is {list(mine)} in {path}, {list(other)} in the source", remedy
            )
    if own.vocabulary_size != structure.vocabulary_size:
        raise BadInputError(
            f"{path} has {own.vocabulary_size} logits, the source {structure.vocabulary_size}",
            remedy,
        )


def _check_same_tokens(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    own = load_tokenizer(path).tokenizer
    if encode([PROBE_TEXT], own) != encode([PROBE_TEXT], tokenizer):
        raise BadInputError(
            f"the tokenizer of {path} gives other tokens than the source's on a probe text",
            "copy the source's tokenizer files into it",
        )


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
