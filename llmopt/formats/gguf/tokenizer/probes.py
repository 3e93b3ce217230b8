"""Texts on which tokenizers differ, if they differ anywhere.

Two sorts: lines as people write them, and strings drawn over one character of each class that a
pre-tokenizer can tell apart, which find what no line happens to hold.
"""

from __future__ import annotations

import random
from itertools import product

LINES = (
    "Hello  World, it's 12345.678 o'clock! They'LL say: WE'VE, I'M, he'd, DON'T.",
    "def f(x: int) -> int:\n    return x**2  # square\n\n\nif __name__ == '__main__':\n\tf(3)\n",
    'for (int i = 0; i < n; ++i) {\r\n\t\tbuffer[i] |= 0xFF00 & ~mask; // "hex"\r\n}\r\n',
    "SELECT * FROM t WHERE a>=1 AND b!='x'; -- http://a.b/c?d=e&f=%20#g user@example.com",
    "1 22 333 4444 55555 1,234,567.89 3.14e-10 2024-11-21T09:30:00Z v1.2.3 1st 2nd ½ ² Ⅷ ١٢٣ ४५६",
    "naïve café Ünïcödé ÉCOLE éÉ Straße Ørsted fiancée ŁÓDŹ İstanbul camelCaseWord HTTPServer",
    "“quotes” — dashes… ‘single’ «guillemets» ¿qué? ¡olé! † ‡ § ¶ © ® ™ € £ ¥ ≤ ≠ ∑ ∞ → ⇒",
    "你好，世界。今天天气很好！東京は日本の首都です。カタカナ・ひらがな 한국어 텍스트입니다",
    "Привет, как дела? Ελληνικά κείμενα שלום עולם مرحبا بالعالم हिन्दी में लिखा हुआ ไทยไม่มีช่องว่าง বাংলা",
    "🙂🙂 👩‍👩‍👧‍👦 🇩🇪 ❤️ 👍🏽 ¯\\_(ツ)_/¯ :-) <3 ^_^ (╯°□°)╯︵ ┻━┻",
    "trailing spaces   \nruns     of      spaces\t\ttabs \t mixed \n \n  \n\n end  ",
    "no-break\u00a0space, wide\u3000space, thin\u2009space, zero\u200bwidth\u200djoin, so\u00adft",
    "a_b __c__ $d @e #f %g ^h &i *j (k) [l] {m} |n| ~o `p` \\q 'r' \"s\" /t/ ;u: <v> =w= +x+ ?y!",
    "aaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!!!!!! ------------ ============ ............ \n\n\n\n\n\n",
    "Ich weiß nicht, was soll es bedeuten; l'été d'où qu'il vient; 's Gravenhage 'tis rock'n'roll",
    "x",
    "The quick brown fox jumps over the lazy dog.",
)
"""As people write them, each a text of its own."""

SPACED_LINES = (" leading space", "   three", "\n newline first", "\ttab first", "  ", " ")
"""Texts that begin with white space, where SentencePiece-like tokenizers part ways."""

DECOMPOSED_LINES = (
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    "\u1112\u1161\u11ab\u1100\u1173\u11af",
)
"""Texts that are not in Unicode's composed form (NFC)."""

CLASSES = (
    "astrevmldASLéÉǅʰªß中ひह"  # letters: those of contractions, other cases, other scripts
    "\u0301\u093f19٣½Ⅷ"  # marks, numbers
    "''’.,(-_/\\$€<+^~`\"*"  # punctuation and symbols
    " \t\n\r\u00a0\u2009\u3000"  # white space
    "🙂\u200d\ue000"  # pictures, format and private characters
)
"""One of each kind that an expression can tell apart; the apostrophe twice, for it matters most."""

_NUM_STRINGS = 6000


def class_strings() -> list[str]:
    """Every pair of classes, and longer strings drawn at random, always the same."""
    source = random.Random(0)
    pairs = ["".join(pair) for pair in product(sorted(set(CLASSES)), repeat=2)]
    longer = [
        "".join(source.choices(CLASSES, k=source.randint(3, 12))) for _ in range(_NUM_STRINGS)
    ]
    runs = [char * length for char in sorted(set(CLASSES)) for length in (3, 4, 7, 20)]
    return [*pairs, *runs, *longer]
