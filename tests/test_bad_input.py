"""Every bad input of the road: a clear error, its remedy, and nothing at the output path."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.small_jobs import make_text, small_recipe, write_job, write_text
from support.tiny_models import rewrite_config, rewrite_tensors

from llmopt.demo.paths import demo_model_path
from llmopt.errors import LlmoptError, NumericalError, StorageError
from llmopt.job import check
from llmopt.pipeline import quantize
from llmopt.report.json_file import read_json


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def source(tmp_path: Path, pristine: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "source")


def poison(name: str) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        def set_nan(tensors: dict[str, torch.Tensor]) -> None:
            tensors[name].view(-1)[3] = float("nan")

        rewrite_tensors(source, set_nan)

    return change


def truncate(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove_shard(source: Path) -> None:
    (source / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def name_absent_tensor(source: Path) -> None:
    from safetensors import safe_open

    with safe_open(source / "model.safetensors", "pt") as file:
        names = list(file.keys())
    index = {"weight_map": {name: "model.safetensors" for name in [*names, "ghost.weight"]}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


def leave_a_pickle(source: Path) -> None:
    (source / "model.safetensors").unlink()
    torch.save({}, source / "pytorch_model.bin")


def want_remote_code(source: Path) -> None:
    rewrite_config(source, auto_map={"AutoModelForCausalLM": "modeling.Mine"})


def be_of_no_known_kind(source: Path) -> None:
    rewrite_config(source, model_type="frobnicator", architectures=["FrobnicatorForCausalLM"])


def lose_the_tokenizer(source: Path) -> None:
    for path in source.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_shard, "model-00001-of-00002.safetensors"),
        (truncate, "truncated|bytes"),
        (name_absent_tensor, "ghost.weight"),
        (
            poison("model.layers.1.mlp.up_proj.weight"),
            r"model\.layers\.1\.mlp\.up_proj.*flat index 3",
        ),
        (leave_a_pickle, "pickle|pytorch_model.bin"),
        (want_remote_code, "auto_map|remote code|code of its own"),
        (be_of_no_known_kind, "frobnicator"),
        (lose_the_tokenizer, "no tokenizer"),
    ],
)
def test_a_damaged_source_is_refused_before_work(
    tmp_path: Path, source: Path, text: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(source)
    with pytest.raises(LlmoptError, match=message) as caught:
        quantize(source, small_recipe(text), tmp_path / "out")
    assert caught.value.remedy
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no text|empty"),
        ("only a few words", "too short|hold out"),
        (make_text(12), "too short|units"),
    ],
)
def test_a_text_that_is_too_short_is_refused_before_work(
    tmp_path: Path, source: Path, content: str, message: str
) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(content)
    with pytest.raises(LlmoptError, match=message):
        quantize(source, small_recipe(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_nan_that_arises_on_the_way_names_layer_and_sample(
    tmp_path: Path, source: Path, text: Path
) -> None:
    def overflow(tensors: dict[str, torch.Tensor]) -> None:
        # Finite in the file; what down_proj makes of their product is beyond float32.
        for name in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"model.layers.1.mlp.{name}.weight"].fill_(1e12)
        tensors["model.layers.1.mlp.down_proj.weight"].mul_(1e4)

    rewrite_tensors(source, overflow)
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.down_proj.*calibration sample 0"):
        quantize(source, small_recipe(text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_starved_experts_end_the_run_after_the_pass_that_counted_them(
    tmp_path: Path, text: Path
) -> None:
    source = write_job(tmp_path, "mixtral")
    hungry = {"source": str(text), "num_samples": 6, "sequence_length": 64}
    recipe = small_recipe(text, calibration={**hungry, "min_expert_tokens": 300})
    with pytest.raises(LlmoptError, match=r"model\.layers\.0\.mlp\.experts\.\d \(\d+\)") as caught:
        quantize(source, recipe, tmp_path / "out")
    assert "num_samples" in caught.value.remedy and "ignore" in caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_an_output_directory_with_something_in_it_is_left_alone(
    tmp_path: Path, source: Path, text: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(LlmoptError, match="not empty"):
        quantize(source, small_recipe(text), tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_an_output_inside_the_source_is_refused(source: Path, text: Path) -> None:
    with pytest.raises(LlmoptError, match="inside the source"):
        quantize(source, small_recipe(text), source / "out")
    assert not list(source.glob("*out*"))


def test_a_source_that_is_quantized_already_is_refused(tmp_path: Path, source: Path) -> None:
    made = quantize(source, small_recipe(write_text(tmp_path)), tmp_path / "once")
    with pytest.raises(LlmoptError, match="already quantized"):
        quantize(made.path, small_recipe(tmp_path / "text.txt"), tmp_path / "twice")


def test_a_disk_that_is_too_small_is_refused_before_work(
    tmp_path: Path, source: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match="too small"):
        quantize(source, small_recipe(text), tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("output", "message"),
    [("file/out", "file is a file"), ("/proc/llmopt-out", "cannot write in /proc")],
)
def test_a_place_that_cannot_be_written_is_refused_before_a_weight_is_read(
    tmp_path: Path, source: Path, text: Path, output: str, message: str
) -> None:
    (tmp_path / "file").write_text("")
    seen: list[str] = []
    with pytest.raises(LlmoptError, match=message):
        quantize(
            source,
            small_recipe(text),
            tmp_path / output,
            progress=lambda task, *_: seen.append(task),
        )
    assert not seen


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from support.small_jobs import small_recipe
from llmopt.errors import StorageError
from llmopt.pipeline import quantize
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
source, text, output = map(Path, sys.argv[1:])
def shrink(task, completed, total):
    if task == "quantize" and completed == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
try:
    quantize(source, small_recipe(text), output, progress=shrink)
except StorageError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not output.exists()
    print("refused:", error.what)
print("published:", quantize(source, small_recipe(text), output, resume=True).published)
"""


