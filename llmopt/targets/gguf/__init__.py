"""One GGUF file: its contract, how its matrices are solved, and how it is put together."""
