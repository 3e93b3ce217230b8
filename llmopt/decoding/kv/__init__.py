"""The pools' tensors: where keys and values lie, and what their codes mean."""
