"""What is compiled: one module an operation, its ``cases()`` in ``Case``s."""
