"""What a consumer opens of GGUF files, as data (the ``gguf`` sections of ``consumers.yaml``)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pydantic import BaseModel, ConfigDict


class GGUFSupport(BaseModel):
    """One consumer's; the head of ``consumers.yaml`` explains the keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    versions: dict[str, str]
    architectures: tuple[str, ...]
    types: tuple[str, ...]
    proven_architectures: tuple[str, ...]
    proven_types: tuple[str, ...]
    reasons: dict[Literal["architectures", "types"], str]

    @property
    def version(self) -> str:
        """The versions that the facts are of, in words."""
        return ", ".join(f"{package} {version}" for package, version in self.versions.items())

    def architecture_refusal(self, architecture: str) -> str | None:
        """Why it would not open a model of this ``general.architecture``, or ``None``."""
        if architecture in self.architectures:
            return None
        return f"architecture {architecture}: {self.reasons['architectures']}"

    def type_refusal(self, types: Collection[str]) -> str | None:
        """Why it would not open tensors of these types, or ``None``."""
        unknown = sorted(set(types) - set(self.types))
        return f"type {', '.join(unknown)}: {self.reasons['types']}" if unknown else None

    def proven(self, architecture: str, types: Collection[str]) -> bool:
        """Whether both were run and compared, not only read about."""
        return architecture in self.proven_architectures and set(types) <= set(self.proven_types)
