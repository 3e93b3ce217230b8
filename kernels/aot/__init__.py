"""Compile every kernel for chips that are not here, and hold it to what they can bear."""
