import json
import runpy
from pathlib import Path

import pytest
import torch
import transformers

from llmopt_evals.errors import EvaluationError
from llmopt_evals.tasks import continuation_logprobs, run_tasks
from llmopt_evals.transformers_scorer import TransformersScorer

TASKS = Path(__file__).parents[2] / "evals" / "tasks"


class ByteTokenizer:
    eos_token_id = 0
    bos_token_id = None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


@pytest.fixture(scope="module")
def byte_model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


@pytest.mark.filterwarnings("ignore")  # lm-eval's and datasets' own
def test_a_task_of_ours_runs_offline(byte_model, tmp_path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    scorer = TransformersScorer(byte_model)
    (task,) = run_tasks(
        ["key_value_recall"], scorer, scorer, ByteTokenizer(), include_path=TASKS, limit=12
    )
    rows = (TASKS / "key_value_recall" / "data.jsonl").read_text().splitlines()[:12]
    expected = []
    for row in map(json.loads, rows):
        context = list(row["context"].encode())
        pairs = [(context, list(f" {choice}".encode())) for choice in row["choices"]]
        sums = [total for total, _ in continuation_logprobs(scorer, pairs, 2048)]
        expected.append(sums.index(max(sums)) == row["answer"])
    assert task.reference_correct.tolist() == task.candidate_correct.tolist() == expected


def test_an_unknown_task_suggests_a_known_one(byte_model) -> None:
    scorer = TransformersScorer(byte_model)
    with pytest.raises(EvaluationError, match="'hellaswagg'") as caught:
        run_tasks(["hellaswagg"], scorer, scorer, ByteTokenizer())
    assert "'hellaswag'" in caught.value.remedy


def test_continuations_are_scored_after_their_context(byte_model) -> None:
    context, continuation = [1, 2, 3, 4, 5], [9, 8]
    with torch.inference_mode():
        logits = byte_model(input_ids=torch.tensor([context + continuation])).logits[0].double()
    rows = logits[4:6].log_softmax(-1)
    expected = float(rows[0, 9] + rows[1, 8])
    scorer = TransformersScorer(byte_model)
    ((total, greedy),) = continuation_logprobs(scorer, [(context, continuation)], 100)
    assert total == pytest.approx(expected, abs=1e-5)
    assert greedy == (rows.argmax(-1).tolist() == continuation)
    ((cut, _),) = continuation_logprobs(scorer, [(context, continuation)], 5)
    ((short, _),) = continuation_logprobs(scorer, [(context[2:], continuation)], 100)
    assert cut == pytest.approx(short, abs=1e-6)


def test_the_data_is_what_the_script_makes() -> None:
    module = runpy.run_path(str(TASKS / "key_value_recall" / "make_data.py"))
    rng = module["random"].Random(20240917)
    made = [json.dumps(module["make_item"](rng)) for _ in range(module["NUM_ITEMS"])]
    assert made == (TASKS / "key_value_recall" / "data.jsonl").read_text().splitlines()
