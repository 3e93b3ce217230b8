import hashlib

from llmopt.report.card import write_card
from llmopt.report.html import write_html
from llmopt.report.integrity import changed_files, hash_files
from llmopt.report.json_file import write_json


def _artifact(tmp_path, make_report):
    for name, content in {
        "config.json": b"{}",
        "model.safetensors": bytes(range(256)) * 5000,
        "extra/vocab.txt": b"a\nb\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return make_report(files=hash_files(tmp_path))


def test_hashes_cover_every_file_but_the_reports_own(tmp_path, make_report):
    report = _artifact(tmp_path, make_report)
    for write in (write_json, write_card, write_html):
        write(report, tmp_path)
    assert list(hash_files(tmp_path)) == ["config.json", "extra/vocab.txt", "model.safetensors"]
    record = report.files["model.safetensors"]
    assert record.num_bytes == 256 * 5000
    assert record.sha256 == hashlib.sha256(bytes(range(256)) * 5000).hexdigest()
    assert changed_files(tmp_path, report) == []


def test_a_byte_changed_is_noticed(tmp_path, make_report):
    report = _artifact(tmp_path, make_report)
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # the size stays
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert changed_files(tmp_path, report) == ["changed: model.safetensors"]


def test_missing_added_and_longer_files_are_noticed(tmp_path, make_report):
    report = _artifact(tmp_path, make_report)
    (tmp_path / "extra/vocab.txt").unlink()
    (tmp_path / "chat_template.jinja").write_text("x")
    (tmp_path / "extra/llmopt.json").write_text("{}")  # only the top one is the report's
    (tmp_path / "config.json").write_text("{} ")
    assert changed_files(tmp_path, report) == [
        "added: chat_template.jinja",
        "changed: config.json",
        "added: extra/llmopt.json",
        "missing: extra/vocab.txt",
    ]
