"""One answer while it grows: its text, its log-probabilities, and when it ends."""

from __future__ import annotations

from llmopt.decoding.completion import Completion, Delta, TopLogprobs
from llmopt.decoding.sampling.sampler import SampledToken
from llmopt.decoding.sequence import FinishReason, Sequence
from llmopt.decoding.text.detokenizer import Decoder, Detokenizer
from llmopt.decoding.text.stop_strings import StopStrings


class Answer:
    """Follows one sequence.

    Args:
        sequence: the sequence; tokens are appended to it by others, before :meth:`add`.
        seed: of the request.
        tokenizer: ``None`` where no text is wanted.
        eos_token_ids: tokens that end the answer; empty where they are to be ignored.
    """

    def __init__(
        self,
        sequence: Sequence,
        seed: int,
        tokenizer: Decoder | None,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.sequence = sequence
        self.seed = seed
        self._eos_token_ids = eos_token_ids
        prompt = sequence.request.prompt_token_ids
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, prompt)
        self._stops = StopStrings(sequence.request.sampling.stop)
        self._text = ""
        self._logprobs: list[float] = []
        self._top_logprobs: list[TopLogprobs] = []

    def add(self, token: SampledToken) -> tuple[str, FinishReason | None]:
        """Take a token; returns the text that is final now, and why it was the last if it was."""
        self._logprobs.append(token.logprob)
        self._top_logprobs.append(token.top_logprobs)
        if token.token_id in self._eos_token_ids:
            return self._end(FinishReason.STOP)
        text, stopped = self._pass_on(self._piece(token.token_id))
        if stopped:
            return text, FinishReason.STOP
        if self.sequence.num_generated_tokens < self.sequence.request.max_new_tokens:
            return text, None
        rest, reason = self._end(FinishReason.LENGTH)
        return text + rest, reason

    def cancel(self) -> Delta:
        """The last delta of an answer that was taken out."""
        text, _ = self._end(FinishReason.CANCELLED)
        return self.delta(None, text, FinishReason.CANCELLED)

    def delta(self, token: SampledToken | None, text: str, reason: FinishReason | None) -> Delta:
        """What a step added; the whole answer where ``reason`` says that it is complete."""
        request = self.sequence.request
        return Delta(
            request_id=request.request_id,
            sample_index=self.sequence.sample_index,
            token_ids=[] if token is None else [token.token_id],
            text=text,
            logprobs=[] if token is None else [token.logprob],
            top_logprobs=[] if token is None else [token.top_logprobs],
            completion=None if reason is None else self._completion(reason),
        )

    def _completion(self, reason: FinishReason) -> Completion:
        sequence = self.sequence
        return Completion(
            request_id=sequence.request.request_id,
            sample_index=sequence.sample_index,
            prompt_token_ids=list(sequence.request.prompt_token_ids),
            token_ids=sequence.generated_token_ids,
            text=None if self._detokenizer is None else self._text,
            logprobs=self._logprobs,
            top_logprobs=self._top_logprobs,
            finish_reason=reason,
            seed=self.seed,
            num_reused_tokens=sequence.num_reused_tokens,
            num_preemptions=sequence.num_preemptions,
        )

    def _piece(self, token_id: int) -> str:
        return "" if self._detokenizer is None else self._detokenizer.push([token_id])

    def _pass_on(self, piece: str) -> tuple[str, bool]:
        passed = self._stops.push(piece)
        self._text += passed.text
        return passed.text, passed.stopped

    def _end(self, reason: FinishReason) -> tuple[str, FinishReason]:
        """Show what was held back: nothing can complete it any more."""
        text, stopped = self._pass_on(
            "" if self._detokenizer is None else self._detokenizer.finish()
        )
        if stopped:
            return text, FinishReason.STOP
        rest = self._stops.finish()
        self._text += rest
        return text + rest, reason
