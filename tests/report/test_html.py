import re
from html.parser import HTMLParser

import pytest

from llmopt.report.html import kind_errors, render_html, write_html
from llmopt.report.schema import Coverage

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>$\\frac{1}$ & 模型"
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Tags with their attributes, visible text, and a check that elements nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open[-1:]:
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def pages(make_report):
    one = make_report().layers[:1]
    return {
        "pass": render_html(make_report()),
        "fail": render_html(make_report(outcome="fail", layers=one)),
        "inconclusive": render_html(make_report(outcome="inconclusive", layers=one)),
    }


def test_nothing_is_fetched_and_nothing_runs(pages):
    for text in pages.values():
        page = Page(text)
        assert not {"script", "iframe", "object", "embed", "base", "form"} & {
            tag for tag, _ in page.tags
        }
        for tag, attributes in page.tags:
            for name, value in attributes.items():
                assert not name.startswith("on"), (tag, name)
                if name in {"src", "href", "xlink:href", "action", "data", "srcset"}:
                    assert value.startswith(("#", "data:,")), (tag, name, value)
                if name == "style":
                    assert not re.search(r"url\((?!#)|expression|import", value), (tag, value)
        style = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
        assert not re.search(r"url\(|@import|http", style)
        assert "default-src 'none'" in dict(page.tags)["meta"].get("content", "") or any(
            "default-src 'none'" in (attributes.get("content") or "")
            for tag, attributes in page.tags
            if tag == "meta"
        )


def test_identifiers_are_unique_and_every_reference_has_its_target(pages):
    page = Page(pages["pass"])
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = [a["href"][1:] for _, a in page.tags if (a.get("href") or "").startswith("#")]
    references += re.findall(r"url\(#([^)]+)\)", pages["pass"])
    for _, attributes in page.tags:
        references += (attributes.get("aria-labelledby") or "").split()
    assert references and set(references) <= set(ids)


def test_every_plot_has_a_title_and_real_text(pages):
    page = Page(pages["pass"])
    plots = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(plots) == 4 + 7  # four of the verdict, one for each kind of linear layer
    assert all(plot["role"] == "img" and plot["aria-labelledby"] for plot in plots)
    for words in ("KL divergence per token", "self_attn.q_proj", "mlp.down_proj", "99"):
        assert words in page.words


def test_plots_take_their_colours_from_the_page(pages):
    svgs = "".join(re.findall(r"<svg.*?</svg>", pages["pass"], re.DOTALL))
    bare = re.sub(r"var\(--[\w-]+, #[0-9a-f]{6}\)", "", svgs)
    assert not re.findall(r"(?:fill|stroke): ?#[0-9a-f]{6}", bare)
    used = set(re.findall(r"var\((--[\w-]+)", pages["pass"]))
    style = re.findall(r"<style>(.*?)</style>", pages["pass"], re.DOTALL)[0]
    assert used - {"--tone", "--wash", "--key"} <= set(re.findall(r"(--[\w-]+):", style))


@pytest.mark.parametrize(
    ("outcome", "word"), [("pass", "Passed"), ("fail", "Refused"), ("inconclusive", "Inconclusive")]
)
def test_the_banner_says_the_verdict(pages, outcome, word):
    text = pages[outcome]
    assert f'class="card banner {outcome}"' in text
    assert f"<h2>{word}</h2>" in text


def test_hostile_names_are_shown_and_not_obeyed(make_report):
    report = make_report()
    layers = tuple(
        layer.model_copy(update={"name": f"model.layers.{layer.block}.{HOSTILE}"})
        for layer in report.layers[:2]
    )
    hostile = report.model_copy(
        update={
            "name": HOSTILE,
            "layers": layers,
            "source": report.source.model_copy(update={"name": HOSTILE}),
            "recipe": report.recipe.model_copy(update={"data": {HOSTILE: HOSTILE}}),
            "timings": {HOSTILE: 1.0},
            "files": {HOSTILE: report.files["config.json"]},
        }
    )
    page = Page(render_html(hostile))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert HOSTILE.replace("  ", " ") in page.words


def test_the_same_report_gives_the_same_page(pages, make_report):
    assert render_html(make_report(outcome="pass")) == pages["pass"]


def test_a_report_without_layers_or_calibration_is_a_page(make_report):
    text = render_html(make_report(layers=(), calibration=None))
    assert "error per layer" not in text
    assert "Calibration tokens" not in text
    Page(text)


def test_tokens_that_no_solver_counted_are_not_shown_as_starved(make_report):
    def rows(coverage):
        return Page(render_html(make_report(coverage=coverage))).words

    assert "Fewest tokens seen by a layer 65,536" in rows(Coverage(min_tokens_per_layer=65536))
    assert "Fewest tokens seen by a layer 0" in rows(Coverage(min_tokens_per_layer=0))
    assert "Fewest tokens" not in rows(Coverage())
    assert "NaN · overflow" not in rows(Coverage())


def test_the_page_says_what_was_left_out_and_whose_margins_were_taken(make_report):
    plain = Page(render_html(make_report())).words
    assert "beyond the cap" not in plain and "the margins of" not in plain
    evaluation = make_report().evaluation.model_copy(update={"num_left_out": 7})
    page = Page(render_html(make_report(evaluation=evaluation, margins_for_bits=4))).words
    assert "2 documents dropped for overlap with calibration; 7 documents left out beyond" in page
    assert "the margins of 4-bit weights" in page


def test_plain_rounding_shows_the_error_of_the_weights(make_report):
    layers = tuple(
        layer.model_copy(update={"solver": "rtn", "output_error": None, "plain_output_error": None})
        for layer in make_report().layers[:2]
    )
    page = Page(render_html(make_report(layers=layers)))
    assert "Weight error per layer" in page.words
    assert "Output error per layer" not in page.words


def test_errors_are_grouped_by_kind_and_ordered_by_block(make_report):
    layers = list(make_report(num_blocks=3).layers)
    kinds = kind_errors(layers[::-1])
    assert [kind.kind for kind in kinds][-1] == "self_attn.q_proj"
    queries = kinds[-1]
    assert queries.blocks == (0, 1, 2)
    assert queries.ours == tuple(layers[7 * block].output_error for block in range(3))
    assert queries.plain == tuple(layers[7 * block].plain_output_error for block in range(3))


def test_experts_of_a_block_count_by_their_worst(make_report):
    layer = make_report().layers[0]
    experts = [
        layer.model_copy(
            update={"name": f"model.layers.0.mlp.experts.{index}.up_proj", "output_error": error}
        )
        for index, error in enumerate((0.1, 0.3, 0.2))
    ]
    (kind,) = kind_errors(experts)
    assert (kind.kind, kind.ours) == ("mlp.experts.*.up_proj", (0.3,))


def test_the_page_is_written_beside_the_weights(tmp_path, make_report, pages):
    path = write_html(make_report(outcome="pass"), tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == pages["pass"]
