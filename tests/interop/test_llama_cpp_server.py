"""The server that ``llmopt serve`` starts answers as transformers does."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
from support.gguf_models import open_and_plan, write_plain
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmopt.bench.environments import clean_variables
from llmopt.demo.paths import demo_model_path
from llmopt.formats.gguf.tokenizer import tokenizer_metadata
from llmopt.serving.llama_cpp import SERVER_PACKAGES, ServerOptions, ServerPlan, plan_server

pytestmark = [pytest.mark.interop, pytest.mark.parametrize("python", ["llama-cpp"], indirect=True)]

MESSAGES = [{"role": "user", "content": "What does the function return? It's 12 o'clock, café."}]
NUM_TOKENS = 16


def test_a_chat_is_continued_as_by_the_source(python: Path, tmp_path: Path) -> None:
    source = Path(demo_model_path())
    reader, plan = open_and_plan(source)
    values = tokenizer_metadata(source, reader.info("model.embed_tokens.weight").shape[0]).values
    write_plain(tmp_path / "demo.gguf", reader, plan, values)
    options = ServerOptions(port=0, threads=1, despite_verdict=True)
    asked = {"model": "demo", "messages": MESSAGES, "max_tokens": NUM_TOKENS, "temperature": 0}
    with running(python, plan_server(tmp_path / "demo.gguf", options)) as address:
        body = json.dumps(asked).encode()
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(f"{address}/v1/chat/completions", body, headers)) as reply:
            answer = json.load(reply)
        with urlopen(f"{address}/v1/models") as reply:
            served = [model["id"] for model in json.load(reply)["data"]]
    tokenizer = AutoTokenizer.from_pretrained(source)
    prompt = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    out = model.generate(**prompt, max_new_tokens=NUM_TOKENS, do_sample=False)
    wanted = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer["usage"]["prompt_tokens"] == prompt["input_ids"].shape[1]
    assert answer["choices"][0]["message"]["content"] == wanted
    assert served == ["demo"]


def test_the_packages_that_are_asked_for_are_those_it_imports(python: Path) -> None:
    imports = f"import {', '.join(SERVER_PACKAGES)}, llama_cpp.server.app"
    subprocess.run([str(python), "-c", imports], check=True, env=clean_variables())


@contextmanager
def running(python: Path, plan: ServerPlan) -> Iterator[str]:
    """The server's address, while it runs."""
    process = subprocess.Popen(
        [str(python), *plan.arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=clean_variables(),
    )
    assert process.stdout is not None
    told: list[str] = []
    try:
        for line in process.stdout:
            told.append(line)
            found = re.search(r"running on (http://\S+)", line)
            if found:
                yield found[1]
                return
        pytest.fail("the server ended by itself:\n" + "".join(told[-20:]))
    finally:
        process.terminate()
        process.communicate()
