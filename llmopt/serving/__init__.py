"""Doors to real engines."""
