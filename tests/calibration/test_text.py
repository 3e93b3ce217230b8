"""Text sources: each kind read, each bad one refused with its place."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmopt.calibration.documents import Document
from llmopt.calibration.split import sample_documents, split_documents
from llmopt.calibration.text import (
    is_data_set,
    join_paragraphs,
    parse_hub_name,
    read_documents,
    same_source,
)
from llmopt.errors import BadInputError


class TemplateTokenizer:
    chat_template = "a template"

    def apply_chat_template(self, conversation, *, tokenize=True):
        assert tokenize is False
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in conversation)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_txt_is_cut_at_blank_lines_and_small_paragraphs_are_joined(tmp_path):
    paragraphs = ["a" * 600, "b" * 600, "c" * 1500, "d" * 10]
    path = tmp_path / "book.txt"
    path.write_text("\ufeff" + "\r\n \r\n".join(paragraphs), encoding="utf-8", newline="")
    documents = read_documents(path)
    assert [d.text for d in documents] == ["\n\n".join(paragraphs[:2]), *paragraphs[2:]]
    assert len({d.name for d in documents}) == 3


def test_join_keeps_every_paragraph_in_order():
    text = "\n\n\n".join(f"paragraph {i} " + "x" * (i * 37 % 90) for i in range(50))
    joined = "\n\n".join(join_paragraphs(text, min_chars=100))
    assert [p.split()[1] for p in joined.split("\n\n")] == [str(i) for i in range(50)]
    assert all(len(p) >= 100 for p in join_paragraphs(text, min_chars=100)[:-1])


def test_jsonl_text_rows_skip_blank_ones(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": "one"}, {"text": " "}, {"text": "two"}])
    assert [(d.name, d.text) for d in read_documents(path)] == [
        ("t.jsonl:1", "one"),
        ("t.jsonl:3", "two"),
    ]
    assert [d.text for d in read_documents(path, max_documents=1)] == ["one"]


@pytest.mark.parametrize(
    ("row", "rendered"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, "<user>hi"),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
            "<user>hi<assistant>yo",
        ),
        ({"prompt": "p", "completion": "c"}, "<user>p<assistant>c"),
        ({"instruction": "i", "input": "x", "output": "o"}, "<user>i\n\nx<assistant>o"),
        ({"instruction": "i", "input": "", "output": "o"}, "<user>i<assistant>o"),
    ],
)
def test_conversations_go_through_the_chat_template(tmp_path, row, rendered):
    path = write_jsonl(tmp_path / "c.jsonl", [row])
    assert read_documents(path, tokenizer=TemplateTokenizer())[0].text == rendered
    with pytest.raises(BadInputError, match=r"c\.jsonl line 1 .*no chat template"):
        read_documents(path)


def test_a_template_that_refuses_names_the_row(tmp_path):
    import jinja2

    class Refusing(TemplateTokenizer):
        def apply_chat_template(self, conversation, *, tokenize=True):
            raise jinja2.TemplateError("roles must alternate")

    path = write_jsonl(tmp_path / "c.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(BadInputError, match="line 1.*roles must alternate"):
        read_documents(path, tokenizer=Refusing())


def test_parquet_rows_of_both_kinds(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": [f"document {i}" for i in range(2000)]}), path)
    documents = read_documents(path)
    assert documents[1999] == Document("t.parquet:1999", "document 1999")

    pq.write_table(pa.table({"messages": [[{"role": "user", "content": "hi"}]]}), path)
    assert read_documents(path, tokenizer=TemplateTokenizer())[0].text == "<user>hi"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"bad\.jsonl is empty"),
        (b'{"text": "a"}\n{"text": \n', r"line 2 is not JSON"),
        (b'{"text": "a"}\n\xff\n', r"line 2 is not UTF-8"),
        (b"[1]\n", r"line 1 is not a JSON object"),
        (b'{"text": 3}\n', r"line 1: `text` is int"),
        (b'{"title": "a", "body": "b"}\n', r"line 1 has no usable column \(there are: title, body"),
        (b'{"messages": []}\n', r"line 1: `messages` is not a list of turns"),
        (b'{"messages": [{"role": "user"}]}\n', r"line 1: a turn of `messages` lacks"),
        (b'{"conversations": [{"from": "cat", "value": "m"}]}\n', r"unknown speaker 'cat'"),
        (b'{"text": " "}\n', r"holds no text"),
    ],
)
def test_bad_rows_are_refused_with_their_place(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=message):
        read_documents(path, tokenizer=TemplateTokenizer())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"", "is empty"),
        ("t.txt", b" \n\n ", "holds no text"),
        ("t.txt", b"caf\xe9", "not UTF-8"),
        ("t.csv", b"a,b", r"unknown suffix '\.csv'"),
        ("t.parquet", b"nonsense", "not readable parquet"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=message):
        read_documents(path)


def test_absent_files_directories_and_odd_names_are_refused(tmp_path):
    with pytest.raises(BadInputError, match="does not exist"):
        read_documents(tmp_path / "absent.txt")
    with pytest.raises(BadInputError, match="is a directory"):
        read_documents(tmp_path)
    with pytest.raises(BadInputError, match="neither a file nor a data set"):
        read_documents("builtim")


@pytest.mark.parametrize(
    ("source", "parsed"),
    [
        ("a/b", ("a/b", None, "train")),
        ("a/b:test", ("a/b", None, "test")),
        ("a/b:train[:10]", ("a/b", None, "train[:10]")),
        ("a/b:wikitext-2-raw-v1", ("a/b", "wikitext-2-raw-v1", "train")),
        ("a/b:cfg:validation", ("a/b", "cfg", "validation")),
        ("a/b:cfg:train[1:2]", ("a/b", "cfg", "train[1:2]")),
    ],
)
def test_hub_names(source, parsed):
    assert parse_hub_name(source) == parsed


@pytest.mark.parametrize("source", ["a b/c", "a/b:", "a/b::test", ""])
def test_malformed_hub_names_are_refused(source):
    with pytest.raises(BadInputError, match="not of the form"):
        parse_hub_name(source)


def test_hub_rows_and_streaming(monkeypatch):
    import datasets

    asked = []

    def load(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [d.name for d in read_documents("hf:a/b:cfg:test")] == ["a/b:0", "a/b:1"]
    assert [d.text for d in read_documents("a/b", max_documents=1)] == ["one"]
    assert asked == [("a/b", "cfg", "test", False), ("a/b", None, "train", True)]
    # The hub client refuses to stream a slice.
    assert len(read_documents("a/b:train[:9]", max_documents=1)) == 1
    assert asked[2:] == [("a/b", None, "train[:9]", False)]


def test_sources_are_told_apart_however_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("text")
    assert is_data_set("hf:a/b") and is_data_set("a/c:test") and not is_data_set("a/b")
    assert not is_data_set("builtin") and not is_data_set("a/t.txt")
    assert same_source("a/b", tmp_path / "a" / ".." / "a" / "b")
    assert same_source("hf:a/c", "a/c:train") and not same_source("a/c:test", "a/c")
    assert same_source("builtin", "builtin") and not same_source("a/b", "hf:a/b")


def test_an_unreachable_hub_is_a_clear_error(monkeypatch):
    import datasets

    def load(*_, **__):
        raise ConnectionError("could not reach the hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(BadInputError, match="a/b could not be read: could not reach the hub") as e:
        read_documents("hf:a/b")
    assert "without a network" in e.value.remedy and "long trace" not in e.value.what


@pytest.mark.parametrize(
    ("package", "source"), [("pyarrow", "t.parquet"), ("datasets", "hf:owner/name")]
)
def test_a_missing_extra_names_the_command(tmp_path, monkeypatch, package, source):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadInputError) as error:
        read_documents(source)
    assert package in error.value.what and error.value.remedy == 'pip install "llmopt[data]"'


def test_split_is_disjoint_stable_and_near_the_share():
    documents = [Document(f"d{i}", f"text number {i}") for i in range(2000)]
    calibration, evaluation = split_documents(documents, 0.2, seed=3)
    assert sorted(d.name for d in calibration + evaluation) == sorted(d.name for d in documents)
    assert abs(len(evaluation) / 2000 - 0.2) < 0.04
    # Order, company and name do not move a document; its copy goes with it; another seed does.
    more = [Document("copy", evaluation[0].text), *reversed(documents), Document("new", "new")]
    evaluation_2 = split_documents(more, 0.2, seed=3)[1]
    assert {d.text for d in evaluation} == {d.text for d in evaluation_2} - {"new"}
    assert {d.name for d in split_documents(documents, 0.2, seed=4)[1]} != {
        d.name for d in evaluation
    }


def test_split_refuses_an_empty_side_and_a_bad_share():
    with pytest.raises(BadInputError, match="too few"):
        split_documents([Document("a", "a")], 0.5, seed=0)
    with pytest.raises(BadInputError, match="between 0 and 1"):
        split_documents([Document("a", "a"), Document("b", "b")], 1.0, seed=0)


class WordTokenizer:
    """A token a letter; no prefix."""

    bos_token_id = None

    def __init__(self):
        self.num_texts = 0

    def __call__(self, texts, **_):
        self.num_texts += len(texts)
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def sample(documents, max_tokens, min_documents=5):
    return sample_documents(
        documents, WordTokenizer(), max_tokens=max_tokens, min_documents=min_documents
    )


def test_a_text_within_the_limit_is_kept_whole_and_in_order():
    documents = [Document(f"d{i}", chr(97 + i) * (5 + 60 * (i == 3))) for i in range(8)]
    kept = sample(documents, 100)
    assert [(name, "".join(map(chr, ids))) for name, ids in kept.documents] == [
        (d.name, d.text) for d in documents
    ]
    assert (kept.num_left_out, kept.num_shortened) == (0, 0)


def test_a_text_beyond_the_limit_is_sampled_by_its_texts_alone():
    documents = [Document(f"d{i}", f"number {i:4}") for i in range(1_000)]
    kept = sample(documents, 110)
    names = [name for name, _ in kept.documents]
    assert len(names) == 10 and kept.num_left_out == 990 and kept.num_shortened == 0
    assert names == sorted(names, key=lambda name: int(name[1:])) and int(names[-1][1:]) > 300
    again = sample([Document("new", "number 5000"), *reversed(documents)], 110)
    assert len({name for name, _ in again.documents} - {"new"} - set(names)) == 0
    tokenizer = WordTokenizer()
    sample_documents(documents, tokenizer, max_tokens=110, min_documents=5)
    assert tokenizer.num_texts < 100, "all was tokenized"


def test_a_few_long_documents_cannot_be_all_of_a_sample():
    documents = [Document(f"d{i}", chr(97 + i) * 1_000) for i in range(12)]
    kept = sample(documents, 103)
    assert [len(ids) for _, ids in kept.documents] == [20] * 5
    assert (kept.num_left_out, kept.num_shortened) == (7, 5)
