"""One row of what a consumer accepts."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from llmopt.quantization.scheme import IntBits, Scheme


class Accepted(BaseModel):
    """A kind of scheme that a consumer runs; ``proven`` if it has been run and compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: tuple[IntBits, ...]
    symmetric: bool
    group_sizes: tuple[int | Literal["channel"], ...] | Literal["any"]
    proven: bool

    def covers(self, scheme: Scheme) -> bool:
        """Whether ``scheme`` is of this kind."""
        return (
            scheme.bits in self.bits
            and scheme.symmetric == self.symmetric
            and (self.group_sizes == "any" or (scheme.group_size or "channel") in self.group_sizes)
        )
