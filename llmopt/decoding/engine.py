"""The engine: prompts in, answers out; one step is schedule → run → sample."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncGenerator, Generator
from collections.abc import Sequence as AnySequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from llmopt.decoding.completion import Completion, Delta
from llmopt.decoding.context_length import choose_context
from llmopt.decoding.kv_cache_config import KVCacheConfig
from llmopt.decoding.limits import SchedulerOptions, check_request
from llmopt.decoding.opening import open_model
from llmopt.decoding.paging.manager import PageManager
from llmopt.decoding.prompts import Prompt, encode_prompt, split_prompts
from llmopt.decoding.runner import Runner
from llmopt.decoding.sampling.parameters import SamplingParameters, parse_options
from llmopt.decoding.sampling.sampler import SamplingRow, sample
from llmopt.decoding.scheduler import ScheduledStep, Scheduler
from llmopt.decoding.sequence import Request, Sequence
from llmopt.decoding.sizing import choose_limits
from llmopt.decoding.stored_cache import choose_cache
from llmopt.decoding.tracking import Collected, Inbox, Posted, Tracked, in_order
from llmopt.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmopt.decoding.text.detokenizer import Decoder

DEFAULT_NEW_TOKENS = 256


class Engine:
    """Continues prompts with a model over a paged, possibly quantized cache.

    Any number of requests are answered together. Methods may be called from several threads; a
    step is computed by one of them at a time, for all. What fails inside a step ends every request
    in flight with that error and gives all pages back.

    Args:
        model: a directory, of a Hugging Face checkpoint or of what ``llmopt quantize`` wrote, or a
            transformers model.
        tokenizer: of the model, or its directory; ``None``: the model directory's.
        kv_cache: ``auto`` (what the directory's recipe was judged with, else the model's element
            type), ``bf16``, ``fp16``, ``fp32``, ``fp8``, ``int8``, ``int4``, or a config.
        max_context: most tokens of prompt and answer; ``None``: what the model was made for. With
            longrope at most as many as its short factors are for.
        max_sequences: most answers that grow at a time; further requests wait.
        max_tokens_per_step: most tokens of one forward.
        prefill_chunk: most tokens of one prompt in one forward; ``None`` leaves it to the step.
        num_pages: size of the cache in pages of tokens.
        kv_memory_bytes: size of the cache in bytes; without either: all that can be used, up to a
            quarter of the memory that is free.
        dtype: of a directory's model, or its name; ``None``: the checkpoint's own.
        device: of a directory's model; ``None``: the CPU.

    Raises:
        BadInputError: a model that cannot be opened or served, or limits that do not fit it.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        kv_cache: str | KVCacheConfig = "auto",
        max_context: int | None = None,
        max_sequences: int = 16,
        max_tokens_per_step: int = 512,
        prefill_chunk: int | None = None,
        num_pages: int | None = None,
        kv_memory_bytes: int | None = None,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        config = choose_cache(kv_cache, model)
        opened = open_model(model, tokenizer=tokenizer, dtype=dtype, device=device)
        context = choose_context(max_context, opened.model.config.get_text_config())
        options = SchedulerOptions(context, max_sequences, max_tokens_per_step, prefill_chunk)
        limits = choose_limits(opened.model, config, options, num_pages, kv_memory_bytes)
        self._opened = opened
        self._runner = Runner(opened.model, config, limits)
        self._scheduler = Scheduler(PageManager(self._runner.groups, config.page_size), options)
        self._tracked: dict[str, Tracked] = {}
        self._outbox = Collected()
        self._num_requests = 0
        self._driver: threading.Thread | None = None
        # Held while a step is computed, and while what is above is looked at or changed: requests
        # come and go while a forward runs.
        self._stepping, self._state = threading.Lock(), threading.RLock()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer."""
        return self._opened.tokenizer

    @property
    def max_context(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self._scheduler.options.max_context

    @property
    def has_work(self) -> bool:
        """Whether a request is unanswered."""
        with self._state:
            return self._scheduler.has_work

    @property
    def num_free_pages(self) -> dict[str, int]:
        """Pages that no request holds, by page group."""
        with self._state:
            return self._scheduler.pages.num_free_pages()

    @property
    def notes(self) -> tuple[str, ...]:
        """What makes this engine slower than engines of other models are, and why."""
        why = self._runner.capture_refusal
        return () if why is None else (f"decode steps run without CUDA graphs: {why}",)

    def generate(self, prompts: Prompt | AnySequence[Prompt], **options: Any) -> list[Completion]:
        """Answer one prompt or several, and return when all are answered.

        Args:
            prompts: a text or a list of token ids, or a list of these.
            options: the attributes of :class:`SamplingParameters`.

        Returns:
            The answers in the order of the prompts; of ``n`` answers to a prompt, all in a row.

        Raises:
            BadInputError: a prompt that is empty or does not fit, an unknown option; then none is
                answered.
            NumericalError: the model computed NaN.
        """
        inbox = Collected()
        requests = self._enter(split_prompts(prompts), parse_options(options), inbox)
        try:
            while inbox.num_ended < len(requests) and inbox.error is None:
                self._advance()
        finally:
            self._abandon(requests)
        return in_order(self._take(inbox), requests)

    def iterate(self, prompt: Prompt, **options: Any) -> Generator[Delta, None, None]:
        """Answer one prompt, step by step; closing the iterator cancels what is left."""
        inbox = Collected()
        requests = self._enter([prompt], parse_options(options), inbox)
        try:
            while inbox.num_ended < len(requests):
                self._advance()
                yield from self._take(inbox)
            yield from self._take(inbox)  # what another thread's steps gave while we were away
        finally:
            self._abandon(requests)

    async def stream(self, prompt: Prompt, **options: Any) -> AsyncGenerator[Delta, None]:
        """Answer one prompt while the event loop goes on; closing the iterator cancels.

        Any number of streams are answered together, by a thread that lives as long as there are
        some.
        """
        inbox = Posted(asyncio.get_running_loop())
        requests = self._enter([prompt], parse_options(options), inbox)
        try:
            self._start_driver()
            is_last = False
            while not is_last:
                delta, is_last = await inbox.get()
                yield delta
        finally:
            self._abandon(requests)

    def submit(self, prompt: Prompt, **options: Any) -> str:
        """Queue a prompt; its deltas come out of :meth:`step`.

        Returns:
            The request's id.
        """
        (request_id,) = self._enter([prompt], parse_options(options), self._outbox)
        return request_id

    def step(self) -> list[Delta]:
        """Compute one step, if anything is to be done.

        Returns:
            What came of submitted requests since the last call.
        """
        try:
            self._advance()
        except BaseException:
            self._outbox.error = None  # raised here and now
            raise
        return self._take(self._outbox)

    def cancel(self, request_id: str) -> bool:
        """Take a request out, waiting or half answered; its pages are free at once.

        Returns:
            Whether it was unanswered; then its last deltas, ``cancelled``, come as all others do.
        """
        with self._state:
            tracked = self._tracked.pop(request_id, None)
            if tracked is None:
                return False
            sequences = self._scheduler.cancel(request_id)
            for sequence in sequences:
                delta = tracked.answer(sequence).cancel()
                tracked.inbox.put(delta, is_last=sequence is sequences[-1])
            return True

    def _take(self, inbox: Collected) -> list[Delta]:
        with self._state:  # whichever thread steps fills it under the same lock
            return inbox.take()

    def _advance(self) -> None:
        """One step: schedule → run → sample."""
        with self._stepping:
            try:
                with self._state:
                    step = self._scheduler.schedule()
                if step.chunks:
                    logits = self._runner.run(step)
                    if logits.is_cuda:  # wait for it here, where others may come and go
                        torch.cuda.synchronize(logits.device)
                    with self._state:
                        self._sample(step, logits)
            except BaseException as error:
                self._fail(error)
                raise

    def _sample(self, step: ScheduledStep, logits: Tensor) -> None:
        """The next token of every sequence whose known tokens are computed."""
        grown = enumerate(self._scheduler.advance(step))
        pairs = [(row, sequence) for row, sequences in grown for sequence in sequences]
        if not pairs:
            return
        if [row for row, _ in pairs] != list(range(len(logits))):
            logits = logits[[row for row, _ in pairs]]
        tokens = sample(logits, [self._row(sequence) for _, sequence in pairs])
        for (_, sequence), token in zip(pairs, tokens, strict=True):
            self._scheduler.append(sequence, token.token_id)
            tracked = self._tracked[sequence.request.request_id]
            answer = tracked.answer(sequence)
            text, reason = answer.add(token)
            if reason is not None:
                self._scheduler.finish(sequence, reason)
                tracked.num_open -= 1
            if not tracked.num_open:
                del self._tracked[sequence.request.request_id]
            tracked.inbox.put(answer.delta(token, text, reason), is_last=not tracked.num_open)

    def _row(self, sequence: Sequence) -> SamplingRow:
        return SamplingRow(
            parameters=sequence.request.sampling,
            seed=self._tracked[sequence.request.request_id].seed,
            stream=sequence.sample_index,
            position=sequence.num_generated_tokens,
            token_ids=sequence.token_ids,
            name=f"request {sequence.request.request_id}",
        )

    def _enter(
        self, prompts: AnySequence[Prompt], parameters: SamplingParameters, inbox: Inbox
    ) -> list[str]:
        """Queue prompts, all of them or none; returns the requests' ids."""
        names = [f"prompt {i}" if len(prompts) > 1 else "the prompt" for i in range(len(prompts))]
        encoded = [
            encode_prompt(prompt, self._opened.tokenizer, self._opened.vocabulary_size, name)
            for prompt, name in zip(prompts, names, strict=True)
        ]
        if parameters.stop and self._opened.tokenizer is None:
            raise BadInputError(
                f"stop is {parameters.stop}, but the model has no tokenizer",
                "give Engine(tokenizer=...), or end by max_new_tokens",
            )
        with self._state:
            requests = [self._request(token_ids, parameters) for token_ids in encoded]
            for request, name in zip(requests, names, strict=True):
                check_request(request, self._scheduler.options, self._scheduler.pages, name)
            for request in requests:
                self._scheduler.submit(request)
                self._tracked[request.request_id] = self._track(request, parameters, inbox)
        return [request.request_id for request in requests]

    def _request(self, token_ids: tuple[int, ...], parameters: SamplingParameters) -> Request:
        self._num_requests += 1
        room = max(1, self.max_context - len(token_ids))
        return Request(
            request_id=str(self._num_requests),
            prompt_token_ids=token_ids,
            max_new_tokens=parameters.max_new_tokens or min(room, DEFAULT_NEW_TOKENS),
            num_samples=parameters.n,
            sampling=parameters,
        )

    def _track(self, request: Request, parameters: SamplingParameters, inbox: Inbox) -> Tracked:
        eos = frozenset[int]() if parameters.ignore_eos else self._opened.eos_token_ids
        seed = secrets.randbits(64) if parameters.seed is None else parameters.seed
        tokenizer = cast("Decoder | None", self._opened.tokenizer)
        return Tracked(request, seed, tokenizer, eos, inbox, parameters.n)

    def _abandon(self, request_ids: AnySequence[str]) -> None:
        for request_id in request_ids:
            self.cancel(request_id)

    def _fail(self, error: BaseException) -> None:
        """End every request in flight; the engine is as it was before they came."""
        with self._state:
            for request_id, tracked in list(self._tracked.items()):
                self._scheduler.cancel(request_id)
                tracked.inbox.fail(error)
            self._tracked.clear()
            self._scheduler.pages.forget()  # who reads NaN gets NaN, however good the prompt

    def _start_driver(self) -> None:
        with self._state:
            if self._driver is None:
                self._driver = threading.Thread(target=self._drive, name="llmopt", daemon=True)
                self._driver.start()

    def _drive(self) -> None:
        while True:
            with self._state:
                if not any(isinstance(one.inbox, Posted) for one in self._tracked.values()):
                    self._driver = None
                    return
            try:
                self._advance()
            except BaseException:
                # Every request in flight got it, and its caller raises it. Nothing ends this
                # thread but the last stream's end: a stream that came now would wait for ever.
                continue
