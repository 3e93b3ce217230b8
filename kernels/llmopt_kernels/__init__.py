"""Kernels: one file an operation, its reference in torch first. Imports torch and triton alone."""
