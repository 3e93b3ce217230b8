"""llama.cpp tokenizes as the source does, by the metadata we write, for every kind of tokenizer.

Where it does not, it does what our own rewriting of it says, so what is refused is refused rightly.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import gguf
import pytest
import yaml
from interop.protocol import CONSUMERS_FOLDER
from support.tokenizers_of_each_kind import (
    END,
    byte_level,
    character_map,
    isolating,
    lines,
    save,
    sentencepiece,
    training_text,
    unigram,
)
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from llmopt.bench.environments import clean_variables
from llmopt.formats.gguf.tokenizer import tokenizer_metadata
from llmopt.formats.gguf.tokenizer.candidate import token_values
from llmopt.formats.gguf.tokenizer.definition import define
from llmopt.formats.gguf.tokenizer.engine import Engine, byte_level_bpe
from llmopt.formats.gguf.tokenizer.pre_tokenizers import known_pre_tokenizers
from llmopt.formats.gguf.tokenizer.probes import (
    DECOMPOSED_LINES,
    LINES,
    SPACED_LINES,
    class_strings,
)
from llmopt.formats.gguf.tokenizer.vocabulary import build_vocabulary
from llmopt.formats.gguf.values import TypedValue, strings

pytestmark = [pytest.mark.interop, pytest.mark.parametrize("python", ["llama-cpp"], indirect=True)]

SIZE = 1250
PLAIN = [*LINES, *lines(training_text(), 300)]
ODD = [*SPACED_LINES, *DECOMPOSED_LINES, *class_strings()[::8]]
BESIDE = [f"Hello {token} world, {token}this" for token in (END, "<s>", "</s>", "<unk>")]
TABLE: list[dict[str, Any]] = yaml.safe_load(
    resources.files("llmopt.formats.gguf.tokenizer")
    .joinpath("pre_tokenizers.yaml")
    .read_text("utf-8")
)["pre_tokenizers"]
APPROXIMATE = ("tekken", "gpt-4o", "granite-embed-multi-97m")
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
T5 = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


@dataclass(frozen=True, slots=True)
class Kind:
    tokenizer: Tokenizer
    names: Mapping[str, str]
    texts: Sequence[str]


def cut_by(definition: Sequence[str]) -> Tokenizer:
    punctuation = pre_tokenizers.Punctuation("contiguous")
    return byte_level(
        [punctuation if step.startswith("punct") else isolating(step) for step in definition],
        special=(END, "<s>"),
    )


def kinds() -> dict[str, Kind]:
    """Every kind that is accepted, with texts that llama.cpp is to tokenize alike."""
    found = {
        f"{row['name']} {index}": Kind(cut_by(definition), {}, [*PLAIN, *ODD, *BESIDE])
        for row in TABLE
        for index, definition in enumerate(row["definitions"])
        if row["name"] not in APPROXIMATE
    }
    composing = cut_by(TABLE[3]["definitions"][0])
    composing.normalizer = normalizers.NFC()
    found["composing"] = Kind(composing, {}, PLAIN)
    dressed = cut_by(TABLE[0]["definitions"][0])
    dressed.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {END}",
        special_tokens=[(text, dressed.token_to_id(text)) for text in ("<s>", END)],
    )
    found["dressed"] = Kind(dressed, {"bos_token": "<s>"}, [*PLAIN, *ODD, *BESIDE])
    for prefix in ("prepend", "none"):
        found[prefix] = Kind(sentencepiece(prefix), LLAMA, [*PLAIN, *ODD, *BESIDE])
    # transformers' Metaspace puts no space before a text that begins with one; llama.cpp does.
    unspaced = [text for text in [*PLAIN, *ODD] if not text[0].isspace()]
    found["metaspace"] = Kind(sentencepiece("metaspace"), LLAMA, unspaced)
    found["unigram"] = Kind(unigram(), T5, unspaced)
    spaces = character_map({"\n": " ", "\t": " ", "\r": " ", "`": "'", "~": "<tilde>"})
    # The library's map swallows a mark that follows what it replaces, so odd texts are left out.
    found["as T5's"] = Kind(unigram(charsmap=spaces), T5, [text.strip() for text in PLAIN])
    return found


def test_every_kind_is_tokenized_as_its_source_does(python: Path, tmp_path: Path) -> None:
    chosen, jobs, sources = kinds(), [], {}
    for name, kind in chosen.items():
        folder = save(kind.tokenizer, tmp_path / name, **kind.names)
        found = tokenizer_metadata(folder, SIZE)
        jobs.append({"file": write(found.values, tmp_path / f"{name}.gguf"), "texts": kind.texts})
        sources[name] = AutoTokenizer.from_pretrained(folder)
    for (name, kind), answer in zip(chosen.items(), ask(python, jobs, tmp_path), strict=True):
        for dressed, theirs in ((False, answer["bare"]), (True, answer["dressed"])):
            ours = sources[name](list(kind.texts), add_special_tokens=dressed)["input_ids"]
            compare(name, kind.texts, ours, theirs)
        assert answer["ends"] == [sources[name].eos_token_id], name


def test_what_is_refused_llama_cpp_does_as_we_say(python: Path, tmp_path: Path) -> None:
    rows = [row for row in known_pre_tokenizers() if row.name in APPROXIMATE]
    definition = define(cut_by(TABLE[0]["definitions"][0]))
    vocabulary = build_vocabulary(definition, SIZE, byte_tokens=False)
    texts = [*PLAIN, *ODD]
    jobs, engines = [], []
    for row in rows:
        values = token_values("gpt2", row.name, vocabulary)
        values["tokenizer.ggml.merges"] = strings([" ".join(pair) for pair in definition.merges])
        jobs.append({"file": write(values, tmp_path / f"{row.name}.gguf"), "texts": texts})
        model = byte_level_bpe(
            vocabulary, definition.merges, row.chain, ignore_merges=row.ignore_merges
        )
        engines.append(Engine.of(vocabulary, model))
    for row, engine, answer in zip(rows, engines, ask(python, jobs, tmp_path), strict=True):
        compare(row.name, texts, [engine.encode(text) for text in texts], answer["bare"])


def compare(
    name: str, texts: Sequence[str], ours: Sequence[list[int]], theirs: Sequence[list[int]]
) -> None:
    for text, wanted, found in zip(texts, ours, theirs, strict=True):
        assert found == wanted, (name, text)


def write(values: Mapping[str, TypedValue], file: Path) -> str:
    """A file with a vocabulary and no tensors."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(SIZE)
    for key, value in values.items():
        element = None if value.element is None else gguf.GGUFValueType(value.element)
        writer.add_key_value(key, value.value, gguf.GGUFValueType(value.type), element)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return str(file)


def ask(python: Path, jobs: Sequence[Mapping[str, object]], folder: Path) -> list[dict[str, Any]]:
    request, response = folder / "request.json", folder / "response.json"
    request.write_text(json.dumps(jobs), "utf-8")
    script = CONSUMERS_FOLDER / "tokenize_with_llama_cpp.py"
    done = subprocess.run(
        [str(python), str(script), str(request), str(response)],
        cwd=folder,
        env=clean_variables(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    answers: list[dict[str, Any]] = json.loads(response.read_text("utf-8"))
    return answers
