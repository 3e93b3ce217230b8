"""Safetensors on disk: lazy reader, shard writer, staged artifact, publication."""
