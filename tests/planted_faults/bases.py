"""Sound artifacts of the demo model, by the recipes of the project, to plant faults in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from planted_faults.faults import BLOCKS, HEAD_SIZE, module
from safetensors.torch import load_file, save_file

from llmopt.calibration.tokenizer import load_tokenizer
from llmopt.demo.paths import demo_model_path
from llmopt.pipeline import quantize
from llmopt.recipe import GateSection, Recipe, load_recipe
from llmopt_evals.cloze import ClozeOptions
from llmopt_evals.units import HeldOutText


@dataclass(frozen=True, slots=True)
class Variant:
    """A recipe of the project, with changes to its scheme and for whom it is meant."""

    recipe: str
    scheme: Mapping[str, Any] = field(default_factory=dict)
    consumers: tuple[str, ...] | None = None


VARIANTS: Mapping[str, Variant] = {
    "int4-gptq": Variant("int4-gptq"),
    "int4-gptq asymmetric": Variant(
        "int4-gptq", {"symmetric": False}, ("transformers-dequantize",)
    ),
    "int4-gptq with biases": Variant("int4-gptq"),
    "int3-gptq": Variant("int3-gptq"),
    "int8-rtn": Variant("int8-rtn"),
    "int4-rtn": Variant("int4-rtn"),  # too lossy for a model this small
}

SOUND = tuple(VARIANTS)


class Bases:
    """Sources and sound artifacts, each made when it is first asked for.

    Args:
        folder: where they are written.
        text: held-out units; a few of them serve the gate of the road, whose verdict is not used.
        num_samples: of calibration; the recipes' own number without one.
    """

    def __init__(self, folder: Path, text: HeldOutText, num_samples: int | None = None) -> None:
        self._folder = folder
        self._num_samples = num_samples
        tokenizer = load_tokenizer(demo_model_path()).tokenizer
        self._text = folder / "few.jsonl"
        long = [unit.blocks[0] for unit in text.units if len(unit.blocks[0]) >= 260]
        blocks = [tokenizer.decode(block[:260]) for block in long[:32]]
        self._text.write_text("\n".join(json.dumps({"text": block}) for block in blocks))

    def source(self, name: str) -> Path:
        """The source checkpoint of a variant."""
        if not name.endswith("with biases"):
            return demo_model_path()
        biased = self._folder / "biased"
        return biased if biased.exists() else write_biased(demo_model_path(), biased)

    def artifact(self, name: str) -> Path:
        """What the road wrote, wherever it put it."""
        output = self._folder / name.replace(" ", "-")
        quarantine = output.with_name(f"{output.name}.quarantine")
        for there in (output, quarantine):
            if there.exists():
                return there
        return quantize(self.source(name), self._recipe(VARIANTS[name]), output).path

    def _recipe(self, variant: Variant) -> Recipe:
        recipe = load_recipe(variant.recipe)
        stage = recipe.quantize
        scheme = stage.scheme.model_copy(update=dict(variant.scheme))
        consumers = variant.consumers or recipe.output.consumers
        samples = self._num_samples or recipe.calibration.num_samples
        return recipe.model_copy(
            update={
                "stages": (stage.model_copy(update={"scheme": scheme}),),
                "output": recipe.output.model_copy(update={"consumers": consumers}),
                "calibration": recipe.calibration.model_copy(update={"num_samples": samples}),
                "evaluation": recipe.evaluation.model_copy(update={"sources": (str(self._text),)}),
                "gate": GateSection(looks=1, cloze=ClozeOptions(num_items=1)),
            }
        )


def write_biased(demo: Path, folder: Path) -> Path:
    """The demo model with biases in v and o that cancel: the same function, but each one matters.

    Attention weights sum to one, so a bias in v reaches o_proj as a constant, and o_proj's bias
    takes it away again. Those of q and k are zero.
    """
    shutil.copytree(demo, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    generator = torch.Generator().manual_seed(0)
    for block in BLOCKS:
        names = {letter: module(block, f"self_attn.{letter}_proj") for letter in "qkvo"}
        weights = {letter: tensors[f"{name}.weight"].float() for letter, name in names.items()}
        norm = tensors[f"{module(block, 'input_layernorm')}.weight"].float()
        # As large as a typical value would be if the normalised inputs were independent.
        typical = (weights["v"] * norm).norm(dim=1)
        v_bias = (typical * torch.randn(len(typical), generator=generator)).bfloat16()
        repeats = len(weights["q"]) // len(weights["v"])
        heads = v_bias.float().view(-1, HEAD_SIZE).repeat_interleave(repeats, dim=0)
        biases = {
            "q": torch.zeros(len(weights["q"])),
            "k": torch.zeros(len(weights["k"])),
            "v": v_bias,
            "o": -(weights["o"] @ heads.flatten()),
        }
        for letter, value in biases.items():
            tensors[f"{names[letter]}.bias"] = value.bfloat16()
    save_file(tensors, file, {"format": "pt"})
    return folder
