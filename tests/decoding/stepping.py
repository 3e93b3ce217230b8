"""Steps over a Runner by the simplest of schedulers, so that no other room is needed."""

from dataclasses import dataclass, field

import torch

from llmopt.decoding.paging.groups import PageTable
from llmopt.decoding.scheduler import ScheduledChunk, ScheduledStep
from llmopt.decoding.sequence import Request, Sequence


@dataclass
class Book:
    """Hands out pages of every group; windows slide; a shuffled pool has no neighbours."""

    groups: tuple
    page_size: int
    shuffled: bool = False
    free: dict = field(default_factory=dict)
    held: dict = field(default_factory=dict)

    def __post_init__(self):
        order = torch.Generator().manual_seed(0)
        for group in self.groups:
            pages = list(range(group.num_pages))
            if self.shuffled:
                pages = torch.randperm(group.num_pages, generator=order).tolist()
            self.free[group.name] = pages
        self.most_held = dict.fromkeys(self.free, 0)

    def tables(self, sequence, start, end):
        """Pages of all groups for the tokens up to ``end``, of which ``start`` are computed."""
        tables = {}
        for group in self.groups:
            name = group.name
            held = self.held.setdefault((sequence.sequence_id, name), {})
            first = group.first_page(start, self.page_size)
            for index in [i for i in held if i < first]:
                self.free[name].append(held.pop(index))
            for index in range(first, group.end_page(end, self.page_size)):
                if index not in held:
                    held[index] = self.free[name].pop(0)
            self.most_held[name] = max(self.most_held[name], len(held))
            tables[name] = PageTable(first, tuple(held[i] for i in sorted(held)))
        return tables


def greedy(runner, prompts, num_tokens, *, chunk=64, together=True, shuffled=False, page_size=64):
    """Greedy tokens, and the logits that chose them: twice a list a prompt."""
    book = Book(runner.groups, page_size, shuffled)
    sequences = [
        Sequence(Request(str(i), tuple(prompt), num_tokens), i, i, token_ids=list(prompt))
        for i, prompt in enumerate(prompts)
    ]
    logits = [[] for _ in prompts]
    for batch in [sequences] if together else [[s] for s in sequences]:
        while running := [s for s in batch if s.num_generated_tokens < num_tokens]:
            chunks = []
            for s in running:
                count = min(chunk, s.num_uncomputed_tokens)
                end = s.num_computed_tokens + count
                tables = book.tables(s, s.num_computed_tokens, end)
                chunks.append(ScheduledChunk(s, s.num_computed_tokens, count, tables))
            out = iter(runner.run(ScheduledStep(tuple(chunks), ())))
            for c in chunks:
                if c.samples:
                    row = next(out)
                    logits[c.sequence.sequence_id].append(row)
                    c.sequence.token_ids.append(int(row.argmax()))
                c.sequence.num_computed_tokens += c.num_tokens
    return [s.generated_token_ids for s in sequences], logits, book
