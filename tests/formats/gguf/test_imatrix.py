from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmopt.errors import BadInputError
from llmopt.formats.gguf.imatrix import (
    ImportanceEntry,
    ImportanceMatrix,
    check_imatrix,
    check_seen,
    read_imatrix,
    write_imatrix,
)

DENSE, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"
SHAPES = {DENSE: (6, 4), EXPERTS: (3, 5, 4)}


def matrix() -> ImportanceMatrix:
    torch.manual_seed(0)
    return ImportanceMatrix(
        {
            DENSE: ImportanceEntry(torch.rand(1, 4) * 100, torch.tensor([10])),
            EXPERTS: ImportanceEntry(torch.rand(3, 4) * 100, torch.tensor([7, 0, 3])),
        },
        ("wiki.txt",),
        4,
        512,
    )


def legacy_entry(name: str, calls: int, values: list[float]) -> bytes:
    raw = name.encode()
    head = struct.pack("<i", len(raw)) + raw + struct.pack("<ii", calls, len(values))
    return head + struct.pack(f"<{len(values)}f", *values)


def legacy(*entries: bytes, end: bytes = b"") -> bytes:
    return struct.pack("<i", len(entries)) + b"".join(entries) + end


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", matrix())
    found = read_imatrix(tmp_path / "i.gguf")
    assert (found.datasets, found.num_chunks, found.chunk_tokens) == (("wiki.txt",), 4, 512)
    for name, entry in matrix().entries.items():
        assert torch.equal(found.entries[name].sums, entry.sums)
        assert torch.equal(found.entries[name].counts, entry.counts)
    check_imatrix(found, SHAPES.items(), tmp_path / "i.gguf")


