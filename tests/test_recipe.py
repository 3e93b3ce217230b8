from __future__ import annotations

from pathlib import Path

import pytest

from llmopt.errors import BadInputError
from llmopt.recipe import Recipe, load_recipe, matches, parse_recipe, recipe_files

QUANTIZE = {"kind": "quantize", "solver": "rtn"}


def test_the_projects_recipes_are_the_promised_ones_and_all_load() -> None:
    promised = {"int4-gptq", "int4-gptq-g32", "int4-awq", "int4-awq-gptq", "w4a16-gptq-file"}
    promised |= {"w4a16-awq-file", "int4-rtn", "int8-rtn", "int3-gptq", "int4-gptq-moe"}
    promised |= {"gguf-q4_k_m", "gguf-q4_k_m-fast", "gguf-q5_k_m", "gguf-q6_k", "gguf-q8_0"}
    promised |= {"gguf-q3_k_m", "gguf-iq4_xs"}
    assert promised <= set(recipe_files())
    for name in recipe_files():
        recipe = load_recipe(name)
        assert recipe.name == name and recipe.description


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(BadInputError, match="did you mean 'int4-gptq'"):
        load_recipe("int4-gtpq")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"calibratoin": {}}, "unknown key 'calibratoin' \\(did you mean 'calibration'"),
        ({"stages": [{**QUANTIZE, "dampign": 1}]}, "did you mean 'damping'"),
        ({"stages": [{**QUANTIZE, "scheme": {"bit": 4}}]}, "did you mean 'bits'"),
        ({"gate": {"margin": {}}}, "did you mean 'margins'"),
        ({"stages": [{**QUANTIZE, "scheme": {"bits": 5}}]}, "stages.0.scheme.bits"),
        ({"stages": [{**QUANTIZE, "damping": 0}]}, "damping"),
        ({"stages": []}, "give one quantize stage; there are 0"),
        ({"stages": [QUANTIZE, QUANTIZE]}, "give one quantize stage; there are 2"),
        ({"stages": [{"kind": "awq"}]}, "give one quantize stage; there are 0"),
        ({"stages": [QUANTIZE, {"kind": "awq"}]}, "put the quantize stage last"),
        ({"stages": [{"kind": "awq"}, {"kind": "awq"}, QUANTIZE]}, "one awq stage is enough"),
        ({"stages": [{"kind": "prune"}, QUANTIZE]}, "stages.0: a stage's kind is one of awq, quan"),
        ({"stages": [{"kind": "awq", "num_scale": 3}, QUANTIZE]}, "did you mean 'num_scales'"),
        ({"stages": [{"kind": "awq", "num_scales": 0}, QUANTIZE]}, "stages.0.num_scales: Input"),
        ({"stages": [{**QUANTIZE, "duo_scaling": True}]}, "unknown key 'stages.0.duo_scaling'"),
        ({"gate": {"margins": {"perplexity": 1}}}, "margins"),
        ({"gate": {"margins": {"mean_kl": float("nan")}}}, "margin"),
        ({"gate": {"margins": {"mean_kl": float("inf")}}}, "margin"),
        ({"gate": {"margins": {"task_accuracy_drop": 0.1}}}, "under `tasks`"),
        ({"gate": {"margins": {"kv_mean_kl": 0.1}}}, "kv_mean_kl, which judges a quantized cache"),
        (
            {"gate": {"margins": {"kv_recall_drop": 0.1}}, "kv_cache": {"kind": "bf16"}},
            "add a kv_cache section",
        ),
        ({"gate": {"tasks": {"recall": float("nan")}}}, "margin"),
        ({"stages": [{**QUANTIZE, "ignore": ["re:["]}]}, "no regular expression"),
    ],
)
def test_a_fault_names_its_key(data: dict[str, object], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        parse_recipe({"name": "x", "stages": [QUANTIZE], **data})


GGML = {"solver": "rtn", "scheme": {"type": "Q4_K_M"}}


@pytest.mark.parametrize(
    ("stage", "sections", "message"),
    [
        (GGML, {"output": {}}, "go together; this recipe has a GGUF type and format compressed"),
        (QUANTIZE, {}, "go together; this recipe has an integer scheme and format gguf"),
        ({**GGML, "clip": "mse"}, {}, "clip: ggml's blocks find their scales by `search`"),
        ({**GGML, "refine_scales": True}, {}, "refine_scales: "),
        ({**GGML, "static_groups": False}, {}, "static_groups: "),
        ({**GGML, "damping": 0.1}, {}, "damping: rounding has no Hessian"),
        ({**QUANTIZE, "search": "compatible"}, {"output": {}}, "search: only GGUF types"),
        ({**QUANTIZE, "importance": False}, {"output": {}}, "importance: only GGUF types"),
        ({**GGML, "search": "fast"}, {}, "stages.0.search: "),
        ({**GGML, "scheme": {"type": "Q4_K", "bits": 4}}, {}, "unknown key 'stages.0.scheme.bits'"),
        ({**GGML, "scheme": {"typ": "Q4_K"}}, {}, "'stages.0.scheme.typ' \\(did you mean 'type'"),
        (
            {**GGML, "overrides": [{"match": "*", "scheme": {"bits": 8}}]},
            {},
            "override of '\\*' gives an integer scheme and the stage GGUF types",
        ),
        (
            {**GGML, "importance": False},
            {"calibration": {"imatrix": "x.gguf"}},
            "this recipe uses none",
        ),
        (GGML, {"output": {"format": "gguf", "tensor_parallel_size": 2}}, "splits a GGUF file"),
    ],
)
def test_what_gguf_types_do_not_go_with_is_refused_in_words(
    stage: dict[str, object], sections: dict[str, object], message: str
) -> None:
    data = {"name": "x", "stages": [stage], "output": {"format": "gguf"}, **sections}
    with pytest.raises(BadInputError, match=message):
        parse_recipe(data)


def test_an_awq_stage_does_not_go_before_gguf_types() -> None:
    data = {"name": "x", "stages": [{"kind": "awq"}, GGML], "output": {"format": "gguf"}}
    with pytest.raises(BadInputError, match="GGUF types have `importance`"):
        parse_recipe(data)


def test_a_gguf_recipe_knows_its_consumer_its_needs_and_its_yardstick() -> None:
    def recipe(calibration: dict[str, object] | None = None, **stage: object) -> Recipe:
        data = {"name": "x", "stages": [{**GGML, **stage}], "output": {"format": "gguf"}}
        return parse_recipe({**data, "calibration": calibration or {}})

    assert recipe().output.consumers == ("llama.cpp",)
    assert recipe().calibrates and recipe().quantize.found_by == "least-squares"
    assert not recipe(importance=False).calibrates
    assert not recipe({"imatrix": "x.gguf"}).calibrates
    assert recipe({"imatrix": "x.gguf"}, solver="gptq").calibrates
    for kind in ("F32", "F16", "BF16"):  # nothing is rounded that a text could tell about
        plain_type = {"scheme": {"type": kind}}
        assert not recipe(**plain_type).calibrates
        assert not recipe(**plain_type, solver="gptq", importance=True).calibrates
        blocks = {"match": "*.down_proj", "scheme": {"type": "Q8_0"}}
        assert recipe(**plain_type, overrides=[blocks]).calibrates
    plain = {"importance": False, "search": "compatible"}
    assert recipe(**plain).is_plain_rounding
    assert not recipe(importance=False).is_plain_rounding
    assert not recipe({"imatrix": "x.gguf"}, search="compatible").is_plain_rounding


def test_one_fault_is_told_once() -> None:
    with pytest.raises(BadInputError) as caught:
        parse_recipe({"name": "x", "stages": [{**QUANTIZE, "damping": -1}]})
    assert caught.value.what.count(";") == 0 and "stages.0.damping" in caught.value.what


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(BadInputError, match="not YAML"):
        load_recipe(broken)
    broken.write_text("- 1")
    with pytest.raises(BadInputError, match="not a mapping"):
        load_recipe(broken)
    with pytest.raises(BadInputError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")


def test_a_file_is_named_after_itself_and_its_hash_follows_its_content(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("stages: [{solver: rtn}]")
    plain = load_recipe(path)
    assert plain.name == "mine"
    path.write_text("stages: [{solver: rtn, clip: none}]  # the default, written out")
    assert load_recipe(path).sha256() == plain.sha256()
    path.write_text("stages: [{solver: rtn, clip: mse}]")
    assert load_recipe(path).sha256() != plain.sha256()


def test_a_recipe_knows_whether_it_needs_text_and_whether_it_is_the_yardstick() -> None:
    def recipe(*stages: dict[str, object]) -> tuple[bool, bool]:
        read = parse_recipe({"name": "x", "stages": list(stages)})
        return read.calibrates, read.is_plain_rounding

    assert recipe(QUANTIZE) == (False, True)
    assert recipe({**QUANTIZE, "clip": "mse"}) == (False, False)
    assert recipe({**QUANTIZE, "clip": "activation"}) == (True, False)
    assert recipe({**QUANTIZE, "refine_scales": True}) == (True, False)
    assert recipe({"kind": "awq"}, QUANTIZE) == (True, False)
    assert recipe({"solver": "gptq"}) == (True, False)
    composed = parse_recipe({"name": "x", "stages": [{"kind": "awq", "num_scales": 5}, QUANTIZE]})
    assert composed.awq is not None and composed.awq.options().num_scales == 5
    assert composed.quantize.solver == "rtn"


def test_ignore_wins_over_overrides_and_the_first_override_wins() -> None:
    recipe = parse_recipe(
        {
            "name": "x",
            "stages": [
                {
                    "ignore": ["*.0.*", "re:k_proj$"],
                    "overrides": [
                        {"match": "*.down_proj", "scheme": {"bits": 8}},
                        {"match": "re:layers\\.1\\.", "scheme": {"bits": 3}},
                    ],
                }
            ],
        }
    )
    bits = {
        name: scheme.bits if (scheme := recipe.quantize.scheme_for(name)) else None
        for name in (
            "layers.0.down_proj",
            "layers.1.down_proj",
            "layers.1.up_proj",
            "layers.2.k_proj",
            "layers.2.q_proj",
        )
    }
    assert list(bits.values()) == [None, 8, 3, None, 4]


def test_a_pattern_matches_the_whole_name_and_a_regular_expression_any_part() -> None:
    assert matches("*.q_proj", "a.q_proj") and not matches("q_proj", "a.q_proj")
    assert matches("re:q_proj", "a.q_proj.b")


def test_margins_change_single_criteria_and_keep_the_rest() -> None:
    gate = parse_recipe(
        {
            "name": "x",
            "stages": [QUANTIZE],
            "gate": {"margins": {"mean_kl": 0.01}, "tasks": {"recall": 0.02}},
        }
    ).gate
    fixed = {c.name: c.margin for c in load_recipe("int4-rtn").gate.criteria(4).criteria}
    ours = {c.name: c.margin for c in gate.criteria(4).criteria}
    assert ours.pop("task_accuracy_drop:recall") == 0.02
    assert ours == {**fixed, "mean_kl": 0.01}
