"""What each choice of a recipe is worth, on a model of a second."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from bench.conftest import Made

from llmopt.bench.ablation import BASE, CHOICES, Choice, ablate, changed, markdown_table
from llmopt.errors import BadInputError, StorageError
from llmopt.recipe import load_recipe


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.label)
def test_every_choice_is_one_that_recipes_offer(choice: Choice) -> None:
    base = load_recipe(BASE)
    recipe = changed(base, choice)
    stage = recipe.quantize
    for key, value in choice.stage.items():
        assert getattr(stage, key) == value
    for key, value in choice.scheme.items():
        assert getattr(stage.scheme, key) == value
    assert len(recipe.stages) == (2 if choice.awq else 1)


def test_no_two_choices_are_the_same() -> None:
    base = load_recipe(BASE)
    recipes = [changed(base, choice) for choice in CHOICES]
    assert all(left != right for left, right in itertools.combinations(recipes, 2))


def test_a_choice_that_recipes_do_not_offer_is_refused() -> None:
    with pytest.raises(BadInputError, match="odd: unknown key 'stages.*dampin'.*'damping'"):
        changed(load_recipe(BASE), Choice("odd", {"dampin": 0.1}))


def test_rows_differ_as_their_choices_do(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    small = {"group_size": 32, "activation_order": "none"}
    rounding = {"solver": "rtn", "clip": "none"}
    choices = [
        Choice("four bits", scheme=small),
        Choice("two bits", rounding, {**small, "bits": 2}),
        Choice("eight bits", rounding, {**small, "bits": 8}),
    ]
    rows = ablate(made.source, made.tokens, choices=choices, held_out_tokens=512)
    four, two, eight = rows
    assert eight.quality.kl < four.quality.kl < two.quality.kl
    assert [row.bits for row in rows] == pytest.approx([4.5, 2.5, 8.5], abs=0.1)
    lines = markdown_table(rows).splitlines()
    assert len(lines) == 5
    assert lines[2].startswith("| four bits | 4.5")
    assert lines[2].endswith("| 1.000 |")
    assert not list(tmp_path.iterdir())  # models are large


def test_rows_are_kept_when_a_later_choice_fails(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rounding = {"solver": "rtn", "clip": "none"}
    scheme = {"group_size": 32, "activation_order": "none"}
    choices = [Choice("good", rounding, scheme), Choice("bad", {"dampin": 0.1})]
    table = tmp_path / "table.md"
    with pytest.raises(BadInputError, match="bad: unknown key"):
        ablate(made.source, made.tokens, choices=choices, held_out_tokens=512, output=table)
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
    header, _, row = table.read_text(encoding="utf-8").splitlines()
    assert header.startswith("| choice") and row.startswith("| good | 4.5")
    gone = tmp_path / "gone" / "table.md"
    with pytest.raises(StorageError, match="cannot write .*gone"):
        ablate(made.source, made.tokens, choices=choices[:1], held_out_tokens=512, output=gone)
