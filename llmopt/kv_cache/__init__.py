"""What a quantized cache of keys and values gives back, for the road and its gate."""
