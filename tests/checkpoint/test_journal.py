from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmopt.checkpoint.journal import (
    BlockEntry,
    Conclusion,
    Journal,
    JournalState,
    check_fingerprint,
    read_state,
    write_state,
)
from llmopt.checkpoint.shards import ShardRecord
from llmopt.errors import BadInputError, StorageError

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 60), 1 << 60) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
shards = st.builds(
    ShardRecord,
    file=text,
    sha256=text,
    names=st.lists(text, max_size=3).map(tuple),
    num_bytes=st.integers(0, 1 << 50),
    num_tensor_bytes=st.integers(0, 1 << 50),
)
entries = st.builds(
    BlockEntry,
    index=st.just(0),
    shard=shards,
    digests=st.dictionaries(text, text, max_size=3),
    payload=st.dictionaries(text, json_values, max_size=3),
)


def numbered(blocks: list[BlockEntry]) -> tuple[BlockEntry, ...]:
    return tuple(block.model_copy(update={"index": i}) for i, block in enumerate(blocks))


states = st.builds(
    JournalState,
    fingerprint=st.dictionaries(text, text, max_size=3),
    blocks=st.lists(entries, max_size=4).map(numbered),
    conclusion=st.none() | st.just(Conclusion(outcome="fail", destination="x.quarantine")),
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(state=states, entry=entries, step=st.integers(1, 6), power_cut=st.booleans())
def test_after_any_crash_the_state_read_is_the_one_before_or_after(
    state: JournalState,
    entry: BlockEntry,
    step: int,
    power_cut: bool,
    run_and_kill: Callable[..., bool],
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "journal.json"
        write_state(path, state)
        assert read_state(path) == state
        journal = Journal(path, state)
        added = entry.model_copy(update={"index": len(state.blocks)})
        after = state.model_copy(update={"blocks": (*state.blocks, added)})
        killed = run_and_kill(step, path.parent, lambda: journal.append(added), power_cut=power_cut)
        read = read_state(path)
        assert read in (state, after)
        assert read == after if not killed else step < 6
        # A leftover of the kill is no obstacle to the next write.
        write_state(path, after)
        assert read_state(path) == after
        assert [file.name for file in path.parent.iterdir()] == ["journal.json"]


def test_a_state_that_could_not_be_written_is_not_taken_for_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "gone" / "journal.json", JournalState(fingerprint={}))
    with pytest.raises(StorageError):
        journal.conclude(Conclusion(outcome="pass", destination="out"))
    assert journal.state.conclusion is None


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"fingerprint": {}, "schema_version": 2}', '{"fingerprint": 3}']
)
def test_a_foreign_journal_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "journal.json").write_text(content)
    with pytest.raises(BadInputError, match="not a journal") as caught:
        read_state(tmp_path / "journal.json")
    assert str(tmp_path) in caught.value.remedy


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.json").write_text('{"fingerprint": {}, "color": "red"}')
    with pytest.raises(BadInputError, match="color"):
        read_state(tmp_path / "journal.json")


def test_fingerprints_that_differ_are_listed_and_equal_entries_are_not(tmp_path: Path) -> None:
    state = JournalState(fingerprint={"torch": "2.13", "threads": "2", "old": "x", "same": "s"})
    check_fingerprint(state, dict(state.fingerprint), tmp_path)
    with pytest.raises(BadInputError) as caught:
        check_fingerprint(
            state, {"torch": "2.14", "threads": "2", "new": "y", "same": "s"}, tmp_path
        )
    what = caught.value.what
    assert "torch: then 2.13, now 2.14" in what
    assert "old: then x, now (absent)" in what and "new: then (not recorded), now y" in what
    assert "threads" not in what and "same" not in what