def test_the_layout_is_llama_imatrixs(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", matrix())
    reader = GGUFReader(tmp_path / "i.gguf")
    assert "general.architecture" not in reader.fields
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["wiki.txt"]
    assert reader.fields["imatrix.chunk_count"].contents() == 4
    assert reader.fields["imatrix.chunk_size"].contents() == 512
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes == {
        f"{DENSE}.in_sum2": [4, 1],
        f"{DENSE}.counts": [1, 1],
        f"{EXPERTS}.in_sum2": [4, 3],
        f"{EXPERTS}.counts": [1, 3],
    }


def test_importance_is_a_mean_and_one_for_an_expert_without_tokens() -> None:
    found = matrix()
    dense = found.importance(DENSE, SHAPES[DENSE])
    assert dense is not None and dense.shape == (4,)
    torch.testing.assert_close(dense, found.entries[DENSE].sums[0] / 10)
    experts = found.importance(EXPERTS, SHAPES[EXPERTS])
    assert experts is not None and experts.shape == (3, 4)
    torch.testing.assert_close(experts[2], found.entries[EXPERTS].sums[2] / 3)
    assert experts[1].tolist() == [1, 1, 1, 1]
    assert found.importance("token_embd.weight", (3, 4)) is None


def test_an_older_file_that_counts_a_stack_once_is_read(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "i.gguf", "x")
    writer.add_tensor(f"{EXPERTS}.in_sum2", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor(f"{EXPERTS}.counts", np.array([[2]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_imatrix(tmp_path / "i.gguf").importance(EXPERTS, SHAPES[EXPERTS])
    assert found is not None
    assert found.tolist() == (torch.arange(12).view(3, 4) / 2).tolist()


@pytest.mark.parametrize("end", [b"", struct.pack("<ii", 9, 3) + b"abc"])
def test_the_legacy_layout_is_read(end: bytes, tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    entries = (
        legacy_entry(DENSE, 2, [2.0, 4.0, 6.0, 8.0]),
        legacy_entry(EXPERTS, 4, [float(v) for v in range(12)]),
    )
    path.write_bytes(legacy(*entries, end=end))
    found = read_imatrix(path)
    assert (found.datasets, found.num_chunks) == ((("abc",), 9) if end else ((), 0))
    dense, experts = (found.importance(name, shape) for name, shape in SHAPES.items())
    assert dense is not None and experts is not None
    assert dense.tolist() == [1, 2, 3, 4]
    assert experts.tolist() == (torch.arange(12).view(3, 4) / 4).tolist()
    check_imatrix(found, SHAPES.items(), path)


def test_names_and_widths_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    shapes = {
        DENSE: (6, 5),
        EXPERTS: (2, 5, 4),
        "blk.0.attn_k.weight": (6, 4),
        "blk.0.ffn_gate_inp.weight": (3, 4),
        "token_embd.weight": (9, 4),
        "output.weight": (9, 4),
    }
    with pytest.raises(BadInputError) as caught:
        check_imatrix(matrix(), shapes.items(), tmp_path / "i.gguf")
    assert "blk.0.attn_k.weight has no entry" in caught.value.what
    assert f"{DENSE} is [1, 4], not [1, 5]" in caught.value.what
    assert f"{EXPERTS} is [3, 4], not [2, 4]" in caught.value.what
    assert "token_embd" not in caught.value.what
    assert "ffn_gate_inp" not in caught.value.what
    with pytest.raises(BadInputError, match=f"{EXPERTS} is no matrix of this model"):
        check_imatrix(matrix(), [(DENSE, (6, 4))], tmp_path / "i.gguf")


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    writer = GGUFWriter(path, "x")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


ONE = np.ones((1, 1), np.float32)
UNSOUND: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "a model": ({"blk.0.attn_q.weight": ONE}, "neither .in_sum2 nor .counts"),
    "no counts": ({"a.in_sum2": ONE}, "a has sums or counts, but not both"),
    "half": ({"a.in_sum2": ONE.astype(np.float16), "a.counts": ONE}, "F16, not F32"),
    "rows": (
        {"a.in_sum2": np.ones((3, 4), np.float32), "a.counts": np.ones((2, 1), np.float32)},
        "3 rows of sums and 2 counts",
    ),
    "negative": ({"a.in_sum2": -ONE, "a.counts": ONE}, "negative, NaN or infinite"),
    "nan": ({"a.in_sum2": ONE * np.nan, "a.counts": ONE}, "negative, NaN or infinite"),
    "counts": ({"a.in_sum2": ONE, "a.counts": ONE * np.inf}, "the counts of a"),
    "nothing": ({}, "no entries"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_what_is_no_importance_matrix_is_refused(case: str, tmp_path: Path) -> None:
    tensors, message = UNSOUND[case]
    write_tensors(tmp_path / "i.gguf", tensors)
    with pytest.raises(BadInputError, match=message):
        read_imatrix(tmp_path / "i.gguf")


LEGACY_UNSOUND = {
    "empty": (b"", "is empty"),
    "short": (b"\1", "a number of entries"),
    "none": (legacy(), "no entries"),
    "many": (struct.pack("<i", 1 << 30), "a name of"),
    "name": (struct.pack("<ii", 1, 1 << 30), "a name of 1073741824"),
    "negative": (struct.pack("<ii", 1, -5), "a name of -5"),
    "values": (legacy(legacy_entry("a", 1, [1.0])[:-1]), "values of 1"),
    "no values": (legacy(legacy_entry("a", 1, [])), "a has no values"),
    "twice": (legacy(*[legacy_entry("a", 1, [1.0])] * 2), "a stands twice"),
    "nan": (legacy(legacy_entry("a", 1, [float("nan")])), "negative, NaN or infinite"),
}


@pytest.mark.parametrize("case", LEGACY_UNSOUND)
def test_an_unsound_legacy_file_is_refused(case: str, tmp_path: Path) -> None:
    content, message = LEGACY_UNSOUND[case]
    (tmp_path / "i.dat").write_bytes(content)
    with pytest.raises(BadInputError, match=message):
        read_imatrix(tmp_path / "i.dat")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="No such file"):
        read_imatrix(tmp_path / "none.gguf")


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.binary(max_size=80), st.integers(0, 60))
def test_any_bytes_are_read_or_refused(tmp_path: Path, noise: bytes, keep: int) -> None:
    sound = legacy(legacy_entry("a", 1, [1.0]), legacy_entry("b", 1, [2.0]))
    (tmp_path / "i.dat").write_bytes(sound[:keep] + noise)
    try:
        found = read_imatrix(tmp_path / "i.dat")
    except BadInputError:
        return
    assert found.entries


def test_experts_that_no_token_reached_are_named(tmp_path: Path) -> None:
    counts = torch.tensor([3, 0, 2, 0])
    stack = ImportanceEntry(torch.ones(4, 8), counts)
    dense = ImportanceEntry(torch.ones(1, 8), torch.tensor([5]))
    seen = ImportanceMatrix({"a": dense}, (), 1, 0)
    check_seen(seen, tmp_path)
    with pytest.raises(BadInputError, match=r"never reached the experts b \[1, 3\]\n") as caught:
        check_seen(ImportanceMatrix({"a": dense, "b": stack}, (), 1, 0), tmp_path)
    assert "importance: false" in caught.value.remedy
