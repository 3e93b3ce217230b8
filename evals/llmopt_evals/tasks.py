"""lm-eval tasks, item by item, of reference and candidate (needs the ``lm_eval`` extra).

An adapter over a ``Scorer`` answers lm-eval's log-likelihood requests; the items of both models
are then paired. A scorer cannot generate, so tasks that generate are refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import yaml
from torch import Tensor

from llmopt_evals.errors import EvaluationError
from llmopt_evals.judging import PairedTask
from llmopt_evals.scorer import Scorer

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

_METRICS = ("acc", "exact_match")

TASK_FOLDERS = (
    Path(__file__).parent / "_tasks",  # an installed wheel
    Path(__file__).parent.parent / "tasks",  # a checkout
)


def own_tasks() -> Path:
    """The folder of the tasks that come with llmopt_evals."""
    return next(folder for folder in TASK_FOLDERS if folder.is_dir())


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    eos_token_id: int | None
    bos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        ...


def run_tasks(
    names: Sequence[str],
    reference: Scorer,
    candidate: Scorer,
    tokenizer: Tokenizer,
    *,
    include_path: Path | None = None,
    max_length: int = 2048,
    limit: int | None = None,
) -> list[PairedTask]:
    """Run lm-eval tasks on both models and pair their items by document.

    Args:
        names: of tasks: ``include_path/NAME/NAME.yaml``, or any that lm-eval knows.
        reference: the source model.
        candidate: the model to judge.
        tokenizer: of both.
        include_path: a folder of task folders; ``data_files`` in them are relative to the task.
        max_length: tokens a sequence may have; longer contexts lose their beginning.
        limit: items of each task, or all.

    Raises:
        EvaluationError: lm-eval is not installed, a task is unknown, generates, or has no metric
            of right and wrong.
    """
    configs, manager = find_tasks(names, include_path)
    from lm_eval.evaluator import simple_evaluate

    outcomes = []
    for scorer in (reference, candidate):
        results = simple_evaluate(
            model=_adapter(scorer, tokenizer, max_length),
            tasks=configs,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
        outcomes.append({name: _right(name, results["samples"]) for name in names})
    return [_pair(name, outcomes[0][name], outcomes[1][name]) for name in names]


def find_tasks(
    names: Sequence[str], include_path: Path | None
) -> tuple[list[str | dict[str, object]], TaskManager]:
    """The tasks as lm-eval takes them, and its manager of them; runs nothing.

    Raises:
        EvaluationError: lm-eval is not installed, or a task is unknown.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(
            "tasks are asked for, but lm-eval is not installed", "pip install 'llmopt[tasks]'"
        ) from error
    ours = {name: _read_task(name, include_path) for name in names}
    # lm-eval's own thousands of task files are read only if one of them is asked for.
    manager = TaskManager(include_defaults=None in ours.values())
    own = [] if include_path is None else [file.stem for file in include_path.glob("*/*.yaml")]
    return [ours[name] or _known(name, [*own, *manager.all_tasks]) for name in names], manager


def _read_task(name: str, include_path: Path | None) -> dict[str, object] | None:
    """A task of ours as a mapping with absolute data paths; none if there is no such file."""
    if include_path is None or not (include_path / name / f"{name}.yaml").is_file():
        return None
    folder = (include_path / name).resolve()
    config: dict[str, object] = yaml.safe_load((folder / f"{name}.yaml").read_text("utf-8"))
    arguments = config.get("dataset_kwargs")
    if isinstance(arguments, dict) and isinstance(arguments.get("data_files"), dict):
        files = arguments["data_files"]
        arguments["data_files"] = {split: str(folder / file) for split, file in files.items()}
    return config


def _known(name: str, known: Sequence[str]) -> str:
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1)
    raise EvaluationError(
        f"no task is called {name!r}",
        f"did you mean {close[0]!r}?" if close else "`lm_eval ls tasks` lists lm-eval's tasks",
    )


def _right(name: str, samples: dict[str, list[dict[str, object]]]) -> dict[int, bool]:
    if name not in samples:
        raise EvaluationError(
            f"{name!r} is a group of tasks", f"name its tasks: {', '.join(sorted(samples))}"
        )
    right: dict[int, bool] = {}
    for sample in samples[name]:
        metric = next((metric for metric in _METRICS if metric in sample), None)
        if metric is None:
            raise EvaluationError(
                f"task {name!r} has none of the metrics {', '.join(_METRICS)}",
                "choose a task that says right or wrong of each item",
            )
        right[int(str(sample["doc_id"]))] = float(str(sample[metric])) == 1.0
    return right


def _pair(name: str, reference: dict[int, bool], candidate: dict[int, bool]) -> PairedTask:
    assert reference.keys() == candidate.keys()
    items = sorted(reference)
    return PairedTask(
        name,
        np.array([reference[item] for item in items], dtype=np.bool_),
        np.array([candidate[item] for item in items], dtype=np.bool_),
    )


def _adapter(scorer: Scorer, tokenizer: Tokenizer, max_length: int) -> TemplateLM:
    """lm-eval's model interface over a scorer."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    end = tokenizer.eos_token_id
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
    if found is None:
        raise EvaluationError(
            "the tokenizer has neither a beginning- nor an end-of-sequence token",
            "tasks need one to stand before an empty context; leave tasks out for this model",
        )

    prefix: int = found

    class ScorerLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
        @property
        def eot_token_id(self) -> int:
            return prefix if end is None else end

        @property
        def prefix_token_id(self) -> int:
            return prefix

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **_: object
        ) -> list[int]:
            return tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

        def _loglikelihood_tokens(
            self, requests: list[tuple[object, list[int], list[int]]], **_: object
        ) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return continuation_logprobs(scorer, pairs, max_length)

        def loglikelihood_rolling(
            self, requests: list[Instance], disable_tqdm: bool = False
        ) -> list[float]:
            totals = []
            for (text,) in (request.args for request in requests):
                windows = get_rolling_token_windows(
                    self.tok_encode(text), prefix, max_length - 1, context_len=1
                )
                pairs = [make_disjoint_window(window) for window in windows]
                totals.append(sum(s for s, _ in continuation_logprobs(scorer, pairs, max_length)))
            return totals

        def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
            raise EvaluationError(
                "a task asks for generated text; a scorer gives likelihoods only",
                "choose multiple-choice or perplexity tasks, or run lm-eval on a serving engine",
            )

    return ScorerLM()


def continuation_logprobs(
    scorer: Scorer, pairs: Sequence[tuple[list[int], list[int]]], max_length: int
) -> list[tuple[float, bool]]:
    """Summed log-probability of each continuation, and whether greedy decoding would give it.

    Args:
        scorer: the model.
        pairs: (context, continuation) token ids, neither empty.
        max_length: longer sequences lose the beginning of their context.
    """
    sequences: list[Tensor] = []
    for context, continuation in pairs:
        tokens = (context + continuation)[-max_length:]
        sequences.append(torch.tensor(tokens, dtype=torch.int64))
    scores = scorer.score(sequences)
    answers = []
    for index, (sequence, (_, continuation)) in enumerate(zip(sequences, pairs, strict=True)):
        start = max(0, len(sequence) - len(continuation) - 1)
        logits = scores.logits(index, start, len(sequence) - 1)
        targets = sequence[start + 1 :].to(logits.device)
        logprobs = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])
        greedy = bool((logits.argmax(-1) == targets).all())
        answers.append((float(logprobs.double().sum()), greedy))
    return answers
