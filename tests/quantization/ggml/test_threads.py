"""Several threads compute what one does, byte for byte."""

import threading
from collections.abc import Iterator

import pytest
import torch
from quantization.ggml.samples import importance, sample

from llmopt.quantization.ggml.packing import pack_blocks
from llmopt.quantization.ggml.quantize import quantize_blocks
from llmopt.quantization.ggml.threads import each_slice, row_slices
from llmopt.quantization.ggml.types import GGML_TYPES

CPU = torch.device("cpu")


@pytest.fixture
def num_threads() -> Iterator[None]:
    """Whatever a test sets, the others find what they had."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("search", ["compatible", "least-squares"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_XS"])
def test_bytes_do_not_depend_on_the_number_of_threads(kind, search, monkeypatch):
    # Chunks of several rows, the last one shorter, so that sums are split in odd places.
    monkeypatch.setattr("llmopt.quantization.ggml.quantize._CPU_ELEMENTS", 7 * 512)
    monkeypatch.setattr("llmopt.quantization.ggml.packing._PACKED_ELEMENTS", 5 * 512)
    weight = sample("heavy-tailed", 61, 512)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        tensor = quantize_blocks(
            weight, GGML_TYPES[kind], importance=importance(512), search=search
        )
        found.append(pack_blocks(tensor))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.usefixtures("num_threads")
def test_slices_run_side_by_side_with_one_thread_each_and_come_back_in_order():
    torch.set_num_threads(3)
    together = threading.Barrier(3, timeout=60)

    def work(rows: slice) -> tuple[int, int]:
        together.wait()  # broken unless three run at a time
        return rows.start, torch.get_num_threads()

    assert each_slice(work, row_slices(6, 2), CPU) == [(0, 1), (2, 1), (4, 1)]
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("num_threads")
def test_new_threads_have_as_many_as_before():
    torch.set_num_threads(3)
    each_slice(lambda rows: rows, row_slices(4, 1), CPU)
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [3]


@pytest.mark.usefixtures("num_threads")
def test_the_first_error_is_raised():
    torch.set_num_threads(2)

    def work(rows: slice) -> None:
        raise ValueError(rows.start)

    with pytest.raises(ValueError, match="^0$"):
        each_slice(work, row_slices(4, 1), CPU)


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("inference", [False, True])
def test_threads_have_the_modes_of_the_caller(inference):
    torch.set_num_threads(2)

    def work(rows: slice) -> tuple[bool, bool]:
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    with torch.inference_mode(inference):
        assert each_slice(work, row_slices(2, 1), CPU) == [(inference, False)] * 2
