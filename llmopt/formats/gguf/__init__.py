"""GGUF files: read without trust, written whole, and the table between them and Hugging Face's."""
