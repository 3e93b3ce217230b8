"""What comes out: an answer, and what one step added to it."""

from __future__ import annotations

from dataclasses import dataclass

from llmopt.decoding.sequence import FinishReason

TopLogprobs = tuple[tuple[int, float], ...]
"""The most probable tokens of a position and their log-probabilities, the best first."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer to one prompt.

    Attributes:
        request_id: of the request that it answers.
        sample_index: which of the request's ``n`` answers it is.
        prompt_token_ids: what was continued.
        token_ids: what was generated, an end-of-sequence token that ended it included.
        text: what the tokens say, up to a stop string and without special tokens; ``None`` where
            the engine has no tokenizer.
        logprobs: natural log-probability of each generated token by the model, before penalty,
            temperature and filters.
        top_logprobs: of each generated token, as many alternatives as were asked for.
        finish_reason: ``stop`` (end of sequence or stop string), ``length`` or ``cancelled``.
        seed: with which the same tokens come again.
        num_reused_tokens: tokens of the prompt whose keys and values were in the cache.
        num_preemptions: times that the answer had to wait for pages and be computed anew.
    """

    request_id: str
    sample_index: int
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]
    finish_reason: FinishReason
    seed: int
    num_reused_tokens: int
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What a step added to one answer.

    Attributes:
        request_id: of the request.
        sample_index: which of its answers.
        token_ids: new tokens: one, or none where an answer is cancelled.
        text: text that is final now; later than its tokens where a character or a stop string may
            still be completed.
        logprobs: of the new tokens.
        top_logprobs: of the new tokens.
        completion: the whole answer, with its last delta.
    """

    request_id: str
    sample_index: int
    token_ids: list[int]
    text: str
    logprobs: list[float]
    top_logprobs: list[TopLogprobs]
    completion: Completion | None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why nothing follows; ``None`` while more comes."""
        return None if self.completion is None else self.completion.finish_reason
