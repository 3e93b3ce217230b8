"""The packed forward over the paged cache says what transformers' own forward says."""

import pytest
import torch
from decoding.stepping import Book, greedy
from support.tiny_models import CONFIGS, build_model

from llmopt.decoding.kv.layout import PoolLimits
from llmopt.decoding.kv_cache_config import HeadScales, KVCacheConfig
from llmopt.decoding.limits import SchedulerOptions
from llmopt.decoding.paging.groups import PageCopy, PageTable
from llmopt.decoding.runner import Runner
from llmopt.decoding.scheduler import ScheduledChunk, ScheduledStep
from llmopt.decoding.sequence import Request, Sequence
from llmopt.decoding.sizing import choose_limits
from llmopt.errors import BadInputError

PROMPTS = [[5, 9, 11], list(range(20, 61)), [7] * 18 + [3, 4], [42]]
NEW_TOKENS = 12


def generated(model, prompts, num_tokens):
    """Greedy tokens by transformers, prompt by prompt, and their logits."""
    tokens, logits = [], []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens.append(out.sequences[0, len(prompt) :].tolist())
        logits.append([row[0] for row in out.logits])
    return tokens, logits


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_tokens_are_those_of_transformers(family):
    model = build_model(CONFIGS[family]())
    expected, expected_logits = generated(model, PROMPTS, NEW_TOKENS)
    ways = [
        {"chunk": 64},
        {"chunk": 7, "shuffled": True},
        {"chunk": 1, "together": False},
        {"chunk": 64, "page_size": 32, "shuffled": True},
    ]
    for way in ways:
        page_size = way.setdefault("page_size", 16)
        config = KVCacheConfig(page_size=page_size)
        runner = Runner(model, config, PoolLimits(num_pages=40))
        tokens, logits, _ = greedy(runner, PROMPTS, NEW_TOKENS, **way)
        assert tokens == expected, way
        for got, want in zip(logits, expected_logits, strict=True):
            torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_quantized_cache_says_the_same_whatever_the_chunks(family, kind):
    model = build_model(CONFIGS[family](), seed=1)
    config = KVCacheConfig(kind, page_size=16, recent_window=6)
    said = []
    for way in ({"chunk": 64}, {"chunk": 7, "shuffled": True}, {"chunk": 1, "together": False}):
        runner = Runner(model, config, PoolLimits(num_pages=40))
        tokens, logits, _ = greedy(runner, PROMPTS, NEW_TOKENS, page_size=16, **way)
        said.append((tokens, torch.stack([torch.stack(rows) for rows in logits])))
    exact, exact_logits, _ = greedy(
        Runner(model, KVCacheConfig(page_size=16), PoolLimits(num_pages=40)),
        PROMPTS, NEW_TOKENS, page_size=16,
    )  # fmt: skip
    for tokens, logits in said:
        assert tokens == said[0][0]
        torch.testing.assert_close(logits, said[0][1], rtol=1e-3, atol=1e-3)
    first = torch.stack([rows[0] for rows in exact_logits])  # after the same tokens
    assert 1e-4 < float((said[0][1][:, 0] - first).abs().max()) < 1.5


def test_the_model_is_left_as_it_was():
    model = build_model(CONFIGS["llama"]())
    ids = torch.tensor([[3, 4, 5]])
    before, name = model(ids).logits, model.config._attn_implementation
    runner = Runner(model, KVCacheConfig(page_size=16), PoolLimits(num_pages=4))
    greedy(runner, [[3, 4, 5]], 2, page_size=16)
    assert model.config._attn_implementation == name
    assert torch.equal(model(ids).logits, before)


def test_logits_are_of_the_chunks_that_end_with_the_last_known_token():
    model = build_model(CONFIGS["llama"]())
    runner = Runner(model, KVCacheConfig(page_size=16), PoolLimits(num_pages=8))
    book = Book(runner.groups, 16)
    prompts = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
    counts = [2, 2, 3]
    chunks = []
    for i, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        s = Sequence(Request(str(i), tuple(prompt), 1), i, i, token_ids=prompt)
        chunks.append(ScheduledChunk(s, 0, count, book.tables(s, 0, count)))
    logits = runner.run(ScheduledStep(tuple(chunks), ()))
    expected = [model(torch.tensor([p])).logits[0, -1] for p in prompts[1:]]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert not logits.is_inference()
    nothing = runner.run(ScheduledStep(tuple(chunks[:1]), ()))
    assert nothing.shape == (0, logits.shape[1])


