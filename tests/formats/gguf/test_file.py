from __future__ import annotations

import math
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.gguf_bytes import array, entry, gguf_file, pair, sample, text

from llmopt.errors import BadInputError
from llmopt.formats.gguf.file import GGUFFile
from llmopt.formats.gguf.header import parse_header

F32, Q4_0, IQ2_XXS = 0, 2, 16


def assert_same_as_package(path: Path, file: GGUFFile) -> None:
    """Hold our reading against that of the `gguf` package's reader."""
    reader = gguf.GGUFReader(path)
    fields = {name: f for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    for name, field in fields.items():
        ours, theirs = file.metadata[name], field.contents()
        if isinstance(ours, tuple | np.ndarray):
            if field.types[1:2] != [gguf.GGUFValueType.ARRAY]:  # which it flattens
                np.testing.assert_array_equal(np.array(ours), np.array(theirs))
        else:
            assert ours == theirs or (math.isnan(ours) and math.isnan(theirs))
    assert file.header.data_offset == reader.data_offset
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found.keys() == set(file.names)
    for name, tensor in found.items():
        info = file.info(name)
        assert info.type.id == tensor.tensor_type
        assert info.shape == tuple(tensor.shape.tolist()[::-1])
        assert (info.offset, info.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert file.data(name).numpy().tobytes() == tensor.data.tobytes()


def test_a_sound_file_reads_as_in_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(sample())
    file = GGUFFile(path)
    assert_same_as_package(path, file)
    assert file.names == ("norm.weight", "blk.0.weight", "blk.0.experts")
    assert file.data("norm.weight").shape == (1, 20)
    assert file.data("blk.0.weight").shape == (3, 36)
    assert file.data("blk.0.experts").shape == (2, 2, 34)
    assert file.metadata["a.text"] == ("a", "", "é")
    assert file.metadata["n.bool"] is True
    assert file.metadata["n.i8"] == -7


def test_writing_into_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "sound.gguf"
    path.write_bytes(sample())
    GGUFFile(path).data("norm.weight").zero_()
    assert path.read_bytes() == sample()


def test_version_2_and_another_alignment_are_read(tmp_path: Path) -> None:
    path = tmp_path / "old.gguf"
    pairs = [pair("general.alignment", 4, struct.pack("<I", 64))]
    entries = [entry("a", [2], F32, 0), entry("b", [2], F32, 64)]
    data = struct.pack("<2f", 1, 2) + bytes(56) + struct.pack("<2f", 3, 4)
    path.write_bytes(gguf_file(pairs, entries, data, version=2, alignment=64))
    file = GGUFFile(path)
    assert file.header.version == 2
    assert_same_as_package(path, file)


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "order.gguf"
    entries = [entry("second", [2], F32, 32), entry("first", [2], F32, 0)]
    path.write_bytes(gguf_file([], entries, bytes(40)))
    assert GGUFFile(path).names == ("first", "second")


ALIGNED = [pair("general.alignment", 4, struct.pack("<I", 24))]
NESTED = pair("k", 9, array(9, 1 << 20, array(0, 0, b"") * (1 << 20)))
HOSTILE: dict[str, tuple[bytes, str]] = {
    "other format": (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
    "short": (b"GG", "not a GGUF file"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "only magic": (b"GGUF", "a number needs 4 bytes"),
    "version 1": (gguf_file(version=1), "version 1"),
    "version 4": (gguf_file(version=4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "other byte order"),
    "values": (gguf_file(num_values=1 << 60), "a count of 1152921504606846976 metadata values"),
    "tensors": (gguf_file(num_tensors=1 << 63), "a count of 9223372036854775808 tensors"),
    "key length": (gguf_file([struct.pack("<Q", 1 << 62) + bytes(9)]), "a key of"),
    "key not UTF-8": (gguf_file([pair(b"\xff\xfe", 4, bytes(4))]), "not UTF-8"),
    "text not UTF-8": (gguf_file([pair("k", 8, text(b"\xc3"))]), "'k'.*not UTF-8"),
    "text length": (
        gguf_file([pair("k", 8, struct.pack("<Q", 1 << 40))]),
        "a text of 1099511627776",
    ),
    "key twice": (gguf_file([pair("k", 0, b"\1"), pair("k", 0, b"\1")]), "the key stands twice"),
    "no such type": (gguf_file([pair("k", 13, bytes(8))]), "no metadata type 13"),
    "no such element": (gguf_file([pair("k", 9, array(99, 1, bytes(8)))]), "no metadata type 99"),
    "boolean": (gguf_file([pair("k", 7, b"\2")]), "neither 0 nor 1"),
    "array length": (gguf_file([pair("k", 9, array(5, 1 << 61, b""))]), "an array of"),
    "texts": (gguf_file([pair("k", 9, array(8, 1 << 50, b""))]), "an array of"),
    "nesting": (gguf_file([NESTED]), "an array of 1048576 arrays"),
    "alignment": (gguf_file(ALIGNED), "24 is not a power of two"),
    "alignment 0": (gguf_file([pair("general.alignment", 4, bytes(4))]), "0 is not a power of"),
    "alignment's type": (gguf_file([pair("general.alignment", 8, text("32"))]), "'32' is not"),
    "no name": (gguf_file([], [entry("", [1], F32, 0)], bytes(4)), "names have 1 to 63"),
    "long name": (gguf_file([], [entry("n" * 64, [1], F32, 0)], bytes(4)), "names have 1 to 63"),
    "no dimension": (gguf_file([], [entry("t", [], F32, 0)], bytes(32)), "0 dimensions"),
    "dimensions": (gguf_file([], [entry("t", [1] * 5, F32, 0)], bytes(4)), "5 dimensions"),
    "many dimensions": (
        gguf_file([], [text("t") + struct.pack("<I", 0xFFFFFFFF) + bytes(64)]),
        "4294967295 dimensions",
    ),
    "empty": (gguf_file([], [entry("t", [0, 1 << 63], F32, 0)], bytes(4)), "empty or absurd"),
    "overflow": (gguf_file([], [entry("t", [1 << 33, 1 << 33], F32, 0)]), "empty or absurd"),
    "huge": (gguf_file([], [entry("t", [1 << 40], F32, 0)], bytes(8)), "truncated"),
    "unknown type": (gguf_file([], [entry("t", [32], 4, 0)], bytes(64)), "number 4 is a type"),
    "unread type": (gguf_file([], [entry("t", [256], IQ2_XXS, 0)], bytes(66)), "IQ2_XXS"),
    "row": (gguf_file([], [entry("t", [33], Q4_0, 0)], bytes(64)), "do not divide into Q4_0"),
    "truncated": (gguf_file([], [entry("t", [64, 2], Q4_0, 0)], bytes(71)), "truncated"),
    "offset": (gguf_file([], [entry("t", [1], F32, 1 << 62)], bytes(4)), "truncated"),
    "misaligned": (gguf_file([], [entry("t", [1], F32, 4)], bytes(8)), "not aligned to 32"),
    "overlap": (
        gguf_file([], [entry("a", [16], F32, 0), entry("b", [1], F32, 32)], bytes(64)),
        "'b'.*overlaps",
    ),
    "name twice": (
        gguf_file([], [entry("t", [1], F32, 0), entry("t", [1], F32, 32)], bytes(36)),
        "the name stands twice",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_with_its_place(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=f"(?s){message}") as caught:
        GGUFFile(path)
    assert "hostile.gguf" in caught.value.what
    assert caught.value.remedy


def test_missing_empty_and_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(BadInputError, match="is empty"):
        GGUFFile(tmp_path / "empty.gguf")
    with pytest.raises(BadInputError, match="No such file"):
        GGUFFile(tmp_path / "none.gguf")
    with pytest.raises(BadInputError, match="directory"):
        GGUFFile(tmp_path)


def test_a_count_costs_no_memory_before_it_is_held_against_the_file() -> None:
    hostile = [content for content, _ in HOSTILE.values()]
    tracemalloc.start()
    try:
        for content in hostile:
            with pytest.raises(BadInputError):
                parse_header(Path("hostile.gguf"), content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 22


def _check(tmp_path: Path, content: bytes) -> None:
    """A file is refused in words, or read as the `gguf` package reads it."""
    path = tmp_path / "fuzzed.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        file = GGUFFile(path)
    except BadInputError:
        file = None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1 << 22
    if file is not None:
        assert_same_as_package(path, file)


def _flips() -> st.SearchStrategy[Callable[[bytes], bytes]]:
    size = len(sample())

    def overwrite(offset: int, patch: bytes) -> Callable[[bytes], bytes]:
        return lambda raw: (raw[:offset] + patch + raw[offset + len(patch) :])[: len(raw)]

    numbers = st.one_of(
        st.integers(0, 255).map(lambda n: bytes([n])),
        st.integers(0, (1 << 32) - 1).map(lambda n: struct.pack("<I", n)),
        st.one_of(st.integers(0, 600), st.integers(0, (1 << 64) - 1)).map(
            lambda n: struct.pack("<Q", n)
        ),
    )
    patches = st.builds(overwrite, st.integers(0, size - 1), numbers)
    cuts = st.integers(0, size).map(lambda n: lambda raw: raw[:n])
    inserts = st.builds(
        lambda offset, more: lambda raw: raw[:offset] + more + raw[offset:],
        st.integers(0, size),
        st.binary(min_size=1, max_size=40),
    )
    return st.one_of(patches, patches, cuts, inserts)


@settings(
    max_examples=600,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(_flips(), min_size=1, max_size=4))
def test_a_damaged_file_is_refused_or_read_as_in_the_gguf_package(
    tmp_path: Path, changes: list[Callable[[bytes], bytes]]
) -> None:
    content = sample()
    for change in changes:
        content = change(content)
    _check(tmp_path, content)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.integers(0, 1 << 64).filter(lambda n: n < 1 << 64),
    st.integers(0, (1 << 64) - 1),
    st.binary(max_size=300),
)
def test_any_counts_before_any_bytes_are_refused_or_read(
    tmp_path: Path, num_tensors: int, num_values: int, rest: bytes
) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, num_tensors % 5, num_values % 5)
    _check(tmp_path, head + rest)
    _check(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_values) + rest)
