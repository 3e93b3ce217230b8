"""Where the demo model lies, in a checkout and in an installed wheel alike."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def demo_model_path() -> Path:
    """Return the folder of the demo model (config, weights, tokenizer)."""
    return _HERE / "llmopt-demo"


def text_hashes_path() -> Path:
    """Return the file of hashes of the text that the demo model was trained with."""
    return _HERE / "text_hashes.json"