def test_a_copied_page_is_read_like_its_source():
    model = build_model(CONFIGS["llama"]())
    for kind in ("auto", "fp8", "int8", "int4"):
        config = KVCacheConfig(kind, page_size=16, recent_window=4)
        runner = Runner(model, config, PoolLimits(num_pages=8))
        book = Book(runner.groups, 16)
        tokens = list(range(3, 43))
        parent = Sequence(Request("0", tuple(tokens), 1), 0, 0, token_ids=tokens[:-1])
        tables = book.tables(parent, 0, 39)
        runner.run(ScheduledStep((ScheduledChunk(parent, 0, 39, tables),), ()))
        parent.token_ids = tokens
        said = []
        moved, copies = {}, []
        for name, table in tables.items():
            pages = tuple(book.free[name].pop() for _ in table.pages)
            pairs = zip(table.pages, pages, strict=True)
            copies += [PageCopy(name, source, target) for source, target in pairs]
            moved[name] = PageTable(table.first_index, pages)
        for where, first in ((tables, ()), (moved, tuple(copies))):
            chunk = ScheduledChunk(parent, 39, 1, where)
            said.append(runner.run(ScheduledStep((chunk,), first)))
        assert torch.equal(*said), kind


def test_what_cannot_be_served_is_refused():
    model = build_model(CONFIGS["llama"]())
    config = KVCacheConfig(page_size=16)
    with pytest.raises(BadInputError, match="less than one page"):
        Runner(model, config, PoolLimits(memory_bytes=1000))
    with pytest.raises(BadInputError, match="give one of them"):
        Runner(model, config, PoolLimits())
    with pytest.raises(BadInputError, match="int8"):
        KVCacheConfig("int9")
    with pytest.raises(BadInputError, match="layer 7"):
        scales = {7: HeadScales((1.0, 1.0), (1.0, 1.0))}
        Runner(model, KVCacheConfig("fp8", fp8_scales=scales), PoolLimits(num_pages=4))
    with pytest.raises(BadInputError, match="2 positive numbers"):
        scales = {1: HeadScales((1.0, 1.0, 1.0), (1.0, 1.0))}
        Runner(model, KVCacheConfig("fp8", fp8_scales=scales), PoolLimits(num_pages=4))


def test_pools_fill_the_memory_that_they_may_take():
    model = build_model(CONFIGS["gemma3"]())
    for kind in ("auto", "fp8", "int8", "int4"):
        config = KVCacheConfig(kind, page_size=16, recent_window=6)
        runner = Runner(model, config, PoolLimits(memory_bytes=1_000_000, max_sequences=2))
        fp8_scales = 3 * 2 * 2 * 4  # belong to no page
        assert 950_000 < runner.store.num_bytes() <= 1_000_000 + fp8_scales
        by_name = {group.name: group for group in runner.groups}
        assert by_name["window-8"].num_pages < by_name["full"].num_pages


@pytest.mark.parametrize("kind", ["auto", "fp8", "int8", "int4"])
def test_kernels_and_graphs_say_what_the_cpu_says(kind):
    """Of the graphs all but the capture: without a GPU the padded forward runs as it is."""
    model = build_model(CONFIGS["gemma3"](head_dim=64, query_pre_attn_scalar=64)).half()
    config = KVCacheConfig(kind, page_size=16, recent_window=6)
    said = {}
    for backend in ("cpu", "kernels"):
        runner = Runner(model, config, PoolLimits(num_pages=40), backend=backend)
        tokens, logits, _ = greedy(runner, PROMPTS[:3], NEW_TOKENS, page_size=16, chunk=32)
        said[backend] = tokens, torch.stack([torch.stack(rows) for rows in logits])
    assert set(runner.graphs.sizes) == {4, 1}  # the longest prompt is one token behind
    errors = []
    for index in range(3):
        for token in range(NEW_TOKENS):
            if said["cpu"][0][index][:token] == said["kernels"][0][index][:token]:
                got, want = (said[b][1][index, token] for b in ("kernels", "cpu"))
                errors.append(float((got - want).abs().mean()))
    assert len(errors) > 2 * NEW_TOKENS
    # Mean error of a row of logits, whose spread is 1.5; a page or a scale mistaken gives 0.3.
    assert max(errors) < 0.1, errors


def test_graphs_are_as_long_as_the_context_that_is_served():
    model = build_model(CONFIGS["llama"](head_dim=64)).half()  # made for 256 tokens
    config, options = KVCacheConfig(page_size=16), SchedulerOptions(max_context=40)
    limits = choose_limits(model, config, options, num_pages=64, memory_bytes=None)
    runner = Runner(model, config, limits, backend="kernels")
    sequence = Sequence(Request("0", (5,), 1), 0, 0, token_ids=[5] * 64)
    assert runner.graphs.takes([ScheduledChunk(sequence, 47, 1, {})])
    assert not runner.graphs.takes([ScheduledChunk(sequence, 48, 1, {})])  # three pages


def test_the_kernels_refuse_what_they_do_not_take():
    limits, config = PoolLimits(num_pages=4), KVCacheConfig(page_size=16)
    with pytest.raises(BadInputError, match="float32"):
        Runner(build_model(CONFIGS["llama"]()), config, limits, backend="kernels")
    with pytest.raises(BadInputError, match="heads of 8 channels"):
        Runner(build_model(CONFIGS["llama"]()).bfloat16(), config, limits, backend="kernels")
    mixture = build_model(CONFIGS["mixtral"](head_dim=64)).bfloat16()
    runner = Runner(mixture, config, limits, backend="kernels")
    assert runner.graphs is None and "experts" in runner.capture_refusal
