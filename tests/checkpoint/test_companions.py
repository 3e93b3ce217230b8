from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from llmopt.checkpoint.companions import copy_companions, plan_companions
from llmopt.errors import BadInputError, StorageError

CARRIED = [
    "LICENSE", "README.md", "additional_chat_templates/tool.jinja", "chat_template.jinja",
    "generation_config.json", "merges.txt", "preprocessor_config.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "vocab.json",
]  # fmt: skip
LEFT_OUT = {
    ".gitattributes": "hidden",
    ".cache/": "hidden",
    "original/": "another layout",
    "config.json": "written anew",
    "model.safetensors.index.json": "written anew",
    "pytorch_model.bin.index.json": "written anew",
    "llmopt.json": "a report on the source",
    "report.html": "a report on the source",
    "conversion.json": "a report on the source",
    "model-00001-of-00002.safetensors": "ledger",
    "consolidated.safetensors": "another format",
    "pytorch_model.bin": "another format",
    "consolidated.00.pth": "another format",
    "model-q4.gguf": "another format",
    "onnx/model.onnx": "another format",
    "modeling_x.py": "Python code",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    for number, name in enumerate([*CARRIED, *LEFT_OUT]):
        file = path / (f"{name}inside" if name.endswith("/") else name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes([number, 0, 255, 13, 10]) * (number + 1))
    return path


def test_every_other_file_is_carried_byte_for_byte(source: Path, tmp_path: Path) -> None:
    destination = tmp_path / "out"
    copied = copy_companions(source, destination).copied
    assert sorted(record.source_file for record in copied) == sorted(CARRIED)
    for record in copied:
        content = (source / record.source_file).read_bytes()
        assert (destination / record.file).read_bytes() == content
        assert record.sha256 == hashlib.sha256(content).hexdigest()
        assert record.num_bytes == len(content)
        renamed = record.source_file == "README.md"
        assert record.file == ("README.source.md" if renamed else record.source_file)
    written = [str(p.relative_to(destination)) for p in destination.rglob("*") if p.is_file()]
    assert sorted(written) == sorted(record.file for record in copied)


def test_what_is_left_out_is_listed_with_its_reason(source: Path, tmp_path: Path) -> None:
    left_out = {x.file: x.reason for x in copy_companions(source, tmp_path / "out").left_out}
    assert set(left_out) == set(LEFT_OUT)
    assert all(reason in left_out[file] for file, reason in LEFT_OUT.items())


def test_the_plan_is_what_is_copied(source: Path, tmp_path: Path) -> None:
    plan = plan_companions(source)
    companions = copy_companions(source, tmp_path / "out")
    assert plan.files == tuple(record.source_file for record in companions.copied)
    assert plan.left_out == companions.left_out
    assert plan.num_bytes == sum(record.num_bytes for record in companions.copied)


def test_two_readmes_do_not_write_over_each_other(source: Path, tmp_path: Path) -> None:
    (source / "README.source.md").write_text("older")
    companions = copy_companions(source, tmp_path / "out")
    readme = (tmp_path / "out" / "README.source.md").read_bytes()
    assert readme == (source / "README.md").read_bytes()
    assert "README.source.md" in {entry.file for entry in companions.left_out}


def test_links_as_in_a_download_cache(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"tokens")
    source = tmp_path / "snapshot"
    source.mkdir()
    (source / "tokenizer.json").symlink_to(tmp_path / "blob")
    (source / "linked").symlink_to(tmp_path)
    companions = copy_companions(source, tmp_path / "out")
    assert [entry.file for entry in companions.left_out] == ["linked/"]
    copy = tmp_path / "out" / "tokenizer.json"
    assert copy.read_bytes() == b"tokens" and not copy.is_symlink()
    (tmp_path / "blob").unlink()
    with pytest.raises(BadInputError, match="link to a file that is not there"):
        plan_companions(source)


def test_a_disk_that_gives_back_other_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmopt.checkpoint.companions.file_sha256", lambda _: "0" * 64)
    with pytest.raises(StorageError, match="does not hold the bytes"):
        copy_companions(source, tmp_path / "out")


def test_a_full_disk(source: Path, small_disk: Path) -> None:
    (source / "tokenizer.json").write_bytes(b"x" * (2 << 20))
    with pytest.raises(StorageError, match=r"cannot write .*tokenizer\.json"):
        copy_companions(source, small_disk / "out")
