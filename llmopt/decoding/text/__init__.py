"""From generated tokens to the text that a reader sees, piece by piece."""
