"""Measured speed: dense beside pruned, by us and by transformers, on the same device."""
