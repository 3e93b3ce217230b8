"""The block types of ggml (GGUF files) as mathematics: what they mean, how to find their codes."""
