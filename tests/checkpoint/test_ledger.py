from __future__ import annotations

from pathlib import Path

import pytest

from llmopt.checkpoint.ledger import Fate, Ledger, LedgerEntry, LedgerError
from llmopt.checkpoint.reader import CheckpointReader, open_checkpoint
from llmopt.errors import ExitCode


@pytest.fixture
def reader(two_shards: Path) -> CheckpointReader:
    return open_checkpoint(two_shards)


FATES = (Fate.QUANTIZED, Fate.COPIED, Fate.TIED, Fate.DROPPED)  # one for each tensor of the source


def complete(reader: CheckpointReader) -> Ledger:
    ledger = Ledger()
    for name, fate in zip(reader.names, FATES, strict=True):
        info = reader.info(name)
        ledger.record(name, fate, "because", info.num_bytes, info.num_parameters)
    return ledger


def test_a_complete_ledger_sums_to_the_source(reader: CheckpointReader) -> None:
    ledger = complete(reader)
    ledger.check(reader)
    summary = ledger.summary()
    counts = {fate: total.num_tensors for fate, total in summary.items()}
    assert counts == {**dict.fromkeys(FATES, 1), Fate.SCALED: 0, Fate.ADDED: 0}
    total_bytes = sum(reader.info(name).num_bytes for name in reader.names)
    assert sum(total.num_bytes for total in summary.values()) == total_bytes
    assert sum(total.num_parameters for total in summary.values()) == 15 + 7 + 1 + 6


def test_what_was_added_is_listed_and_counts_for_nothing(reader: CheckpointReader) -> None:
    ledger = complete(reader)
    before = sum(total.num_bytes for total in ledger.summary().values())
    ledger.record("k_scale", Fate.ADDED, "a scale", 0, 0)
    ledger.check(reader)
    assert ledger.summary()[Fate.ADDED].num_tensors == 1
    assert sum(total.num_bytes for total in ledger.summary().values()) == before
    ledger.record("a", Fate.ADDED, "a scale", 0, 0)
    with pytest.raises(LedgerError, match="a was added, but the source has it"):
        ledger.check(reader)


def test_the_summary_tells_fates_apart() -> None:
    ledger = Ledger()
    ledger.record("a", Fate.COPIED, "norm", 10, 5)
    ledger.record("b", Fate.COPIED, "norm", 4, 2)
    ledger.record("c", Fate.QUANTIZED, "linear", 100, 50)
    summary = ledger.summary()
    assert (summary[Fate.COPIED].num_bytes, summary[Fate.COPIED].num_parameters) == (14, 7)
    assert summary[Fate.QUANTIZED].num_tensors == 1 and summary[Fate.TIED].num_tensors == 0


def test_entries_survive_json(reader: CheckpointReader) -> None:
    ledger = complete(reader)
    again = Ledger(LedgerEntry.model_validate(e.model_dump(mode="json")) for e in ledger.entries)
    assert again.entries == ledger.entries
    again.check(reader)


def test_no_fate_two_fates_ghosts_and_wrong_sizes(reader: CheckpointReader) -> None:
    entries = {entry.name: entry for entry in complete(reader).entries}
    short = entries["b"].model_copy(update={"num_bytes": 1})
    ghost = entries["b"].model_copy(update={"name": "ghost"})
    wrong = {
        "a has no fate": [entries["b"], entries["c"], entries["d"]],
        "a has 2 fates": [*entries.values(), entries["a"]],
        "ghost is not in the source": [*entries.values(), ghost],
        "b is recorded with 1 bytes": [entries["a"], short, entries["c"], entries["d"]],
    }
    for message, given in wrong.items():
        with pytest.raises(LedgerError, match=message) as caught:
            Ledger(given).check(reader)
        assert caught.value.exit_code is ExitCode.FAIL
