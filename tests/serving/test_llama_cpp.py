"""The command line of the server, and what is refused before it; llama.cpp itself is not needed."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from support.served_files import write_served_file

from llmopt.errors import BadInputError
from llmopt.formats.gguf.values import int32s, uint32
from llmopt.serving import llama_cpp
from llmopt.serving.llama_cpp import ServerOptions, ServerPlan, plan_server, run_server


def option(plan: ServerPlan, name: str) -> str:
    return dict(pairwise(plan.arguments))[f"--{name}"]


def test_a_file_that_passed_is_served_with_sensible_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_cpp, "physical_cores", lambda: 6)
    path = write_served_file(tmp_path)
    plan = plan_server(path, ServerOptions())
    assert plan.arguments[:2] == ("-m", "llama_cpp.server")
    wanted = {
        "model": str(path),
        "model_alias": "model",
        "host": "127.0.0.1",
        "port": "8000",
        "n_ctx": "4096",
        "n_threads": "6",
        "n_threads_batch": "6",
        "logits_all": "False",
        "verbose": "False",
    }
    assert {name: option(plan, name) for name in wanted} == wanted
    assert plan.notes == ()


def test_what_is_asked_for_is_passed_on(tmp_path: Path) -> None:
    further = ("--api_key", "secret", "--verbose", "True")
    options = ServerOptions("0.0.0.0", 81, threads=3, context=512, further=further)
    plan = plan_server(write_served_file(tmp_path), options)
    assert plan.arguments[-4:] == further
    assert [option(plan, name) for name in ("host", "port", "n_threads", "n_ctx")] == [
        "0.0.0.0", "81", "3", "512",
    ]  # fmt: skip


def test_a_long_context_is_cut_and_said(tmp_path: Path) -> None:
    path = write_served_file(tmp_path, context=131072)
    plan = plan_server(path, ServerOptions())
    assert option(plan, "n_ctx") == "8192"
    # 3 layers of 2 heads, keys and values of 8 numbers each, 16 bits a number
    assert plan.notes == (
        "serving 8192 tokens of context (a cache of 2 MiB) of the 131072 that the model was made "
        "for; --context 131072 serves all",
    )
    assert option(plan_server(path, ServerOptions(context=131072)), "n_ctx") == "131072"
    beyond = plan_server(path, ServerOptions(context=200000))
    assert "made for 131072 tokens of context; 200000" in beyond.notes[0]


def test_heads_may_differ_by_layer(tmp_path: Path) -> None:
    changes = {
        "llama.attention.head_count_kv": int32s([1, 2, 6]),
        "llama.attention.key_length": uint32(24),
    }
    path = write_served_file(tmp_path, context=9000, changes=changes)
    assert "a cache of 4 MiB" in plan_server(path, ServerOptions()).notes[0]


def test_without_a_chat_template_there_is_a_note(tmp_path: Path) -> None:
    path = write_served_file(tmp_path, changes={"tokenizer.chat_template": None})
    assert "no chat template" in plan_server(path, ServerOptions()).notes[0]
    for further in (("--chat_format", "chatml"), ("--chat_format=chatml",)):
        assert plan_server(path, ServerOptions(further=further)).notes == ()
    other = ServerOptions(further=("--chat_formats", "chatml"))
    assert "no chat template" in plan_server(path, other).notes[0]


@pytest.mark.parametrize(
    ("outcome", "told"), [("fail", "fail"), ("inconclusive", "inconclusive"), (None, "none yet")]
)
def test_a_file_that_did_not_pass_is_refused(
    outcome: str | None, told: str, tmp_path: Path
) -> None:
    path = write_served_file(tmp_path, outcome)
    with pytest.raises(BadInputError, match=f"verdict on .* is: {told}"):
        plan_server(path, ServerOptions())
    plan = plan_server(path, ServerOptions(despite_verdict=True))
    assert plan.notes == (f"served despite the gate's verdict: {told}",)


def test_a_file_of_another_tool_is_served_with_a_note(tmp_path: Path) -> None:
    path = write_served_file(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"llmopt.verdict", b"other.verdicts"[:14]))
    assert "no verdict of llmopt" in plan_server(path, ServerOptions()).notes[0]


def test_paths_that_cannot_be_served_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="is a folder"):
        plan_server(tmp_path, ServerOptions())
    with pytest.raises(BadInputError, match="No such file"):
        plan_server(tmp_path / "absent.gguf", ServerOptions())
    path = write_served_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BadInputError, match="token_embd"):
        plan_server(path, ServerOptions())


def test_a_file_without_a_language_model_is_refused(tmp_path: Path) -> None:
    path = write_served_file(tmp_path, changes={"llama.context_length": None})
    with pytest.raises(BadInputError, match="which language model"):
        plan_server(path, ServerOptions())


def test_a_missing_package_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "SERVER_PACKAGES", ("json", "no_such_package_of_ours"))
    with pytest.raises(BadInputError) as raised:
        run_server(ServerPlan(("-c", "raise SystemExit(7)"), ()))
    assert "no_such_package_of_ours is not installed" in raised.value.what
    assert "pip install 'llama-cpp-python[server]'" in raised.value.remedy


BECOME = """
import sys
from llmopt.serving import llama_cpp
llama_cpp.SERVER_PACKAGES = ("json",)
server = "import os, sys; print(os.getpid(), flush=True); sys.exit(7)"
llama_cpp.run_server(llama_cpp.ServerPlan(("-c", server), ()))
"""


def test_the_process_becomes_the_server_so_that_signals_reach_it() -> None:
    process = subprocess.Popen([sys.executable, "-c", BECOME], stdout=subprocess.PIPE, text=True)
    said, _ = process.communicate()
    assert int(said) == process.pid
    assert process.returncode == 7


def test_a_verdict_on_other_tensors_is_none(tmp_path: Path) -> None:
    path = write_served_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInputError, match="pass, of other tensors than it holds now"):
        plan_server(path, ServerOptions())
    plan = plan_server(path, ServerOptions(despite_verdict=True))
    assert "of other tensors" in plan.notes[0]
