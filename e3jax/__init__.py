"""Layer pruning for large language models in JAX: E3-Pruner (arXiv 2511.17205), end to end."""

__version__ = "0.1.0"
