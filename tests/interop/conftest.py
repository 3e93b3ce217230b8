"""The consumers, each in its own environment, and what the command line published for them."""

from __future__ import annotations

import subprocess
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from environments import consumer_environment
from interop.protocol import DOORS, Consumer

from llmopt.bench.environments import BuildError, build, clean_variables


@cache
def find_python(environment: str) -> Path | str:
    """The interpreter of a consumer's environment, or why it could not be built."""
    try:
        return build(consumer_environment(environment))
    except (BuildError, OSError) as error:
        return f"the environment {environment} could not be built: {error}"


@pytest.fixture(scope="session")
def python(request: pytest.FixtureRequest) -> Path:
    """The interpreter of an environment (indirect parameter)."""
    found = find_python(request.param)
    if isinstance(found, str):
        pytest.fail(found, pytrace=False)
    return found


@pytest.fixture(scope="session")
def consumer(request: pytest.FixtureRequest) -> Consumer:
    """A consumer by its name and a format (indirect parameter)."""
    name, form = request.param
    found = find_python(DOORS[name, form].environment)
    if isinstance(found, str):
        pytest.fail(f"{name}: {found}", pytrace=False)
    return Consumer(name, form, found)


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run ``llmopt quantize`` on the built-in model by a recipe, once a session.

    Gives the folder or the GGUF file it published; a recipe that the gate refuses fails the test.
    """
    from llmopt.demo.paths import demo_model_path

    @cache
    def run(recipe: str) -> Path:
        name = "model.gguf" if recipe.startswith("gguf-") else "model"
        output = tmp_path_factory.mktemp(recipe) / name
        tool = Path(sysconfig.get_path("scripts")) / "llmopt"
        command = [tool, "quantize", demo_model_path(), "--recipe", recipe, "-o", output]
        done = subprocess.run(command, env=clean_variables(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return output

    return run
