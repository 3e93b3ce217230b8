"""``python -m llmopt`` is the command line."""

from llmopt.cli import main

main()
