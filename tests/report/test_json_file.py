import json
import math

import pytest
from pydantic import ValidationError

from llmopt.errors import BadInputError
from llmopt.report.json_file import read_json, write_json
from llmopt.report.schema import LayerRecord, Report


@pytest.mark.parametrize("outcome", ["pass", "fail", "inconclusive"])
def test_what_is_written_is_read_again_unrounded(tmp_path, make_report, outcome):
    report = make_report(outcome=outcome, timings={"evaluate": 0.1 + 0.2})
    path = write_json(report, tmp_path)
    assert path == tmp_path / "llmopt.json"
    assert read_json(tmp_path) == report
    assert read_json(path).timings["evaluate"] == 0.1 + 0.2
    assert [entry.name for entry in tmp_path.iterdir()] == ["llmopt.json"]


def test_an_infinite_error_is_still_json(tmp_path, make_report):
    report = make_report()
    broken = report.layers[0].model_copy(update={"output_error": math.inf})
    write_json(report.model_copy(update={"layers": (broken,)}), tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "llmopt.json").read_text(), parse_constant=refuse)
    assert read_json(tmp_path).layers[0].output_error == math.inf


def _tamper(report, change):
    data = json.loads(report.model_dump_json())
    change(data)
    return data


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(suprise=1),
        lambda data: data["layers"][0].update(suprise=1),
        lambda data: data["sizes"].update(suprise=1),
        lambda data: data["verdict"].update(suprise=1),
    ],
)
def test_an_unknown_key_is_refused(tmp_path, make_report, change):
    data = _tamper(make_report(), change)
    with pytest.raises(ValidationError, match="suprise"):
        Report.model_validate(data)
    (tmp_path / "llmopt.json").write_text(json.dumps(data))
    with pytest.raises(BadInputError, match="suprise"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no llmopt.json"),
        ("{", "not JSON"),
        ("[1]", "no llmopt report"),
        ("{}", "no llmopt report"),
        ('{"schema_version": 2, "news": 1}', "schema 2; this llmopt reads up to 1"),
        ('{"schema_version": 1}', "not a report of schema 1"),
    ],
)
def test_what_is_no_report_is_refused_with_a_remedy(tmp_path, content, message):
    if content is not None:
        (tmp_path / "llmopt.json").write_text(content)
    with pytest.raises(BadInputError, match=message) as caught:
        read_json(tmp_path)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", 3, "self_attn.q_proj"),
        ("model.layers.13.mlp.experts.3.up_proj", 13, "mlp.experts.*.up_proj"),
        ("model.layers.3.mlp.experts.3.up_proj", 3, "mlp.experts.*.up_proj"),
        ("model.language_model.layers.0.mlp.down_proj", 0, "mlp.down_proj"),
        ("lm_head", None, "lm_head"),
    ],
)
def test_the_kind_of_a_layer_is_its_name_without_its_place(make_report, name, block, kind):
    layer = make_report().layers[0]
    data = layer.model_dump() | {"name": name, "block": block}
    assert LayerRecord.model_validate(data).kind == kind
