from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from llmopt.checkpoint.safetensors_header import DTYPES, read_header
from llmopt.errors import BadInputError


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_header_agrees_with_the_reference_writer(tmp_path: Path) -> None:
    tensors = {
        name: torch.zeros(3, i + 1).to(dtype) for i, (name, dtype) in enumerate(DTYPES.items())
    }
    save_file(tensors, tmp_path / "all.safetensors")
    places = read_header(tmp_path / "all.safetensors")
    assert {name: (p.dtype, p.shape) for name, p in places.items()} == {
        name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()
    }
    ends = [place.offset + place.num_bytes for place in places.values()]
    assert [place.offset for place in places.values()][1:] == ends[:-1]
    assert ends[-1] == (tmp_path / "all.safetensors").stat().st_size


HOSTILE = {
    "overlap": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 2, 6)}, 6, "overlaps"),
    "same bytes": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, 4, "overlaps"),
    "hole": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 5, 9)}, 9, "hole"),
    "hole at start": ({"a": entry("U8", [4], 3, 7)}, 7, "hole"),
    "truncated": ({"a": entry("U8", [4], 0, 4)}, 3, "truncated"),
    "spare": ({"a": entry("U8", [4], 0, 4)}, 5, "1 bytes after"),
    "size": ({"a": entry("F16", [4], 0, 4)}, 4, "do not hold"),
    "negative": ({"a": entry("U8", [-2, -2], 0, 4)}, 4, "bad shape"),
    "bool": ({"a": entry("U8", [True, 4], 0, 4)}, 4, "bad shape"),
    "float": ({"a": entry("U8", [4.0], 0, 4)}, 4, "bad shape"),
    "wrap around": ({"a": entry("U8", [1 << 40, 1 << 40, 0], 0, 0)}, 0, "bad shape"),
    "dimensions": ({"a": entry("U8", [1] * 65, 0, 1)}, 1, "bad shape"),
    "backwards": ({"a": entry("U8", [4], 4, 0)}, 4, "bad offsets"),
    "negative offset": ({"a": entry("U8", [4], -4, 0)}, 4, "bad offsets"),
    "huge offset": ({"a": entry("U8", [4], 1 << 70, (1 << 70) + 4)}, 4, "bad offsets"),
    "unknown dtype": ({"a": entry("F3", [4], 0, 4)}, 4, "dtype 'F3'"),
    "dtype is a list": ({"a": entry(["U8"], [4], 0, 4)}, 4, "dtype"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, 4, "lacks"),
    "not an entry": ({"a": 3}, 0, "lacks"),
    "not JSON": (b"{'a': 1}", 0, "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', 0, "not JSON"),
    "a list": (b"[]", 0, "not a JSON object"),
    "nested": (b"[" * 200_000, 0, "not JSON"),
    "twice": (b'{"a": 1, "a": 2}', 0, "twice"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_unsound_headers_are_refused(
    case: str, tmp_path: Path, write_raw: Callable[[Path, object, int], Path]
) -> None:
    header, num_bytes, message = HOSTILE[case]
    path = write_raw(tmp_path / "x.safetensors", header, num_bytes)
    with pytest.raises(BadInputError, match=message) as caught:
        read_header(path)
    assert str(path) in caught.value.what and caught.value.remedy


@pytest.mark.parametrize("content", [b"", b"\x05", b"\xff" * 8, (1 << 40).to_bytes(8, "little")])
def test_a_header_longer_than_its_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match="truncated or not safetensors"):
        read_header(path)


def test_a_header_past_the_formats_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_009)
    with pytest.raises(BadInputError, match="a header of 100000001 bytes"):
        read_header(path)


def test_a_git_lfs_pointer_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(BadInputError, match="git-lfs pointer"):
        read_header(path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), flips=st.integers(1, 6), cut=st.integers(0, 40))
def test_no_damage_ends_in_anything_but_a_clear_error(
    seed: int, flips: int, cut: int, tmp_path: Path
) -> None:
    content = bytearray(save({"a": torch.ones(3, 5), "b": torch.ones(7, dtype=torch.int8)}))
    content = content[: len(content) - cut]
    rng = random.Random(seed)
    for _ in range(flips):
        content[rng.randrange(len(content))] = rng.randrange(256)
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    try:
        places = read_header(path)
    except BadInputError:
        return
    assert cut == 0
    assert all(place.offset + place.num_bytes <= len(content) for place in places.values())
