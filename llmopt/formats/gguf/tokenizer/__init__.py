"""A Hugging Face tokenizer as llama.cpp's tokenizer metadata, recognised and proven."""

from llmopt.formats.gguf.tokenizer.metadata import TokenizerMetadata, tokenizer_metadata

__all__ = ["TokenizerMetadata", "tokenizer_metadata"]
