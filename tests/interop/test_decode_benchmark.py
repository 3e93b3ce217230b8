"""Other engines in the decode benchmark: a grown model gives its source's tokens there."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmopt.bench.decode.agreement import compare
from llmopt.bench.decode.measuring import DecodeRequest, ask
from llmopt.bench.decode.models import gguf_files
from llmopt.bench.decode.workloads import Workload, plan_workloads, token_stream
from llmopt.bench.grown_model import grow_checkpoint
from llmopt.bench.growth import Growth
from llmopt.bench.runners import decode_transformers
from llmopt.demo.paths import demo_model_path

LARGEST_LEAD = 0.02  # of the best logit; llama.cpp keeps keys and values in float16


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, four times as wide, a block more."""
    folder = tmp_path_factory.mktemp("grown") / "model"
    grow_checkpoint(demo_model_path(), folder, 0, growth=Growth(4, 5, 2048))
    return folder


@pytest.fixture(scope="module")
def workloads() -> list[Workload]:
    """The check and the mixed requests."""
    planned = plan_workloads(token_stream(demo_model_path()), (2,), (24,), 8, 1, 300)
    return [load for load in planned if load.name in ("check", "mixed")]


def request(model: Path, workloads: list[Workload], **options: str) -> DecodeRequest:
    return DecodeRequest(
        model=str(model),
        is_packed=False,
        kv="16-bit",
        variant="dynamic",
        dtype="float32",
        device="cpu",
        threads=1,
        vocabulary=4096,
        max_context=512,
        max_sequences=16,
        kv_bytes=1 << 20,
        workloads=tuple(workloads),
        options=options,
    )


@pytest.mark.interop
@pytest.mark.parametrize(
    ("python", "module"),
    [("llama-cpp", "decode_llama_cpp"), ("vllm", "decode_vllm")],
    indirect=["python"],
)
def test_every_engine_gives_the_sources_tokens(
    python: Path, module: str, grown: Path, workloads: list[Workload], tmp_path: Path
) -> None:
    asked = request(grown, workloads, eager="yes")
    if module == "decode_llama_cpp":
        path = tmp_path / "model.gguf"
        gguf_files(grown, "F32", path)
        asked = request(path, workloads)
    heard = ask(python, module, asked, tmp_path)
    assert not heard.failure
    assert heard.opened is not None and heard.opened.versions
    source = request(demo_model_path(), workloads)
    fields = {name: getattr(source, name) for name in DecodeRequest.__slots__}
    reference = decode_transformers.open_engine(fields)
    for load in workloads:
        assert not heard.error(load.name)
        answer = heard.answers[load.name]
        wanted, _ = reference.run(load.prompts, load.new_tokens)
        agreement = compare(answer.tokens, wanted, reference.gaps(load.prompts, wanted))
        assert agreement.identical >= agreement.requests - 1, str(agreement)
        assert (agreement.largest_gap or 0) < LARGEST_LEAD, str(agreement)
        (times,) = answer.times_s
        assert [len(moments) for moments in times] == list(load.new_tokens)
        assert all(moments == sorted(moments) and moments[0] > 0 for moments in times)
    assert answer.peak_bytes > heard.opened.own_rss_bytes
