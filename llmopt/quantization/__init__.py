"""The mathematics of quantization: pure functions on tensors, no files, no models."""
