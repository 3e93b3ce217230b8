"""Is a model still good? Perplexity, divergence, cloze, tasks, and the gate that decides.

Everything here sees models through ``scorer.Scorer`` alone: tokens in, logits out.
"""
