"""Attention of one packed forward over paged keys and values."""
