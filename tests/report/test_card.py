import pytest
import yaml

from llmopt.report.card import front_matter, render_card, write_card
from llmopt.report.schema import Consumer


def _split(card):
    assert card.startswith("---\n")
    header, body = card[4:].split("\n---\n", 1)
    return yaml.safe_load(header), body


def test_front_matter_says_what_a_hub_asks(make_report):
    header, _ = _split(render_card(make_report()))
    assert header["base_model"] == "llmopt-demo-4m"
    assert header["base_model_relation"] == "quantized"
    assert header["library_name"] == "transformers"
    assert header["license"] == "apache-2.0"
    assert {"llmopt", "quantized", "int4", "gptq"} <= set(header["tags"])
    assert header["quantization"]["recipe"] == "int4-gptq"
    assert header["quantization"]["bits_per_weight"] == 4.25
    assert header["quantization"]["verdict"] == "pass"


@pytest.mark.parametrize("name", ["org/model: x", "a\nb", "../secret/model/x", "- x", "{a}"])
def test_a_hostile_source_name_stays_out_of_base_model_and_breaks_nothing(make_report, name):
    report = make_report()
    report = report.model_copy(update={"source": report.source.model_copy(update={"name": name})})
    header, body = _split(render_card(report))
    assert "base_model" not in header
    assert "# demo-int4\n" in body


def test_the_verdict_table_has_a_row_for_every_criterion(make_report):
    for outcome in ("pass", "fail", "inconclusive"):
        report = make_report(outcome=outcome)
        _, body = _split(render_card(report))
        assert f"## Verdict: {outcome}" in body
        table = body.split("|---|---:|", 1)[1].split("\n\n", 1)[0].splitlines()[1:]
        assert len(table) == len(report.verdict.criteria)
        assert all(line.count("|") == 6 for line in table)


def test_only_targeted_consumers_are_explained(make_report):
    both = render_card(make_report())
    assert "vllm serve" in both and "AutoModelForCausalLM" in both
    alone = render_card(make_report(consumers=(Consumer(name="transformers", version=">=5"),)))
    assert "vllm" not in alone
    assert "With transformers (&gt;=5)" in alone
    assert "llmopt.load(" in alone


def test_every_hash_of_what_was_compared_is_there(make_report):
    report = make_report()
    card = render_card(report)
    for part in (report.source, report.recipe, report.calibration, report.evaluation):
        assert f"`{part.sha256}`" in card
    assert report.calibration.sha256 not in render_card(make_report(calibration=None))


def test_hostile_names_start_no_markup(make_report):
    name = "a|b <b>x</b> `c` [l](http://e.vil) *s*\n# heading"
    card = render_card(make_report(name=name))
    assert "<b>" not in card
    assert "\n# heading" not in card
    assert "[l](" not in card
    assert "# a\\|b &lt;b&gt;x&lt;/b&gt; \\`c\\` \\[l\\](http://e.vil) \\*s\\* \\# heading" in card


def test_the_sources_card_is_linked_when_told(make_report):
    report = make_report()
    assert "README.source.md" not in render_card(report)
    source = report.source.model_copy(update={"card": "README.source.md"})
    card = render_card(report.model_copy(update={"source": source}))
    assert "[README.source.md](<README.source.md>)" in card


def test_the_card_is_written_as_readme(tmp_path, make_report):
    path = write_card(make_report(), tmp_path)
    assert path == tmp_path / "README.md"
    header, _ = _split(path.read_text(encoding="utf-8"))
    assert header == front_matter(make_report())


def test_the_card_says_what_was_left_out_and_whose_margins_were_taken(make_report):
    assert "the margins of" not in render_card(make_report())
    evaluation = make_report().evaluation.model_copy(update={"num_left_out": 1})
    card = render_card(make_report(evaluation=evaluation, margins_for_bits=3))
    assert "1 evaluation document left out beyond the cap on evaluation text." in card
    assert "the margins of 3-bit weights." in card
