"""The benchmark's runner of llama.cpp: what ours does compatibly comes out of it, byte for byte."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from support.small_jobs import VOCAB_SIZE, write_job

from llmopt.bench.gguf import find_file_kind
from llmopt.bench.gguf_source import prepare_source
from llmopt.bench.measuring import FileRequest, measure
from llmopt.bench.runners import run_llmopt_gguf
from llmopt.formats.gguf.file import GGUFFile


@pytest.mark.interop
@pytest.mark.parametrize("python", ["llama-cpp"], indirect=True)
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_both_runners_write_the_same_tensors(
    python: Path, architecture: str, tmp_path: Path
) -> None:
    widths = {"hidden_size": 256, "intermediate_size": 512}
    source = write_job(tmp_path, architecture, **widths)
    tokens = torch.randint(VOCAB_SIZE, (4, 32), generator=torch.Generator().manual_seed(3))
    prepared = prepare_source(source, tokens, tmp_path)
    for name in ("Q4_K_M", "Q5_K"):
        kind = find_file_kind(name)
        request = FileRequest(
            model=str(source),
            source=str(prepared.source),
            imatrix=str(prepared.imatrix),
            hessians=str(prepared.hessians),
            output=str(tmp_path / f"ours-{name}.gguf"),
            file_type=kind.mixture.file_type,
            pure=kind.pure,
            types={name: chosen.type.name for name, chosen in kind.types(prepared).items()},
            method="compatible",
            threads=1,
        )
        run_llmopt_gguf.quantize(asdict(request))
        theirs = replace(request, output=str(tmp_path / f"theirs-{name}.gguf"), method="imatrix")
        measure(python, "run_llama_cpp", theirs, tmp_path, {})
        ours, found = GGUFFile(Path(request.output)), GGUFFile(Path(theirs.output))
        assert set(ours.names) == set(found.names)
        for tensor in ours.names:
            assert ours.info(tensor).type == found.info(tensor).type, (name, tensor)
            assert torch.equal(ours.data(tensor), found.data(tensor)), (name, tensor)
