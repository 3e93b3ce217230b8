"""From logits to the next token of every request: filters, one draw a row, log-probabilities."""
