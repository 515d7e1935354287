"""What backward keeps of a layer and what it computes again."""

from collections.abc import Callable
from typing import Literal

import jax
from jax.ad_checkpoint import checkpoint_name

Remat = Literal["none", "layer", "selective"]
KEPT = "kept"


def keep(x: jax.Array) -> jax.Array:
    """Marks an array that `selective` keeps."""
    return checkpoint_name(x, KEPT)


def checkpoint(body: Callable, remat: Remat) -> Callable:
    """The body of a scan over layers; its arguments, the residual stream too, are always kept."""
    if remat == "none":
        return body
    policy = jax.checkpoint_policies.save_only_these_names(KEPT) if remat == "selective" else None
    return jax.checkpoint(body, prevent_cse=False, policy=policy)
