"""Write the conformance vectors beside this file: small weights and the bytes ggml makes of them.

Run from the repository root, with ggml from the interop environment::

    PYTHONPATH=tests python -m quantization.ggml.make_vectors
"""

import json
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from environments import consumer_environment
from interop.protocol import CONSUMERS_FOLDER
from quantization.ggml.samples import SAMPLES, importance, sample
from safetensors.torch import save_file

from llmopt.bench.environments import build, clean_variables
from llmopt.quantization.ggml.types import GGML_TYPES, GGMLType

VECTORS = Path(__file__).parent / "vectors" / "ggml.safetensors"
COLUMNS = 512


def ask_ggml(
    python: Path, cases: list[tuple[GGMLType, torch.Tensor, torch.Tensor | None]], folder: Path
) -> list[torch.Tensor]:
    """The bytes that ggml makes of each weight ``(rows, columns)`` with each importance."""
    jobs = []
    for index, (kind, weight, weights) in enumerate(cases):
        names = [str(folder / f"{index}-{part}.npy") for part in ("in", "importance", "out")]
        np.save(names[0], weight.numpy())
        if weights is not None:
            np.save(names[1], weights.numpy())
        jobs.append(
            {
                "do": "quantize",
                "type": kind.id,
                "row_bytes": kind.row_bytes(weight.shape[1]),
                "in": names[0],
                "importance": None if weights is None else names[1],
                "out": names[2],
            }
        )
    run_ggml(python, jobs, folder)
    return [torch.from_numpy(np.load(job["out"])) for job in jobs]


def run_ggml(python: Path, jobs: list[dict], folder: Path) -> None:
    """Have ggml do the jobs of ``consumers/quantize_with_ggml.py``."""
    request = folder / "request.json"
    request.write_text(json.dumps(jobs), "utf-8")
    done = subprocess.run(
        [str(python), str(CONSUMERS_FOLDER / "quantize_with_ggml.py"), str(request)],
        cwd=folder,
        env=clean_variables(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def main() -> None:
    """One row of each sample, every block type, with importance and without."""
    weight = torch.cat([sample(name, 1, COLUMNS, seed) for seed, name in enumerate(SAMPLES)])
    weights = importance(COLUMNS)
    kinds = [kind for kind in GGML_TYPES.values() if not kind.is_plain]
    cases = [(kind, weight, given) for kind in kinds for given in (None, weights)]
    with TemporaryDirectory() as folder:
        found = ask_ggml(build(consumer_environment("llama-cpp")), cases, Path(folder))
    tensors = {"weight": weight, "importance": weights}
    for (kind, _, given), data in zip(cases, found, strict=True):
        tensors[f"{kind.name}.{'plain' if given is None else 'importance'}"] = data
    VECTORS.parent.mkdir(exist_ok=True)
    save_file(tensors, VECTORS)


if __name__ == "__main__":
    main()
