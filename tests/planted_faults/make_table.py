"""Measure every planted fault and sound output; write docs/gate.md's figures.

Run from the repository root: ``python tests/planted_faults/make_table.py [--all-text]``. Without
the option it reads 256 tokens of every held-out unit and a quarter of the cloze items, which takes
some minutes on two idle cores; with it all of the text, several times as long.
"""

from __future__ import annotations

import platform
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from planted_faults.bases import SOUND, Bases  # noqa: E402
from planted_faults.bench import kl_rise, shorten  # noqa: E402
from planted_faults.catalogue import FAULTS  # noqa: E402
from planted_faults.faults import Fault, plant  # noqa: E402
from planted_faults.laboratory import Laboratory  # noqa: E402

from llmopt import __version__  # noqa: E402
from llmopt.calibration.tokenizer import load_tokenizer  # noqa: E402
from llmopt.checkpoint.reader import open_checkpoint  # noqa: E402
from llmopt.checkpoint.scan import combined_digest, scan_tensors  # noqa: E402
from llmopt.demo.paths import demo_model_path  # noqa: E402
from llmopt.errors import BadInputError  # noqa: E402
from llmopt.progress import silent  # noqa: E402
from llmopt.recipe import GateSection  # noqa: E402
from llmopt.texts import EvaluationText, prepare_evaluation  # noqa: E402
from llmopt_evals.cloze import ClozeOptions  # noqa: E402
from llmopt_evals.gate import GateRun  # noqa: E402
from llmopt_evals.power import PowerRow, simulate  # noqa: E402
from llmopt_evals.verdict import CriterionResult  # noqa: E402

DOCUMENT = Path(__file__).parents[2] / "docs" / "gate.md"
BEGIN = "<!-- begin: written by tests/planted_faults/make_table.py -->"
END = "<!-- end -->"
ALL_TEXT = "--all-text" in sys.argv
GATE = GateSection() if ALL_TEXT else GateSection(cloze=ClozeOptions(num_items=500))
UNIT_TOKENS = 256
NUM_GATES = 1000
POWER_OF = "int4-gptq"

COLUMNS = ("mean KL", "perplexity ratio", "top-1", "verdict", "looks")


def sound_rows(laboratory: Laboratory) -> list[list[str]]:
    rows = []
    for name in SOUND:
        rows.append([name, *cells(laboratory.sound(name))])
        print(*rows[-1], sep=" | ", flush=True)
    return rows


def fault_rows(laboratory: Laboratory, folder: Path) -> list[list[str]]:
    rows = []
    for fault in FAULTS:
        faulty = plant(fault, laboratory.bases.artifact(fault.base), folder / "faulty")
        rows.append([fault.name, fault.base, *fault_cells(laboratory, fault, faulty)])
        print(*rows[-1], sep=" | ", flush=True)
        shutil.rmtree(faulty)
    return rows


def fault_cells(laboratory: Laboratory, fault: Fault, faulty: Path) -> list[str]:
    bench, sound = laboratory.bench(fault.base), laboratory.bases.artifact(fault.base)
    caught = []
    if bench.round_trip_catches(faulty, faulty if fault.stage == "solving" else sound):
        caught.append("round trip")
    try:
        judged = laboratory.judge(faulty, fault.base)
    except BadInputError:
        return ["", "", "", "not opened", "", "", ", ".join([*caught, "opening it"])]
    if judged.verdict.outcome != "pass":
        caught.append("gate")
    rise = kl_rise(judged, laboratory.sound(fault.base))
    added = f"{rise.estimate:.4f} ({rise.low:.4f} to {rise.high:.4f})"
    return [*cells(judged), added, ", ".join(caught)]


def cells(judged: GateRun) -> list[str]:
    """The columns that sound and faulty artifacts share."""
    verdict = judged.verdict
    results = {result.name: result for result in verdict.criteria}
    word = verdict.outcome
    if word != "pass":
        word += ": " + ", ".join(names_of(verdict.criteria, word))
    return [
        f"{results['mean_kl'].estimate:.4f}",
        f"{results['perplexity_ratio'].estimate:.4f}",
        f"{results['top1_agreement'].estimate:.1%}",
        word,
        f"{len(verdict.looks)} of {verdict.num_planned_looks}",
    ]


def names_of(criteria: Iterable[CriterionResult], outcome: str) -> list[str]:
    return [criterion.name for criterion in criteria if criterion.outcome == outcome]


def power_rows(laboratory: Laboratory) -> list[PowerRow]:
    """Simulated gates from the units of one run that looks at all of them."""
    whole = GATE.model_copy(update={"looks": 1})
    judged = laboratory.bench(POWER_OF).judge(laboratory.bases.artifact(POWER_OF), whole)
    floor = judged.verdict.noise_floor
    return simulate(
        judged.evidence,
        GATE.criteria(4),
        num_gates=NUM_GATES,
        noise_floor=None if floor is None else floor.mean_kl,
    )


def power_cells(row: PowerRow) -> list[str]:
    shares = (row.false_pass, row.false_fail, row.passes, row.fails)
    shown = ["" if share is None else f"{share:.1%}" for share in shares]
    return [row.criterion, *shown, f"{row.mean_looks:.2f}"]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def provenance(text: EvaluationText) -> str:
    digest = combined_digest(scan_tensors(open_checkpoint(demo_model_path()), silent))
    tokens = sum(unit.num_predictions for unit in text.text.units)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "numpy"))
    return (
        f"Source: the demo model, weights sha256 `{digest[:16]}`. Text: the built-in held-out "
        f"text, {len(text.text.units)} units, {tokens:,} predicted tokens, sha256 "
        f"`{text.sha256[:16]}`; {GATE.cloze.num_items:,} cloze items at the first look. llmopt "
        f"{__version__}, Python {platform.python_version()}, {packages}, "
        f"{torch.get_num_threads()} threads."
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(demo_model_path()).tokenizer
        text = prepare_evaluation(["builtin"], tokenizer)
        path = Path(folder)
        bases = Bases(path, text.text)
        if not ALL_TEXT:
            text = replace(text, text=shorten(text.text, len(text.text.units), UNIT_TOKENS))
        laboratory = Laboratory(bases, text.text, GATE, path)
        parts = [
            provenance(text),
            "### Outputs as the recipes make them",
            "Plain rounding to four bits costs a model as small as this one more than the margins "
            "allow; the others are sound.",
            table(("output", *COLUMNS), sound_rows(laboratory)),
            "### Planted faults",
            table(
                ("fault", "planted in", *COLUMNS, "KL added (95 %)", "caught by"),
                fault_rows(laboratory, path),
            ),
            "### False passes and power",
            f"{NUM_GATES:,} simulated gates a row, drawn from the units of `{POWER_OF}`.",
            table(
                (
                    "criterion",
                    "passes at the margin",
                    "fails at the margin",
                    "passes as measured",
                    "fails as measured",
                    "looks",
                ),
                [power_cells(row) for row in power_rows(laboratory)],
            ),
        ]
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    content = "\n\n".join([BEGIN, *parts, END])
    DOCUMENT.write_text(f"{before}{content}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
