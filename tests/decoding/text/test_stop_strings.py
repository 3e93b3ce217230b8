from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmopt.decoding.text.stop_strings import StopStrings

TEXTS = st.text(alphabet="abc", max_size=30)
STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3).map(tuple)
CUTS = st.lists(st.integers(0, 30), max_size=6)


def run(stops: tuple[str, ...], pieces: list[str]) -> tuple[list[str], bool]:
    """What is shown after each piece, and whether a stop string completed."""
    machine, shown = StopStrings(stops), []
    for piece in pieces:
        passed = machine.push(piece)
        shown.append(passed.text)
        if passed.stopped:
            return shown, True
    return [*shown, machine.finish()], False


def by_definition(stops: tuple[str, ...], text: str) -> tuple[str, bool]:
    """The text before the stop string that completes first, the longer of two."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(TEXTS, STOPS, CUTS)
def test_what_is_shown_is_what_the_definition_says_however_the_text_is_cut(
    text: str, stops: tuple[str, ...], cuts: list[int]
) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in zip(places, places[1:], strict=False)]
    shown, stopped = run(stops, pieces)
    assert ("".join(shown), stopped) == by_definition(stops, text)


@given(TEXTS, STOPS)
def test_nothing_is_held_back_that_cannot_become_a_stop_string(
    text: str, stops: tuple[str, ...]
) -> None:
    machine, shown = StopStrings(stops), ""
    for place, character in enumerate(text):
        passed = machine.push(character)
        if passed.stopped:
            return
        shown += passed.text
        held = text[len(shown) : place + 1]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_beginning_is_held_until_it_turns_out_otherwise() -> None:
    assert run(("END",), ["an E", "N", "tity"]) == (["an ", "", "ENtity", ""], False)
    assert run(("END",), ["an E", "N", "D of"]) == (["an ", "", ""], True)
    assert run(("END",), ["an E", "N"]) == (["an ", "", "EN"], False)


def test_without_stop_strings_everything_passes() -> None:
    assert run((), ["a", "", "b"]) == (["a", "", "b", ""], False)
