"""Layer pruning for large language models in JAX: E3-Pruner (arXiv 2511.17205), end to end.

`e3jax.prune` is the whole job, api.py has the rest. Nothing is imported before it is asked for:
the command line sets environment variables before jax is.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e3jax.api import (
        Loaded,
        Pruned,
        export,
        importance,
        load,
        prune,
        recover,
        search_mask,
        tokenize,
        windows,
    )
    from e3jax.errors import UserError
    from e3jax.models.decoder import take_layers
    from e3jax.models.nnx import Decoder

__version__ = "0.1.0"

__all__ = [
    "Decoder",
    "Loaded",
    "Pruned",
    "UserError",
    "export",
    "importance",
    "load",
    "prune",
    "recover",
    "search_mask",
    "take_layers",
    "tokenize",
    "windows",
]

# Than in api.py.
_ELSEWHERE = {"Decoder": "models.nnx", "UserError": "errors", "take_layers": "models.decoder"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"e3jax.{_ELSEWHERE.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
