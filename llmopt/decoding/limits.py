"""What the user lets the scheduler do, and which requests could never be answered within it."""

from __future__ import annotations

from dataclasses import dataclass

from llmopt.decoding.paging.manager import PageManager
from llmopt.decoding.sequence import Request
from llmopt.errors import BadInputError


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """What the user chooses.

    Attributes:
        max_context: most tokens of a sequence, prompt and answer.
        max_sequences: most sequences that run at a time.
        max_tokens_per_step: most tokens of a step; a sequence that decodes takes one of them.
        prefill_chunk: most tokens of one prompt in a step; None leaves that to the step's limit.
    """

    max_context: int
    max_sequences: int = 16
    max_tokens_per_step: int = 512
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        """Refuse limits under which nothing would move."""
        for name in ("max_context", "max_sequences", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInputError(f"{name} is {value}", f"give a {name} of 1 or more")
        if self.max_tokens_per_step < self.max_sequences:
            raise BadInputError(
                f"max_tokens_per_step {self.max_tokens_per_step} is below max_sequences "
                f"{self.max_sequences}: a step could not decode all running sequences",
                "raise max_tokens_per_step or lower max_sequences",
            )

    @property
    def chunk(self) -> int:
        """Most tokens of one sequence in a step."""
        return min(self.prefill_chunk or self.max_tokens_per_step, self.max_tokens_per_step)


def check_request(
    request: Request, options: SchedulerOptions, pages: PageManager, name: str = ""
) -> None:
    """Refuse what could never be answered.

    Args:
        request: what is asked for.
        options: what the user lets the scheduler do.
        pages: of all pools.
        name: of the request in errors; by its id if not given.

    Raises:
        BadInputError: the prompt is empty, or the request is past a limit or the pools' size.
    """
    name = name or f"request {request.request_id!r}"
    num_prompt = len(request.prompt_token_ids)
    if not num_prompt:
        raise BadInputError(f"{name}: the prompt is empty", "give at least one token")
    if request.max_new_tokens < 1:
        raise BadInputError(
            f"{name}: max_new_tokens is {request.max_new_tokens}", "ask for 1 or more"
        )
    if not 1 <= request.num_samples <= options.max_sequences:
        raise BadInputError(
            f"{name}: {request.num_samples} samples of one prompt, where 1 to "
            f"{options.max_sequences} (max_sequences) sequences run at a time",
            "ask for fewer samples, or raise max_sequences",
        )
    num_tokens = num_prompt + request.max_new_tokens
    if num_tokens > options.max_context:
        raise BadInputError(
            f"{name}: {num_prompt} tokens of prompt and {request.max_new_tokens} new ones are "
            f"{num_tokens}, more than the context of {options.max_context}",
            "shorten the prompt, ask for fewer new tokens, or raise max_context where the "
            "model allows it",
        )
    if not pages.fits(request.max_computed_tokens):
        pools = ", ".join(f"{g.name!r} {g.num_pages}" for g in pages.groups)
        raise BadInputError(
            f"{name}: {request.max_computed_tokens} tokens to cache do not fit the KV cache of "
            f"{pages.page_size} tokens a page (pages by group: {pools})",
            "give the KV cache more pages (num_pages, kv_memory_bytes), shorten the prompt or "
            "ask for fewer new tokens",
        )
