"""What a chip can bear."""

import pytest

from aot.chips import A100, H100, Usage


@pytest.mark.parametrize(
    ("chip", "usage", "faults"),
    [
        (H100, Usage(255, 0, 232_448, True), []),
        (H100, Usage(255, 0, 232_449, True), ["232449 bytes of shared memory, limit 232448"]),
        (H100, Usage(80, 8, 0, True), ["8 bytes of stack, limit 0"]),
        (A100, Usage(80, 64, 166_912, True), []),
        (
            A100,
            Usage(80, 72, 0, False),
            ["72 bytes of stack, limit 64", "no tensor-core instruction"],
        ),
    ],
)
def test_what_a_chip_cannot_bear_is_a_fault(chip, usage, faults):
    assert usage.faults(chip, needs_tensor_cores=True) == faults
    assert Usage(1, 0, 0, False).faults(chip, needs_tensor_cores=False) == []
