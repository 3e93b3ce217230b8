"""Token blocks: BOS, packing, cutting, shuffling, and the counts that go with them."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llmopt.calibration.documents import Document
from llmopt.calibration.tokenizer import load_tokenizer, sequence_prefix
from llmopt.calibration.tokens import cut_blocks, tokenize_documents
from llmopt.errors import BadInputError


def byte_tokenizer(adds_bos: bool) -> PreTrainedTokenizerFast:
    """One token a byte; ids 0..255, ``<s>`` 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def plain(text: str) -> list[int]:
    return byte_tokenizer(False)(text)["input_ids"]


def cut(documents, tokenizer, num_samples, sequence_length, seed=0):
    return cut_blocks(
        documents, tokenizer, num_samples=num_samples, sequence_length=sequence_length, seed=seed
    )


def test_prefix_is_what_the_tokenizer_adds():
    assert sequence_prefix(byte_tokenizer(True)) == [256]
    assert sequence_prefix(byte_tokenizer(False)) == []


@pytest.mark.parametrize("adds_bos", [True, False])
def test_every_block_begins_as_one_sequence_does(adds_bos):
    tokenizer = byte_tokenizer(adds_bos)
    documents = [Document(f"d{i}", chr(97 + i) * 45) for i in range(8)]
    result = cut(documents, tokenizer, num_samples=3, sequence_length=33)
    assert result.blocks.shape == (3, 33) and result.blocks.dtype == torch.int64
    assert (result.blocks[:, 0] == 256).all() == adds_bos
    assert int((result.blocks == 256).sum()) == 3 * adds_bos
    assert not result.coverage.has_pad_token


def test_long_documents_are_cut_and_counted():
    documents = [Document(f"d{i}", chr(97 + i) * (100 + i)) for i in range(4)]
    result = cut(documents, byte_tokenizer(True), num_samples=4, sequence_length=51)
    # One document a block while there are fresh ones.
    assert sorted(len(set(block[1:])) for block in result.blocks.tolist()) == [1, 1, 1, 1]
    assert len({block[1] for block in result.blocks.tolist()}) == 4
    coverage = result.coverage
    assert (coverage.documents_given, coverage.documents_used) == (4, 4)
    assert coverage.documents_truncated == 4
    assert (coverage.tokens_used, coverage.tokens_dropped) == (200, 406 - 200)


def test_rests_are_used_only_when_the_fresh_documents_are():
    documents = [Document("a", "a" * 120), Document("b", "b" * 60)]
    result = cut(documents, byte_tokenizer(False), num_samples=3, sequence_length=60)
    assert sorted("".join(map(chr, plain_of(block))) for block in result.blocks) == [
        "a" * 60,
        "a" * 60,
        "b" * 60,
    ]
    assert result.coverage.tokens_dropped == 0 and result.coverage.documents_truncated == 0


def plain_of(block):
    return [ord(c) for c in byte_tokenizer(False).decode(block)]


def test_short_documents_are_packed_with_a_blank_line_between():
    documents = [Document("a", "a" * 20), Document("b", "b" * 20), Document("c", "c" * 500)]
    result = cut(documents, byte_tokenizer(False), num_samples=1, sequence_length=400, seed=1)
    text = "".join(map(chr, plain_of(result.blocks[0])))
    parts = text.split("\n\n")
    assert all(len(set(part)) == 1 for part in parts)
    assert result.coverage.tokens_used == 400 - 2 * (len(parts) - 1)
    assert result.coverage.documents_used == len({part[0] for part in parts})


def test_a_rest_too_short_to_teach_is_dropped():
    documents = [Document("a", "a" * 75)]
    with pytest.raises(BadInputError, match="need 120 tokens, it has 75, enough for 1 blocks"):
        cut(documents, byte_tokenizer(False), num_samples=2, sequence_length=60)


def test_a_bos_of_the_documents_own_is_not_doubled():
    documents = [Document(f"d{i}", "<s>" * (i % 2) + chr(97 + i) * 40) for i in range(5)]
    result = cut(documents, byte_tokenizer(True), num_samples=5, sequence_length=41)
    assert result.coverage.duplicated_bos_removed == 2
    assert int((result.blocks == 256).sum()) == 5
    kept = cut(documents, byte_tokenizer(False), num_samples=5, sequence_length=40)
    assert kept.coverage.duplicated_bos_removed == 0
    assert int((kept.blocks == 256).sum()) == 2


def test_the_seed_decides_the_order():
    documents = [Document(f"d{i}", chr(97 + i) * 30) for i in range(20)]
    tokenizer = byte_tokenizer(False)
    first = cut(documents, tokenizer, 5, 32, seed=1).blocks
    assert torch.equal(first, cut(documents, tokenizer, 5, 32, seed=1).blocks)
    assert not torch.equal(first, cut(documents, tokenizer, 5, 32, seed=2).blocks)
    assert [d.name for d in documents] == [f"d{i}" for i in range(20)]


@pytest.mark.parametrize(("num_samples", "sequence_length"), [(0, 64), (1, 16)])
def test_blocks_that_cannot_hold_text_are_refused(num_samples, sequence_length):
    with pytest.raises(BadInputError, match="cannot hold text"):
        cut([Document("a", "a" * 99)], byte_tokenizer(True), num_samples, sequence_length)


def test_documents_are_tokenized_without_prefix():
    documents = [Document("a", "<s>abc"), Document("b", "de")]
    found, removed = tokenize_documents(documents, byte_tokenizer(True))
    assert [(name, ids.tolist()) for name, ids in found] == [
        ("a", plain("abc")),
        ("b", plain("de")),
    ]
    assert removed == 1


def test_loader_refuses_a_directory_without_tokenizer(tmp_path):
    with pytest.raises(BadInputError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadInputError, match="could not be loaded"):
        load_tokenizer(tmp_path)


def test_loader_reports_a_class_that_overrides_the_files_pre_tokenizer(tmp_path):
    byte_tokenizer(True).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).disagreement is None

    config = {"tokenizer_class": "Qwen2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    loaded = load_tokenizer(tmp_path)  # Qwen2Tokenizer composes accents (NFC), the file does not
    assert loaded.disagreement is not None and "tokenizer.json" in loaded.disagreement
