"""Reading docstrings from sources, and removing paragraphs seen before."""

from pathlib import Path

from llmopt.calibration.near_duplicates import drop_seen_paragraphs, shingles
from llmopt.calibration.stdlib_text import (
    extension_pieces,
    normalise_whitespace,
    source_files,
    source_pieces,
)

SOURCE = '''"""Module."""
class Shape(Base):
    """A shape."""
    def area(self, unit="m"):
        """Return the area."""
        raise NotImplementedError
try:
    import fast
except ImportError:
    def fallback():
        """Do it slowly."""
'''


def wanted(unit: str) -> bool:
    return True


def test_every_docstring_with_its_heading(tmp_path: Path) -> None:
    (tmp_path / "geometry.py").write_text(SOURCE, encoding="utf-8")
    pieces = [(p.unit, p.heading, p.text) for p in source_pieces(tmp_path, wanted)]
    assert pieces == [
        ("module:geometry", "module geometry", "Module."),
        ("module:geometry", "class geometry.Shape(Base)", "A shape."),
        ("module:geometry", "geometry.Shape.area(self, unit='m')", "Return the area."),
        ("module:geometry", "geometry.fallback()", "Do it slowly."),
    ]
    assert list(source_pieces(tmp_path, lambda unit: False)) == []


def test_tests_and_foreign_packages_are_not_text(tmp_path: Path) -> None:
    for name in ("test/a.py", "site-packages/b.py", "pkg/__init__.py", "pkg/tests/c.py", "x-y.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
    assert [name for name, _ in source_files(tmp_path)] == ["pkg"]


def test_source_that_does_not_parse_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text('"""Text."""\ndef (:\n', encoding="utf-8")
    (tmp_path / "good.py").write_text('"""Text."""\n', encoding="utf-8")
    assert [p.unit for p in source_pieces(tmp_path, wanted)] == ["module:good"]


def test_extension_modules_answer_with_their_members() -> None:
    headings = [p.heading for p in extension_pieces(lambda unit: unit == "module:math")]
    assert any(heading.startswith("math.gcd") for heading in headings)
    assert not any("$" in heading for heading in headings)


def test_normalise_whitespace() -> None:
    assert normalise_whitespace("\n  a \t\r\n\n\n\n    b\x00\n") == "a\n\n  b"


def test_shingles_of_short_and_empty_text() -> None:
    assert shingles("One two!") == {"one two"}
    assert shingles("...") == set()
    assert len(shingles("a b c d e f g")) == 3


def test_a_paragraph_seen_in_parts_of_several_others_goes() -> None:
    seen: set[str] = set()
    first = "one two three four five six\n\nseven eight nine ten eleven twelve"
    assert drop_seen_paragraphs(first, seen) == first
    assert drop_seen_paragraphs("One two three four five six.", seen) == ""
    fresh = "one two three four five alpha beta gamma delta epsilon"
    assert drop_seen_paragraphs(f"{fresh}\n\nseven eight nine ten eleven", seen) == fresh
