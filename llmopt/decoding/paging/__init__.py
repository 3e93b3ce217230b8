"""Pages of the KV cache: counted, shared by content, handed out and taken back. No torch here."""
