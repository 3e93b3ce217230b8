"""The gate with the source's scores shared among all artifacts that are judged against it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llmopt.checkpoint.reader import open_checkpoint
from llmopt.checkpoint.scan import tensor_digest
from llmopt.checkpoint.structure import ModelStructure, read_structure
from llmopt.checkpoint.tensor_source import TensorSource
from llmopt.comparison import compare
from llmopt.errors import RoundTripError
from llmopt.formats.dequantized import DequantizedSource
from llmopt.progress import silent
from llmopt.quantization.scheme import Scheme
from llmopt.recipe import GateSection
from llmopt.rounded import RoundedSource
from llmopt.roundtrip import check_round_trip
from llmopt.scoring import WalkerScorer
from llmopt_evals.gate import GateRun, run_gate
from llmopt_evals.scorer import Branches, Passage, Scorer, Scores
from llmopt_evals.statistics import Interval, ratio_interval, resample_counts
from llmopt_evals.units import HeldOutText, Unit


def shorten(text: HeldOutText, num_units: int, num_tokens: int) -> HeldOutText:
    """Units spread over the text, each cut to its first ``num_tokens`` predictions."""
    chosen = text.units[:: len(text.units) // num_units][:num_units]
    units = tuple(Unit(unit.name, (unit.blocks[0][: num_tokens + 1],)) for unit in chosen)
    return replace(text, units=units)


def kl_rise(faulty: GateRun, sound: GateRun) -> Interval:
    """95 % interval of the mean KL that the fault adds, over the units that both looked at."""
    n = min(len(faulty.evidence.names), len(sound.evidence.names))
    assert faulty.evidence.names[:n] == sound.evidence.names[:n]
    change = faulty.evidence.kl[:n] - sound.evidence.kl[:n]
    return ratio_interval(change, sound.evidence.tokens[:n], resample_counts(n, 2000, 0), 0.05)


class SharedScorer:
    """A scorer that scores the same passages once."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._scores: dict[str, Scores] = {}

    def score(self, sequences: Sequence[Passage]) -> Scores:
        digest = hashlib.sha256()
        for passage in sequences:
            branches = isinstance(passage, Branches)
            parts = (passage.context, *passage.continuations) if branches else (passage,)
            for part in parts:
                digest.update(f"{len(part)},{branches};".encode() + part.numpy().tobytes())
        key = digest.hexdigest()
        if key not in self._scores:
            self._scores[key] = self._scorer.score(sequences)
        return self._scores[key]


class Bench:
    """A source model and everything that is the same for all that is judged against it.

    ``llmopt.evaluation.judge`` scores the source and plain rounding anew for every artifact; this
    does not, and gives the evidence too. That both say the same is tested.
    """

    def __init__(self, source: Path, text: HeldOutText, scratch: Path) -> None:
        self.reader = open_checkpoint(source)
        self.text = text
        self._scratch = scratch
        self._structure = read_structure(self.reader)
        self._reference = SharedScorer(self._scorer(self.reader, self._structure))
        self._noise = SharedScorer(self._scorer(self.reader, self._structure, 1024))
        self._rounded: dict[frozenset[tuple[str, Scheme]], SharedScorer] = {}

    def judge(self, artifact: Path, gate: GateSection) -> GateRun:
        """The verdict of ``llmopt eval``, and what it rests on."""
        comparison = compare(open_checkpoint(artifact), self.reader)
        key = frozenset(comparison.schemes.items())
        if key not in self._rounded:
            rounded = RoundedSource(self.reader, comparison.schemes)
            self._rounded[key] = SharedScorer(self._scorer(rounded, self._structure))
        return run_gate(
            self._reference,
            self._scorer(comparison.candidate, comparison.candidate_structure),
            text=self.text,
            criteria=gate.criteria(comparison.bits),
            baseline=self._rounded[key],
            noise=self._noise,
            cloze=gate.cloze,
            seed=gate.seed,
        )

    def round_trip_catches(self, artifact: Path, calibrated: Path) -> bool:
        """Whether the round trip refuses ``artifact``, were ``calibrated`` what was solved."""
        sound = DequantizedSource(open_checkpoint(calibrated))
        modules = sound.quantized_modules
        source = set(self.reader.names)
        packed = {f"{name}.weight" for name in modules}
        try:
            check_round_trip(
                artifact,
                {name: sound.read_quantized(name).digest() for name in modules},
                {name: sound.scheme_of(name) for name in modules},
                {
                    name: tensor_digest(self.reader.read(name))
                    for name in open_checkpoint(artifact).names
                    if name in source and name not in packed
                },
                silent,
            )
        except RoundTripError:
            return True
        return False

    def _scorer(
        self, source: TensorSource, structure: ModelStructure, tokens_per_batch: int = 4096
    ) -> WalkerScorer:
        return WalkerScorer(structure, source, self._scratch, tokens_per_batch=tokens_per_batch)
