import pytest
import torch
import transformers

from llmopt_evals.errors import EvaluationError
from llmopt_evals.scorer import Branches, pack_branches, score_expanded
from llmopt_evals.transformers_scorer import TransformersScorer

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
WINDOWED = {**SHAPE, "sliding_window": 16}


def tiny_model(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(3)
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    if family == "gemma2":
        return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**WINDOWED))
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**WINDOWED))


def some_branches(context: int, lengths: tuple[int, ...], seed: int) -> Branches:
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> torch.Tensor:
        return torch.randint(0, 97, (n,), generator=generator)

    return Branches(draw(context), tuple(draw(n) for n in lengths))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("context", [1, 9, 23])  # 23 + 5 is beyond the windows of 16
def test_packed_branches_equal_expanded(family: str, context: int) -> None:
    model = tiny_model(family)
    scorer = TransformersScorer(model)
    passages = [
        some_branches(context, (5, 1, 3), seed=1),
        torch.arange(11),
        some_branches(context, (5, 1, 3), seed=2),
        some_branches(context, (2, 2), seed=3),
    ]
    packed = scorer.score(passages).branch_logprobs([2, 0, 3])
    alone = score_expanded(TransformersScorer(model).score, passages).branch_logprobs([2, 0, 3])
    assert [len(sums) for sums in packed] == [3, 3, 2]
    for ours, expected in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_layout_of_packed_branches() -> None:
    packed = pack_branches(
        Branches(torch.tensor([1, 2, 3]), (torch.tensor([4, 5]), torch.tensor([6, 7, 8])))
    )
    assert packed.token_ids.tolist() == [1, 2, 3, 4, 6, 7]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 3, 4]
    assert packed.first_row == 2
    assert packed.rows.tolist() == [0, 1, 0, 2, 3]
    assert packed.targets.tolist() == [4, 5, 6, 7, 8]
    assert not packed.mask[4, 3], "a branch must not see another"
    assert packed.mask[5, :3].all() and packed.mask[5, 4]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_logits_are_the_models_own(batch_size: int) -> None:
    model = tiny_model("llama")
    sequences = [torch.arange(n) for n in (7, 13, 5, 9)]
    scores = TransformersScorer(model, batch_size=batch_size).score(sequences)
    for index in (2, 0, 3, 1):
        with torch.inference_mode():
            expected = model(input_ids=sequences[index][None]).logits[0, 1:4]
        torch.testing.assert_close(scores.logits(index, 1, 4), expected, atol=1e-5, rtol=0)


def test_too_long_a_passage_is_refused() -> None:
    with pytest.raises(EvaluationError, match="65 tokens.*context of 64"):
        TransformersScorer(tiny_model("llama")).score([torch.zeros(65, dtype=torch.int64)])
