"""Calibration: text to token blocks, the block walker, and the statistics a solver needs."""
