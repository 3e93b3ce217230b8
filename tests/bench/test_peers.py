"""The peers: names, requirement files, environments."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from llmopt.bench.environments import cache_folder, frozen_environment
from llmopt.bench.measuring import RUNNERS
from llmopt.bench.peers import LLMOPT, PEERS, REQUIREMENTS, check_method, find_peers
from llmopt.errors import BadInputError
from llmopt.recipe import recipe_files


def test_peers_are_found_by_name_each_once() -> None:
    assert [peer.name for peer in find_peers(["gptqmodel", "gptqmodel"])] == ["gptqmodel"]


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(BadInputError, match="did you mean 'gptqmodel'"):
        find_peers(["gptq-model"])
    with pytest.raises(BadInputError, match="did you mean 'gptq'"):
        check_method("gtpq")


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_has_its_script_and_its_frozen_environment(name: str) -> None:
    peer = PEERS[name]
    assert (RUNNERS / f"{peer.module}.py").is_file()
    assert peer.environment is not None
    environment = frozen_environment(peer.environment, REQUIREMENTS)
    assert environment.folder.parent == cache_folder() / "environments"
    lines = [line for line in environment.content.splitlines() if not line.startswith("#")]
    assert all("==" in line and "+" not in line for line in lines)


def test_llmopt_has_its_script_and_a_recipe_for_what_it_can() -> None:
    assert find_spec(f"llmopt.bench.runners.{LLMOPT.module}") is not None
    assert LLMOPT.recipes.keys() == LLMOPT.methods.keys()
    assert LLMOPT.recipes["gptq"] in recipe_files()


def test_build_tools_go_before_what_is_built_with_them(tmp_path: Path) -> None:
    (tmp_path / "peer.txt").write_text("peer==1\ntorch==2\nsetuptools==3\nwheel==4\n", "utf-8")
    steps = frozen_environment("peer", tmp_path).steps
    assert steps[0] == ("torch==2",)
    assert steps[1] == ("--no-deps", "setuptools==3", "wheel==4")
    assert steps[2][:2] == ("--no-build-isolation", "--no-deps")
    (tmp_path / "peer.txt").write_text("peer==1\ntorch==2\n", "utf-8")
    assert len(frozen_environment("peer", tmp_path).steps) == 2


def test_an_environment_without_torch_is_installed_as_listed(tmp_path: Path) -> None:
    (tmp_path / "peer.txt").write_text("peer==1\nother==2\n", "utf-8")
    ((*options, file),) = frozen_environment("peer", tmp_path).steps
    assert options == ["--no-deps", "--requirement"] and file == str(tmp_path / "peer.txt")
