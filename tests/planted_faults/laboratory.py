"""Sound artifacts, their verdicts and the benches that judge them, each made once."""

from __future__ import annotations

from pathlib import Path

from planted_faults.bases import Bases
from planted_faults.bench import Bench

from llmopt.recipe import GateSection
from llmopt_evals.gate import GateRun
from llmopt_evals.units import HeldOutText


class Laboratory:
    """What faults are planted in and judged by.

    Args:
        bases: the artifacts.
        text: held-out units.
        gate: criteria and sample sizes.
        scratch: for hidden states.
    """

    def __init__(self, bases: Bases, text: HeldOutText, gate: GateSection, scratch: Path) -> None:
        self.bases = bases
        self.text = text
        self._scratch = scratch
        self._gate = gate
        self._benches: dict[Path, Bench] = {}
        self._sound: dict[str, GateRun] = {}

    def bench(self, name: str) -> Bench:
        """Where a variant's artifacts are judged: one bench a source."""
        source = self.bases.source(name)
        if source not in self._benches:
            self._benches[source] = Bench(source, self.text, self._scratch)
        return self._benches[source]

    def judge(self, artifact: Path, name: str) -> GateRun:
        """The verdict of an artifact made of a variant."""
        return self.bench(name).judge(artifact, self._gate)

    def sound(self, name: str) -> GateRun:
        """The verdict of a sound artifact."""
        if name not in self._sound:
            self._sound[name] = self.judge(self.bases.artifact(name), name)
        return self._sound[name]
