"""The unit of text: a source document, from which token blocks are cut or joined."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One source document; all token blocks cut from it are resampled together.

    Attributes:
        name: unique among the documents it is used with.
        text: the text, unicode.
    """

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Hex digest of the UTF-8 text; the name is not part of it."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()
