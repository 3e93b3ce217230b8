"""The two texts of a run: what calibrates and what judges, kept apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from llmopt.calibration.overlap import TokenDocument, find_overlap
from llmopt.calibration.split import sample_documents, split_documents
from llmopt.calibration.text import BUILTIN, is_data_set, read_documents, same_source
from llmopt.calibration.tokenizer import sequence_prefix
from llmopt.calibration.tokens import TokenBlocks, cut_blocks
from llmopt.errors import BadInputError
from llmopt.recipe import CalibrationSection, Recipe
from llmopt_evals.units import MIN_UNITS, HeldOutText, cut_units

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmopt.calibration.documents import Document

MAX_EVALUATION_TOKENS = 262_144
"""Of each source: the gate keeps hidden states of all of them on disk, for source and output."""

MAX_BLOCK_TOKENS = 1024
MIN_BLOCK_TOKENS = 256
"""Of evaluation blocks, where the model's context allows."""

MIN_CONTEXT_LENGTH = 64


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """Held-out text as units, and where it came from.

    Attributes:
        text: the units.
        sources: as the report names them.
        overlapping: names of documents dropped because calibration has seen them.
        sha256: of all tokens, unit by unit.
        num_left_out: documents beyond ``MAX_EVALUATION_TOKENS`` of their source.
        notes: what a reader of the report should know about the text, a sentence each.
    """

    text: HeldOutText
    sources: tuple[str, ...]
    overlapping: tuple[str, ...]
    sha256: str
    num_left_out: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Texts:
    """Calibration blocks (``None`` when the solver needs none) and evaluation units."""

    calibration: TokenBlocks | None
    calibration_sha256: str
    evaluation: EvaluationText


def prepare_texts(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, context_length: int | None = None
) -> Texts:
    """Read, split and tokenize the texts that a recipe names.

    A text of the user's own is split: one part calibrates, the held-out part joins the
    evaluation sources.

    Args:
        recipe: names the texts.
        tokenizer: the model's.
        context_length: the model's; no block is longer.

    Raises:
        BadInputError: a text missing, empty, too short or named twice; calibration sequences
            longer than the context, or a context too short for evaluation; more than 5 % of the
            evaluation documents overlapping the calibration text.
        EvaluationError: fewer than 30 units.
    """
    section = recipe.calibration
    sources = recipe.evaluation.sources
    check_lengths(recipe, context_length)
    _check_distinct([section.source, *sources] if section.source != BUILTIN else sources)

    held_out: list[tuple[str, list[Document]]] = []
    calibration = None
    seen: list[TokenDocument] = []
    if recipe.calibrates:
        calibration, own = prepare_calibration(recipe, tokenizer)
        seen = list(calibration.documents)
    else:
        _, own = _calibration_documents(recipe, tokenizer)
    if section.source != BUILTIN:
        held_out.append((f"held-out part of {section.source}", own))
    held_out += _read_sources(sources, tokenizer)
    return Texts(
        calibration=calibration,
        calibration_sha256=_sha256([calibration.blocks] if calibration else []),
        evaluation=_evaluation_text(held_out, seen, tokenizer, context_length),
    )


def prepare_calibration(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenBlocks, list[Document]]:
    """The text that calibrates, in blocks; and the held-out part of a text of the user's own.

    Raises:
        BadInputError: a text missing, empty or too short.
    """
    section = recipe.calibration
    documents, own = _calibration_documents(recipe, tokenizer)
    blocks = cut_blocks(
        documents,
        tokenizer,
        num_samples=section.num_samples,
        sequence_length=section.sequence_length,
        seed=section.seed,
    )
    return blocks, own


def _calibration_documents(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Document], list[Document]]:
    section = recipe.calibration
    documents = read_documents(
        section.source,
        split="calibration",
        tokenizer=tokenizer,
        max_documents=_max_documents(section) if is_data_set(section.source) else None,
    )
    if section.source == BUILTIN:
        return documents, []
    return split_documents(documents, recipe.evaluation.own_text_share, section.seed)


