"""The two texts of a run: bounded, told apart, and cut to what the model can read."""

import json

import pytest
import torch
from support.small_jobs import make_text, small_recipe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import llmopt.texts
from llmopt.calibration.documents import Document
from llmopt.calibration.tokens import tokenize_documents
from llmopt.errors import BadInputError
from llmopt.texts import prepare_evaluation, prepare_texts


def letter_tokenizer(prefix=()):
    """A token a byte; ``prefix`` begins every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<t>"])
    if prefix:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=" ".join([*prefix, "$A"]), special_tokens=[("<s>", 256), ("<t>", 257)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def write(path, num_paragraphs=34, seed=0):
    """Paragraphs of over a thousand letters, each a document."""
    path.parent.mkdir(exist_ok=True)
    text = make_text(num_paragraphs, seed)
    path.write_text(text, encoding="utf-8")
    return str(path)


def lengths(evaluation):
    return [len(block) for unit in evaluation.text.units for block in unit.blocks]


def test_texts_of_one_file_name_stay_apart(tmp_path):
    first, second = write(tmp_path / "a" / "t.txt", 34, 1), write(tmp_path / "b" / "t.txt", 34, 2)
    tokenizer = letter_tokenizer()
    both = prepare_evaluation([first, second], tokenizer).text
    alone = [prepare_evaluation([source], tokenizer).text for source in (first, second)]
    assert len(both.units) == sum(len(text.units) for text in alone)
    assert len({unit.name for unit in both.units}) == len(both.units)
    assert both.units[0].name.startswith(first) and both.units[-1].name.startswith(second)


def test_a_text_named_twice_is_refused(tmp_path):
    source = write(tmp_path / "t.txt", 90)
    again = str(tmp_path / "a" / ".." / "t.txt")
    with pytest.raises(BadInputError, match="named twice"):
        prepare_evaluation([source, "builtin", again], letter_tokenizer())
    for solver in ("rtn", "gptq"):
        recipe = small_recipe(source, stage={"solver": solver}, evaluation={"sources": [again]})
        with pytest.raises(BadInputError, match="named twice") as error:
            prepare_texts(recipe, letter_tokenizer())
        assert "held out" in error.value.remedy


def test_each_source_is_sampled_down_to_the_limit(tmp_path, monkeypatch):
    first, second = write(tmp_path / "a.txt", 150, 1), write(tmp_path / "b.txt", 34, 2)
    tokenizer = letter_tokenizer()
    small = prepare_evaluation([second], tokenizer)
    assert small.num_left_out == 0 and small.notes == ()
    monkeypatch.setattr(llmopt.texts, "MAX_EVALUATION_TOKENS", 60_000)
    capped = prepare_evaluation([first, second], tokenizer)
    tokens = {
        source: sum(
            unit.num_predictions + len(unit.blocks)
            for unit in capped.text.units
            if unit.name.startswith(source)
        )
        for source in (first, second)
    }
    assert 50_000 < tokens[first] <= 60_000
    assert tokens[second] == sum(lengths(small))
    kept = sum(unit.name.startswith(first) for unit in capped.text.units)
    assert capped.num_left_out > 10 and len(capped.notes) == 1
    assert f"{capped.num_left_out} of {kept + capped.num_left_out}" in capped.notes[0]
    assert capped.sha256 == prepare_evaluation([first, second], tokenizer).sha256


@pytest.mark.parametrize(
    ("context_length", "shortest", "longest"),
    [(None, 256, 1024), (4096, 256, 1024), (300, 150, 300), (64, 32, 64)],
)
def test_evaluation_blocks_fit_the_context(tmp_path, context_length, shortest, longest):
    source = write(tmp_path / "t.txt", 90)
    tokenizer = letter_tokenizer(["<s>"])
    evaluation = prepare_evaluation([source], tokenizer, context_length=context_length)
    found = lengths(evaluation)
    assert longest // 2 < max(found) <= longest and min(found) >= shortest
    recipe = small_recipe(source)
    own = prepare_texts(recipe, tokenizer, context_length=context_length).evaluation
    assert longest // 2 < max(lengths(own)) <= longest


def test_a_context_too_short_is_refused_with_a_remedy(tmp_path):
    source = write(tmp_path / "t.txt", 90)
    tokenizer = letter_tokenizer()
    calibration = {"source": source, "num_samples": 4, "sequence_length": 129}
    recipe = small_recipe(source, calibration=calibration)
    for call in (
        lambda: prepare_evaluation([source], tokenizer, context_length=63),
        lambda: prepare_texts(recipe, tokenizer, context_length=63),
    ):
        with pytest.raises(BadInputError, match="context of 63 tokens") as error:
            call()
        assert "64 tokens or more" in error.value.remedy
    with pytest.raises(BadInputError, match=r"129 tokens are longer .* 128") as error:
        prepare_texts(recipe, tokenizer, context_length=128)
    assert "calibration.sequence_length to 128" in error.value.remedy
    prepare_texts(recipe, tokenizer, context_length=129)
    # Rounding to nearest reads no calibration text.
    rounded = small_recipe(source, calibration=calibration, stage={"solver": "rtn"})
    assert prepare_texts(rounded, tokenizer, context_length=128).calibration is None


@pytest.mark.parametrize(
    ("prefix", "bos", "num_notes"), [((), None, 0), (("<s>",), 256, 0), (("<s>", "<t>"), None, 1)]
)
def test_blocks_begin_with_a_whole_prefix_or_none(tmp_path, prefix, bos, num_notes):
    source = write(tmp_path / "t.txt")
    evaluation = prepare_evaluation([source], letter_tokenizer(prefix))
    assert evaluation.text.bos_token_id == bos and len(evaluation.notes) == num_notes
    firsts = {int(block[0]) for unit in evaluation.text.units for block in unit.blocks}
    assert (firsts == {256}) == (bos is not None)


def test_overlap_is_looked_for_in_the_documents_of_the_blocks_alone(tmp_path, monkeypatch):
    # Blank once its own BOS is gone: no document of any block.
    texts = [make_text(1, seed)[:200] for seed in range(300)]
    rows = [text for i, text in enumerate(texts) for text in (text, "<s>" * (i + 1))]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    given = []

    def find(evaluation, calibration):
        given.extend(calibration)
        return find_overlap(evaluation, calibration)

    find_overlap = llmopt.texts.find_overlap
    monkeypatch.setattr(llmopt.texts, "find_overlap", find)
    tokenizer = letter_tokenizer(["<s>"])
    calibration = prepare_texts(small_recipe(path), tokenizer).calibration
    assert len(given) == calibration.coverage.documents_used < 12
    # Every piece of a block is the beginning of one of them, or its rest.
    separator = tokenize_documents([Document("", "\n\n")], tokenizer)[0][0][1].tolist()
    text = "".join(tokenizer.decode(ids) for _, ids in given)
    for block in calibration.blocks:
        for piece in tokenizer.decode(block[1:]).split(tokenizer.decode(separator)):
            assert piece in text


def test_a_large_data_set_is_streamed_for_calibration(tmp_path, monkeypatch):
    import datasets

    read = []

    def load(name, config, *, split, streaming):
        assert streaming
        for number in range(100_000):
            read.append(number)
            yield {"text": f"row {number} " + make_text(1, 7)[:40]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    evaluation = {"sources": [write(tmp_path / "t.txt")]}
    texts = prepare_texts(
        small_recipe("owner/name", stage={"solver": "gptq"}, evaluation=evaluation),
        letter_tokenizer(),
    )
    assert len(read) == 5_000 and texts.calibration.blocks.shape == torch.Size([6, 64])
