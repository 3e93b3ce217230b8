"""What every contract comes down to: checks of our own, and those of each consumer."""

from __future__ import annotations

from dataclasses import dataclass

from llmopt.errors import ContractError
from llmopt.report.schema import Consumer, ContractCheck


@dataclass(frozen=True, slots=True)
class Agreement:
    """Source, recipe and target held against each other.

    Attributes:
        checks: that belong to no single consumer.
        consumers: each with its own checks.
    """

    checks: tuple[ContractCheck, ...]
    consumers: tuple[Consumer, ...]

    @property
    def refusals(self) -> tuple[str, ...]:
        """Every check that does not hold, in words."""
        own = [f"{check.name}: {check.detail}" for check in self.checks if not check.passed]
        theirs = [
            f"{consumer.name} {consumer.version}: {check.detail}"
            for consumer in self.consumers
            for check in consumer.checks
            if not check.passed
        ]
        return tuple(own + theirs)

    def enforce(self) -> None:
        """Raise ContractError, listing every refusal, unless all checks hold."""
        refusals = self.refusals
        if refusals:
            more = f"\n  and {len(refusals) - 8} more" if len(refusals) > 8 else ""
            raise ContractError(
                "the contract does not hold:\n  " + "\n  ".join(refusals[:8]) + more,
                "change the recipe's scheme, overrides or consumers; "
                "`--dry-run` shows the whole contract without starting work",
            )


def contract_check(name: str, faults: list[str], otherwise: str) -> ContractCheck:
    """A check that passes where there are no faults; ``otherwise`` says what holds then."""
    return ContractCheck(
        name=name, passed=not faults, detail="; ".join(faults[:5]) if faults else otherwise
    )
