"""``llmopt bench decode``: engines, weights and caches beside the floor, by batch and context."""