def prepare_evaluation(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | None = None,
) -> EvaluationText:
    """Held-out text alone, for judging something that was calibrated elsewhere.

    Raises:
        BadInputError: a text missing, empty or named twice; a context too short.
        EvaluationError: fewer than 30 units.
    """
    _check_context(context_length)
    _check_distinct(sources)
    return _evaluation_text(_read_sources(sources, tokenizer), [], tokenizer, context_length)


def check_lengths(recipe: Recipe, context_length: int | None) -> None:
    """Hold that a model's context is long enough for the recipe and for evaluation.

    Raises:
        BadInputError: calibration sequences longer than the context, or too short a context.
    """
    _check_context(context_length)
    if recipe.calibrates:
        _check_sequence_length(recipe.calibration.sequence_length, context_length)


def _check_context(context_length: int | None) -> None:
    if context_length is not None and context_length < MIN_CONTEXT_LENGTH:
        raise BadInputError(
            f"the model's context of {context_length} tokens is too short to be judged",
            f"use a model with a context of {MIN_CONTEXT_LENGTH} tokens or more "
            "(max_position_embeddings in config.json)",
        )


def _check_sequence_length(sequence_length: int, context_length: int | None) -> None:
    if context_length is not None and sequence_length > context_length:
        raise BadInputError(
            f"calibration sequences of {sequence_length} tokens are longer than the model's "
            f"context of {context_length}",
            f"set calibration.sequence_length to {context_length} or less",
        )


def _check_distinct(sources: Sequence[str]) -> None:
    for index, source in enumerate(sources):
        for earlier in sources[:index]:
            if same_source(source, earlier):
                raise BadInputError(
                    f"text source {source!r} is named twice (as {earlier!r} before)",
                    "name each text once; of a calibration text of your own, a part is held out "
                    "for evaluation without being named again",
                )


def _max_documents(section: CalibrationSection) -> int:
    """Enough of a data set for the blocks even where documents have a sentence each."""
    num_tokens = section.num_samples * section.sequence_length
    return max(5_000, 20 * section.num_samples, num_tokens // 8)


def _read_sources(
    sources: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, list[Document]]]:
    return [
        (source, read_documents(source, split="evaluation", tokenizer=tokenizer))
        for source in sources
    ]


def _evaluation_text(
    sources: Sequence[tuple[str, list[Document]]],
    calibration: Sequence[TokenDocument],
    tokenizer: PreTrainedTokenizerBase,
    context_length: int | None,
) -> EvaluationText:
    tokenized: list[TokenDocument] = []
    notes: list[str] = []
    num_left_out = 0
    for source, documents in sources:
        sample = sample_documents(
            documents, tokenizer, max_tokens=MAX_EVALUATION_TOKENS, min_documents=MIN_UNITS
        )
        num_left_out += sample.num_left_out
        if sample.num_left_out or sample.num_shortened:
            notes.append(
                f"{source}: a sample of {MAX_EVALUATION_TOKENS:,} tokens, {sample.num_left_out} of "
                f"{len(documents)} documents left out, {sample.num_shortened} shortened"
            )
        # Documents of one name are one unit, and files of one name in two folders are not.
        place = f"{source}: " if len(sources) > 1 else ""
        tokenized += [(f"{place}{name}", ids) for name, ids in sample.documents]
    overlap = find_overlap(tokenized, calibration)
    prefix = sequence_prefix(tokenizer)
    if len(prefix) > 1:
        notes.append(
            f"the tokenizer begins a text with {len(prefix)} tokens; evaluation blocks begin "
            "without them, for source and output alike"
        )
    max_tokens = min(MAX_BLOCK_TOKENS, context_length or MAX_BLOCK_TOKENS)
    text = cut_units(
        [(tokenized[index][0], tokenized[index][1].tolist()) for index in overlap.kept],
        min_tokens=min(MIN_BLOCK_TOKENS, max_tokens // 2),
        max_tokens=max_tokens,
        bos_token_id=prefix[0] if len(prefix) == 1 else None,
    )
    return EvaluationText(
        text=text,
        sources=tuple(name for name, _ in sources),
        overlapping=overlap.dropped,
        sha256=_sha256(block for unit in text.units for block in unit.blocks),
        num_left_out=num_left_out,
        notes=tuple(notes),
    )


def _sha256(blocks: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(f"{tuple(block.shape)}".encode())
        digest.update(block.numpy().tobytes())
    return digest.hexdigest()
