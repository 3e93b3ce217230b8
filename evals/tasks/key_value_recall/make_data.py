"""Write data.jsonl: recall the value that was bound to a key, among four values of the list.

    python make_data.py

The same bytes on every machine (a seeded ``random.Random``); raise the version in the YAML when
this changes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

NUM_ITEMS = 200
KEYS = """
apple basket candle door engine feather garden hammer island jacket kettle ladder mirror
needle ocean pencil quilt river saddle table
""".split()  # noqa: SIM905  (a list of words reads best as words)
VALUES = """
amber black blue bronze brown copper coral cream gold green grey ivory jade orange pink
purple red silver white yellow
""".split()  # noqa: SIM905


def make_item(rng: random.Random) -> dict[str, object]:
    """One question: four to eight bindings, then one of their keys again."""
    count = rng.randint(4, 8)
    keys, values = rng.sample(KEYS, count), rng.sample(VALUES, count)
    asked = rng.randrange(count)
    choices = [values[asked], *rng.sample([v for v in values if v != values[asked]], 3)]
    rng.shuffle(choices)
    lines = [f"{key} = {value}" for key, value in zip(keys, values, strict=True)]
    return {
        "context": "\n".join([*lines, f"{keys[asked]} ="]),
        "choices": choices,
        "answer": choices.index(values[asked]),
    }


def main() -> None:
    """Write the file beside this script."""
    rng = random.Random(20240917)
    lines = [json.dumps(make_item(rng)) for _ in range(NUM_ITEMS)]
    Path(__file__).with_name("data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
