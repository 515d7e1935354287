"""What a model is worth: perplexity, distance from the dense model, solved problems."""
