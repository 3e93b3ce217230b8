"""Benchmarks: llmopt beside its peers and the machine's floor, in one table from one run."""
