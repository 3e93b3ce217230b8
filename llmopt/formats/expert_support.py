"""What a consumer does with the experts of a mixture, which it holds together as one layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from llmopt.formats.accepted import Accepted
from llmopt.quantization.scheme import Scheme

ExpertSchemes = Collection[Scheme | None]
"""The schemes among the experts of one block; ``None`` is 16 bit."""


class ExpertSupport(BaseModel):
    """One consumer's experts of packed weights; the head of ``consumers.yaml`` has the keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    accepts: tuple[Accepted, ...]
    one_scheme: Literal["block", "model"]
    sixteen_bit: bool
    reasons: dict[Literal["accepts", "one_scheme", "sixteen_bit"], str]

    def refusals(self, blocks: Sequence[ExpertSchemes], others: Collection[Scheme]) -> list[str]:
        """Why it would not open a mixture, empty if it would.

        Args:
            blocks: the schemes among the experts of each block that has some.
            others: the schemes of what is quantized besides experts.
        """
        packed = {scheme for block in blocks for scheme in block if scheme is not None}
        if not packed and not others:
            return []
        return list(dict.fromkeys(self._faults(blocks, packed, packed | set(others))))

    def proven(self, blocks: Sequence[ExpertSchemes]) -> bool:
        """Whether every scheme among the experts has been run and compared."""
        return all(
            any(row.proven and row.covers(scheme) for row in self.accepts)
            for block in blocks
            for scheme in block
            if scheme is not None
        )

    def _faults(
        self, blocks: Sequence[ExpertSchemes], packed: set[Scheme], everything: set[Scheme]
    ) -> Iterator[str]:
        for scheme in packed:
            if not any(row.covers(scheme) for row in self.accepts):
                yield f"experts in {_in_words(scheme)}: {self.reasons['accepts']}"
        if any(len(block) > 1 for block in blocks) or (
            self.one_scheme == "model" and len(everything) > 1
        ):
            yield f"experts of several schemes: {self.reasons['one_scheme']}"
        if not self.sixteen_bit and any(None in block for block in blocks):
            yield f"experts in 16 bit: {self.reasons['sixteen_bit']}"


def _in_words(scheme: Scheme) -> str:
    group = "one scale a row" if scheme.group_size is None else f"groups of {scheme.group_size}"
    return f"{'symmetric' if scheme.symmetric else 'asymmetric'} {scheme.bits} bits, {group}"