def test_a_disk_that_fills_up_on_the_way_loses_nothing(
    tmp_path: Path, source: Path, text: Path
) -> None:
    root = Path(__file__).parent.parent
    paths = [root, root / "evals", root / "kernels", root / "tests"]
    finished = subprocess.run(
        [sys.executable, "-c", FULL_DISK, source, text, tmp_path / "out"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = finished.stdout.splitlines()
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert lines[0].startswith("refused:") and lines[1] == "published: True"


def test_the_command_line_prints_what_and_what_to_do_and_exits_with_two(
    tmp_path: Path, source: Path
) -> None:
    command = [sys.executable, "-m", "llmopt", "quantize", source, "-r", "int4-gptk", "-o"]
    finished = subprocess.run(
        [*command, tmp_path / "out"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert finished.returncode == 2
    assert "did you mean 'int4-gptq'" in finished.stderr and "what to do:" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_dry_run_shows_what_would_be_refused_and_exits_with_two(
    tmp_path: Path, source: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("stages: [{solver: rtn, scheme: {bits: 8, group_size: 32}}]\n")
    command = [sys.executable, "-m", "llmopt", "quantize", source, "-r", recipe, "--dry-run", "-o"]
    finished = subprocess.run(
        [*command, tmp_path / "out"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"},
    )  # fmt: skip
    assert finished.returncode == 2 and "does not hold" in finished.stdout
    assert "WNA16" in finished.stdout and not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"calibration": {"source": "builtin", "sequence_length": 4096}}, {}, "4096 tokens"),
        ({"gate": {"tasks": {"key_value_recal": 0.1}}}, {}, "key_value_recall"),
        ({}, {"device": "cuda:99"}, "CUDA"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would_refuse_at_once(
    tmp_path: Path,
    source: Path,
    text: Path,
    changes: dict[str, object],
    options: dict[str, str],
    message: str,
) -> None:
    with pytest.raises(LlmoptError, match=message):
        check(source, small_recipe(text, **changes), tmp_path / "out", **options)


def test_two_bit_plain_rounding_of_the_demo_model_is_refused_under_its_own_margins(
    tmp_path: Path,
) -> None:
    recipe = tmp_path / "int2.yaml"
    stage = "{solver: rtn, scheme: {bits: 2, group_size: 128}}"
    recipe.write_text(
        f"stages: [{stage}]\noutput: {{consumers: [transformers]}}\n"
        "gate: {cloze: {num_items: 200}}  # fewer than the default's, for the time they take\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-m", "llmopt", "quantize", demo_model_path(), "-r", recipe]
    finished = subprocess.run(
        [*command, "-o", out, "--resume"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"},
    )  # fmt: skip
    assert finished.returncode == 3, finished.stdout + finished.stderr
    assert "nothing to resume" in finished.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int2.yaml", "out.quarantine"]
    outcomes = {c.name: c.outcome for c in read_json(tmp_path / "out.quarantine").verdict.criteria}
    assert outcomes["mean_kl"] == outcomes["perplexity_ratio"] == "fail"
