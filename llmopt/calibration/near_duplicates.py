"""Remove text that was seen before, by the share of word shingles already seen.

Python's own text repeats itself verbatim (help topics contain each other, C and Python twins share
docstrings), so whole-document similarity is the wrong unit: paragraphs are compared, and each with
everything kept before it rather than with one other paragraph. This containment in the union is
stricter than pairwise Jaccard, exact, and linear in the text.
"""

import re

SHINGLE_WORDS = 5
MAX_SEEN_SHARE = 0.5


def shingles(text: str, size: int = SHINGLE_WORDS) -> set[str]:
    """Return the runs of ``size`` lower-case words in ``text``; all of it when it has fewer."""
    words = re.findall(r"\w+", text.lower())
    if not words:
        return set()
    return {" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


def drop_seen_paragraphs(text: str, seen: set[str], max_share: float = MAX_SEEN_SHARE) -> str:
    """Return ``text`` without the paragraphs seen before; add those kept to ``seen``.

    A paragraph (text between blank lines) goes when more than ``max_share`` of its shingles are
    in ``seen``.
    """
    kept = []
    for paragraph in text.split("\n\n"):
        found = shingles(paragraph)
        if found and len(found & seen) > max_share * len(found):
            continue
        seen |= found
        kept.append(paragraph)
    return "\n\n".join(kept).strip()
