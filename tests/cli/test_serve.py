from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest
from support.served_files import write_served_file
from typer.testing import CliRunner

from llmopt.cli import app
from llmopt.serving import llama_cpp
from llmopt.serving.llama_cpp import ServerPlan


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServerPlan]:
    """The plans of servers that the process would have become; each ends with status 5."""
    plans: list[ServerPlan] = []

    def run(plan: ServerPlan) -> NoReturn:
        plans.append(plan)
        raise SystemExit(5)

    monkeypatch.setattr(llama_cpp, "run_server", run)
    return plans


@pytest.mark.parametrize("separator", [[], ["--"]])
def test_unknown_options_reach_the_server(
    separator: list[str], started: list[ServerPlan], tmp_path: Path
) -> None:
    path = str(write_served_file(tmp_path))
    words = ["serve", path, "--port", "99", *separator, "--api_key", "x", "--n_gpu_layers", "-1"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 5, result.output
    assert started[0].arguments[-4:] == ("--api_key", "x", "--n_gpu_layers", "-1")
    assert started[0].arguments[started[0].arguments.index("--port") + 1] == "99"


def test_notes_are_printed_before_the_start(started: list[ServerPlan], tmp_path: Path) -> None:
    path = str(write_served_file(tmp_path, "fail"))
    result = CliRunner().invoke(app, ["serve", path, "--despite-verdict"])
    assert result.exit_code == 5 and "despite the gate's verdict: fail" in result.output
