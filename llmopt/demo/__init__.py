"""The demo model: a tiny Llama trained on the built-in text, and how it was trained."""
