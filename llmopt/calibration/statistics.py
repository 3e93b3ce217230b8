"""What a solver needs to know of a linear layer's inputs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmopt.checkpoint.shell import TokenBatch
from llmopt.errors import NumericalError

_BLOCK_COLUMNS = 256  # of the Hessian's upper triangle: a product each


class ColumnStatistics:
    """Statistics of the input that a group of linear layers shares, column by column.

    Attributes:
        layer: full names of the linear layers, for error messages.
        max_abs: the largest |x| of all.
        num_tokens: tokens seen so far.
    """

    def __init__(self, layer: str, in_features: int, device: torch.device | str = "cpu") -> None:
        self.layer = layer
        self.max_abs = 0.0
        self.num_tokens = 0
        self._energy = torch.zeros(in_features, dtype=torch.float32, device=device)

    @torch.no_grad()
    def update(self, inputs: Tensor, batch: TokenBatch, index: int) -> None:
        """Add a batch.

        Args:
            inputs: (batch, tokens, in) activations; of an expert (tokens routed to it, in).
            batch: whose they are.
            index: its index, for error messages.

        Raises:
            NumericalError: NaN or infinity among the inputs, or squares beyond float32.
        """
        values = inputs.reshape(-1, inputs.shape[-1])
        largest = _max_abs(values)
        if not math.isfinite(largest):
            raise not_finite(f"the input of {self.layer}", inputs, batch, index)
        rows = values.float()
        total = self.num_tokens + len(rows)
        self._add(rows, total)
        if not bool(self.energy.isfinite().all()):
            raise NumericalError(
                f"the Hessian of {self.layer} overflows float32 at batch {index} "
                f"({batch.row_name(0)} and after): its largest input is {largest:.3g}",
                "check the source model on this text; leave this layer out with `ignore`",
            )
        self.max_abs = max(self.max_abs, largest)
        self.num_tokens = total

    def _add(self, rows: Tensor, total: int) -> None:
        """Take up `rows` (n, in) float32, with which there are `total` tokens."""
        squares = (rows * rows).sum(dim=0)
        self._energy.mul_(self.num_tokens / total).add_(squares, alpha=1 / total)

    @property
    def energy(self) -> Tensor:
        """(in,) float32, the mean of x^2 over the tokens seen so far: llama.cpp's importance."""
        return self._energy

    @property
    def zero_columns(self) -> Tensor:
        """(in,) bool: input columns that were zero for every token."""
        return self.energy == 0


class InputStatistics(ColumnStatistics):
    """The same and the second moments between columns, gathered batch by batch."""

    def __init__(self, layer: str, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(layer, in_features, device)
        # Blocks on and above the diagonal; those below are filled in when the whole is asked for.
        self._upper = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def _add(self, rows: Tensor, total: int) -> None:
        # Half the products of the whole matrix: it is symmetric.
        for start in range(0, len(self._upper), _BLOCK_COLUMNS):
            block = slice(start, start + _BLOCK_COLUMNS)
            self._upper[block, start:].addmm_(
                rows[:, block].T, rows[:, start:], beta=self.num_tokens / total, alpha=2 / total
            )

    @property
    def energy(self) -> Tensor:
        """(in,) float32, half the Hessian's diagonal."""
        return self._upper.diagonal() / 2

    @property
    def hessian(self) -> Tensor:
        """(in, in) float32, 2/n sum x x^T over the n tokens seen so far.

        The Hessian of the mean squared error of one output (Frantar et al., GPTQ, 2022). Not a
        copy: the next batch changes it.
        """
        for start in range(0, len(self._upper), _BLOCK_COLUMNS):
            stop = start + _BLOCK_COLUMNS
            self._upper[stop:, start:stop] = self._upper[start:stop, stop:].T
        return self._upper


def _max_abs(values: Tensor) -> float:
    """The largest |x|; NaN if any is; 0 of none."""
    if not len(values):
        return 0.0
    low, high = torch.aminmax(values)  # of the whole: column by column takes ten times as long
    return max(float(high), -float(low))


def not_finite(what: str, values: Tensor, batch: TokenBatch, index: int) -> NumericalError:
    """The error for NaN or infinity in `values`, which must hold some.

    `values` is (batch, tokens, ...), flat in batch and tokens or not, or (tokens, ...) with those
    that were routed to an expert, whose places in the batch are not known here.
    """
    remedy = "check the source model on this text; with 16-bit activations, compute in float32"
    if values.shape[:-1].numel() != batch.token_ids.numel():
        return NumericalError(
            f"NaN or infinity in {what}, at a token routed to it of batch {index} "
            f"({batch.row_name(0)} to {batch.row_name(len(batch.token_ids) - 1)})",
            remedy,
        )
    bad = ~values.isfinite().reshape(*batch.shape, -1).all(dim=-1)  # (batch, tokens)
    row, token = (int(position) for position in bad.nonzero()[0])
    kind = "NaN" if bool(values.reshape(*batch.shape, -1)[row, token].isnan().any()) else "infinity"
    return NumericalError(
        f"{kind} in {what}, at token {token} of {batch.row_name(row)} (batch {index}, row {row})",
        remedy,
    )
