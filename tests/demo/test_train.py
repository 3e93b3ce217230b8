"""Training: the road from text to a loadable folder, its schedule, its optimizer, resuming."""

import json
from pathlib import Path

import pytest
import torch

from llmopt.calibration.documents import Document
from llmopt.demo import model_card, train
from llmopt.demo.corpus import Corpus, training_batch
from llmopt.demo.model_card import load_demo
from llmopt.demo.muon import orthogonalise
from llmopt.demo.train import TrainPlan
from llmopt.errors import BadInputError


@pytest.fixture
def few_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """One split's documents for all: reading the train split alone takes seconds."""
    documents = [Document(f"topic:{i}", f"Topic {i} says " + "some words " * 400) for i in range(4)]
    monkeypatch.setattr(train, "builtin_documents", lambda split: list(documents))
    monkeypatch.setattr(train, "write_text_hashes", lambda path: None)
    monkeypatch.setattr(model_card, "text_fingerprint", dict)


@pytest.mark.usefixtures("few_documents")
def test_two_steps_make_a_loadable_folder(tmp_path: Path) -> None:
    out = tmp_path / "model"
    options = ["--steps", "2", "--batch-tokens", "256", "--length", "64", "--every", "1"]
    paths = ["--out", str(out), "--checkpoint", str(tmp_path / "train.pt")]
    train.main([*options, *paths])
    model, tokenizer = load_demo(out)
    assert model.config.num_hidden_layers == 4
    assert tokenizer.pad_token is None
    record = json.loads((tmp_path / "training.json").read_text("utf-8"))
    assert record["training"]["steps"] == 2
    assert record["held_out"]["perplexity"] > 1


def test_resumed_run_gives_the_same_weights(tmp_path: Path) -> None:
    stream = torch.randint(0, 4096, (5000,), generator=torch.Generator().manual_seed(1))
    corpus = Corpus(text=stream, validation=stream[:64])
    plan = TrainPlan(steps=4, batch_tokens=64, length=32, long_share=0.0)
    whole, first_half, resumed = (train.new_demo_model(plan.seed) for _ in range(3))
    train.train(whole, plan, corpus, tmp_path / "whole.pt", every=4)
    half = tmp_path / "half.pt"
    train.train(first_half, plan, corpus, half, every=2, stop_after=2)
    train.train(resumed, plan, corpus, half, every=2)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
    other = Corpus(text=stream.flip(0), validation=stream[:64])
    with pytest.raises(BadInputError, match="other text"):
        train.train(resumed, plan, other, half, every=2)


def test_schedule_rises_holds_and_falls_to_zero() -> None:
    plan = TrainPlan(steps=1000)
    scales = [plan.lr_scale(step) for step in range(plan.steps)]
    assert scales[0] < 0.05
    assert set(scales[plan.warmup_steps : 490]) == {1.0}
    assert 0 < scales[-1] < 0.01
    assert TrainPlan(steps=5000).lr_scale(300) == plan.lr_scale(300)
    assert plan.length_at(0) == plan.length
    assert plan.length_at(plan.steps - 1) == 2048


def test_batch_is_a_function_of_seed_and_step() -> None:
    corpus = Corpus(text=torch.arange(1, 10_000), validation=torch.arange(8))
    first = training_batch(corpus, step=3, rows=6, length=32, seed=0)
    assert first.shape == (6, 32)
    assert torch.equal(first, training_batch(corpus, step=3, rows=6, length=32, seed=0))
    assert not torch.equal(first, training_batch(corpus, step=4, rows=6, length=32, seed=0))
    assert (first[:, 1:].diff() == 1).all()


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.5
    assert values.max() < 1.5
