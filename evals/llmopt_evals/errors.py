"""The errors of this package: what is wrong, and what to do about it."""

from __future__ import annotations


class EvaluationError(Exception):
    """An evaluation that cannot be made, for a person to act on.

    Args:
        what: what is wrong and where (model, unit, item, key).
        remedy: what the reader should do about it.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}\n  what to do: {remedy}")
        self.what = what
        self.remedy = remedy


class NotFiniteError(EvaluationError):
    """Logits that are NaN or infinite.

    Attributes:
        model: whose: ``reference``, ``candidate``, ``baseline``, ...
    """

    def __init__(self, model: str, where: str) -> None:
        super().__init__(
            f"the {model}'s logits are NaN or infinite {where}",
            "look for NaN weights, or an overflow in float16: evaluate in bfloat16 or float32",
        )
        self.model = model
