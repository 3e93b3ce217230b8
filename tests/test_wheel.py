"""The wheel, in an environment that holds only what the wheel asks for, away from the checkout."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from llmopt.bench.environments import Environment, build, clean_variables, locked

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True, env=clean_variables())
    (built,) = folder.glob("llmopt-*.whl")
    return built


def declared_dependencies(wheel: Path) -> list[str]:
    """What the wheel's metadata asks for when no extra is named."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    return sorted(r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r)


def environment_for(wheel: Path) -> Environment:
    """An environment with the wheel's declared dependencies, in the versions that CI proves.

    It is named by them, so one that was built before holds no more than what is declared now.
    """
    constraints = ROOT / "constraints.txt"
    pinned = ("--constraint", str(constraints))
    declared = declared_dependencies(wheel)
    content = "\n".join([*declared, constraints.read_text("utf-8")])
    return Environment("wheel", ((*pinned, "torch"), (*pinned, *declared)), content)


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would: no checkout on the path, no network, no input."""
    variables = clean_variables() | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"],
        "COLUMNS": "99",
    }
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def test_the_wheel_carries_everything_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"llmopt", "llmopt_evals", "llmopt_kernels"}
    for package, folder in (
        ("llmopt", ROOT / "llmopt"),
        ("llmopt_evals", ROOT / "evals" / "llmopt_evals"),
        ("llmopt_kernels", ROOT / "kernels" / "llmopt_kernels"),
        ("llmopt/_recipes", ROOT / "recipes"),
        ("llmopt_evals/_tasks", ROOT / "evals" / "tasks"),
    ):
        files = [f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
        missing = [f for f in files if f"{package}/{f.relative_to(folder).as_posix()}" not in names]
        assert not missing
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_demo_runs_from_the_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    environment = environment_for(wheel)
    python = build(environment)
    tool = python.with_name("llmopt")
    with locked(environment.folder.with_suffix(".in-use")):
        install = ("-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall")
        installed = run(python, *install, wheel, cwd=tmp_path)
        assert installed.returncode == 0, installed.stderr

        where = run(python, "-c", "import llmopt; print(llmopt.__file__)", cwd=tmp_path)
        assert where.stdout.startswith(str(environment.folder))

        recipes = run(tool, "recipes", cwd=tmp_path)
        assert recipes.returncode == 0, recipes.stderr
        for recipe in (ROOT / "recipes").glob("*.yaml"):
            assert recipe.stem in recipes.stdout

        demo = run(tool, "demo", "-o", "out", cwd=tmp_path)
        assert demo.returncode == 0, demo.stdout + demo.stderr
    check_published(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def check_published(output: Path) -> None:
    """The published folder is complete and its report speaks of the bytes that lie there."""
    report = json.loads((output / "llmopt.json").read_text("utf-8"))
    assert report["verdict"]["outcome"] == "pass"
    config = json.loads((output / "config.json").read_text("utf-8"))
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (output / "tokenizer.json").is_file()
    assert "<svg" in (output / "report.html").read_text("utf-8")
    shards = sorted(output.glob("*.safetensors"))
    assert shards
    for shard in shards:
        told = report["files"][shard.name]["sha256"]
        assert told == hashlib.sha256(shard.read_bytes()).hexdigest()
