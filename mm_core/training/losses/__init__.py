"""Losses over the tokens of a text: how tokens are weighted, and the head that never makes all logits at once."""
