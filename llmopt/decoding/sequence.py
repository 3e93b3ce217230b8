"""What a user asked for (``Request``), and how far one answer to it has come (``Sequence``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from llmopt.decoding.sampling.parameters import SamplingParameters


class FinishReason(StrEnum):
    """Why no more tokens come."""

    STOP = "stop"  # an end-of-sequence token, or a stop string
    LENGTH = "length"  # max_new_tokens
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for.

    Attributes:
        request_id: unique among the requests of an engine that are not finished.
        prompt_token_ids: at least one.
        max_new_tokens: at least one.
        num_samples: answers wanted to this one prompt, which is computed once.
        sampling: how tokens are chosen; the scheduler never looks at it.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    max_new_tokens: int
    num_samples: int = 1
    sampling: SamplingParameters = SamplingParameters()

    @property
    def max_computed_tokens(self) -> int:
        """Most tokens of one answer whose keys and values are ever cached: all but the last."""
        return len(self.prompt_token_ids) + self.max_new_tokens - 1


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer to a request while it grows.

    Attributes:
        request: what it answers.
        sequence_id: its key in the page manager.
        arrival: the request's place in the order of arrival.
        sample_index: which of the request's ``num_samples`` answers this is.
        num_unforked: further answers that fork off this one once the prompt is computed.
        token_ids: prompt and generated tokens.
        num_computed_tokens: the first so many have their keys and values in the cache.
        num_reused_tokens: of them, found in the cache when the sequence was last admitted.
        num_preemptions: times it lost its pages to an older sequence.
        finish_reason: None while it runs or waits.
    """

    request: Request
    sequence_id: int
    arrival: int
    sample_index: int = 0
    num_unforked: int = 0
    token_ids: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_reused_tokens: int = 0
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None

    @property
    def age(self) -> tuple[int, int]:
        """The smaller, the older; older sequences are served first."""
        return self.arrival, self.sample_index

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_token_ids)

    @property
    def generated_token_ids(self) -> list[int]:
        """The answer so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_generated_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens that are not in the cache: one while it decodes, more while it prefills."""
        return len(self.token_ids) - self.num_computed_tokens
