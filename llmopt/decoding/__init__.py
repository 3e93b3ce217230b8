"""The embedded decode engine: small, exact, measured; production serving is vLLM's and llama.cpp's.

One step is schedule → run → sample. The folders and files in the order of the data:

- ``sequence``: what a user asked for, and how far its answer has come;
- ``paging``: which page of the cache holds which tokens of which sequence (no torch);
- ``scheduler``: which tokens of which sequences the next step computes (no torch);
- ``kv``, ``attention``, ``runner``: one forward over them;
- ``sampling``, ``text``, ``engine``: the next tokens, and the text that they say.
"""
