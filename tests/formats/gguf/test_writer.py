from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from llmopt.errors import BadInputError, StorageError
from llmopt.formats.gguf.file import GGUFFile
from llmopt.formats.gguf.record import (
    TENSOR_DATA_KEY,
    VERDICT_KEY,
    check_tensor_data,
    read_verdict,
    set_verdict,
)
from llmopt.formats.gguf.values import (
    TypedValue,
    boolean,
    booleans,
    float32,
    float32s,
    int32s,
    string,
    strings,
    uint32,
)
from llmopt.formats.gguf.writer import TensorEntry, write_gguf
from llmopt.quantization.ggml.types import GGML_TYPES

METADATA: dict[str, TypedValue] = {
    "general.name": string("Näme"),
    "llama.block_count": uint32(2),
    "llama.rope.freq_base": float32(10000.0),
    "tokenizer.ggml.add_bos_token": boolean(False),
    "tokenizer.ggml.tokens": strings(["a", "", "é"]),
    "tokenizer.ggml.scores": float32s([0.5, -1.0]),
    "tokenizer.ggml.token_type": int32s([1, 3]),
    "x.pattern": booleans([True, False]),
}
ENTRIES = (
    TensorEntry("token_embd.weight", GGML_TYPES["Q4_0"], (3, 64)),
    TensorEntry("output_norm.weight", GGML_TYPES["F32"], (5,)),
    TensorEntry("blk.0.ffn_up_exps.weight", GGML_TYPES["Q8_0"], (2, 2, 32)),
)


def packed(entry: TensorEntry) -> Tensor:
    rows = entry.shape[:-1] or (1,)
    count = entry.num_bytes
    return torch.arange(count).add(len(entry.name)).to(torch.uint8).view(*rows, -1)


def write(path: Path) -> str:
    return write_gguf(path, "llama", METADATA, ENTRIES, packed)


def test_what_is_written_is_read_by_us_and_by_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    digest = write(path)
    file = GGUFFile(path)
    assert list(file.metadata) == [
        "general.architecture",
        *METADATA,
        VERDICT_KEY,
        TENSOR_DATA_KEY,
    ]
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["tokenizer.ggml.tokens"] == ("a", "", "é")
    np.testing.assert_array_equal(file.metadata["x.pattern"], [True, False])
    assert file.metadata[TENSOR_DATA_KEY] == digest
    assert file.names == tuple(entry.name for entry in ENTRIES)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for entry in ENTRIES:
        assert torch.equal(file.data(entry.name), packed(entry))
        assert file.info(entry.name).shape == entry.shape
        assert tensors[entry.name].data.tobytes() == packed(entry).numpy().tobytes()
    assert [found.name for found in tmp_path.iterdir()] == ["m.gguf"]


def test_a_verdict_replaces_another_without_moving_a_tensor(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    digest = write(path)
    before = path.read_bytes()
    assert read_verdict(GGUFFile(path)) == {}
    set_verdict(path, {"outcome": "inconclusive", "margin": 0.1})
    set_verdict(path, {"outcome": "päss"})
    assert read_verdict(GGUFFile(path)) == {"outcome": "päss"}
    after = path.read_bytes()
    assert len(after) == len(before)
    changed = [index for index, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    start = GGUFFile(path).header.value_offsets[VERDICT_KEY] + 8
    assert start <= changed[0] and changed[-1] < start + 1024
    assert check_tensor_data(path) == digest
    assert (
        gguf.GGUFReader(path).fields[VERDICT_KEY].contents().rstrip() == '{"outcome":"p\\u00e4ss"}'
    )


def test_a_verdict_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf")
    before = (tmp_path / "m.gguf").read_bytes()
    with pytest.raises(BadInputError, match="1040 bytes as JSON.*room for 1024"):
        set_verdict(tmp_path / "m.gguf", {"why": "x" * 1030})
    assert (tmp_path / "m.gguf").read_bytes() == before
    set_verdict(tmp_path / "m.gguf", {"why": "x" * 1014})
    assert read_verdict(GGUFFile(tmp_path / "m.gguf")) == {"why": "x" * 1014}


def test_a_changed_tensor_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInputError, match="are not those that llmopt wrote"):
        check_tensor_data(path)
    content[-1] ^= 1
    path.write_bytes(bytes(content) + b"\0")
    with pytest.raises(BadInputError, match="are not those that llmopt wrote"):
        check_tensor_data(path)


def test_files_of_others_have_no_record(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string(VERDICT_KEY, "not JSON")
    writer.add_tensor("t", np.zeros(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadInputError, match="has no llmopt.tensor_data.sha256"):
        check_tensor_data(path)
    with pytest.raises(BadInputError, match="has 8 bytes, not 1024"):
        set_verdict(path, {})
    with pytest.raises(BadInputError, match="is not a JSON object"):
        read_verdict(GGUFFile(path))


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_write_leaves_nothing(after: int, tmp_path: Path) -> None:
    calls = 0

    def interrupted(entry: TensorEntry) -> Tensor:
        nonlocal calls
        if calls == after:
            raise KeyboardInterrupt
        calls += 1
        return packed(entry)

    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path / "m.gguf", "llama", METADATA, ENTRIES, interrupted)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path) -> None:
    def full(_: TensorEntry) -> Tensor:
        raise OSError(28, "No space left on device")

    write(tmp_path / "m.gguf")
    before = (tmp_path / "m.gguf").read_bytes()
    with pytest.raises(StorageError, match="No space left on device"):
        write_gguf(tmp_path / "m.gguf", "llama", METADATA, ENTRIES, full)
    assert (tmp_path / "m.gguf").read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["m.gguf"]


PEAK = """
import sys, resource, torch
from pathlib import Path
from llmopt.formats.gguf.writer import TensorEntry, write_gguf
from llmopt.quantization.ggml.types import GGML_TYPES
entries = [TensorEntry(f"t{i}", GGML_TYPES["F32"], (1024, 4096)) for i in range(12)]
def packed(entry): return torch.full((1024, 4 * 4096), 1, dtype=torch.uint8)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_gguf(Path(sys.argv[1]), "llama", {}, entries[:1], packed)
before = peak()
write_gguf(Path(sys.argv[1]), "llama", {}, entries, packed)
print(peak() - before)
"""


def test_the_peak_is_that_of_one_tensor(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PEAK, str(tmp_path / "m.gguf")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    unit = 1024 if sys.platform == "linux" else 1
    assert grown * unit < 2 * (1 << 24)  # twelve tensors of 16 MiB, after one


def test_a_small_limit_of_file_size_is_reported(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from llmopt.errors import StorageError\n"
        "from llmopt.formats.gguf.writer import TensorEntry, write_gguf\n"
        "from llmopt.quantization.ggml.types import GGML_TYPES\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "entry = TensorEntry('t', GGML_TYPES['F32'], (1024, 1024))\n"
        "try:\n"
        "    write_gguf(Path(sys.argv[1]), 'llama', {}, [entry],\n"
        "               lambda e: torch.zeros(1024, 4096, dtype=torch.uint8))\n"
        "except StorageError as error:\n"
        "    print(error.what)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "m.gguf")]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "cannot write" in found
    assert list(tmp_path.iterdir()) == []
