"""What runs inside a peer's environment: ``session.py`` and one file a quantizer.

Nothing here imports llmopt, ``run_llmopt`` apart: the peers' environments do not have it.
"""
