"""The dense model goes on where the masked ones leave it.

Up to the first layer that its mask removes a masked model computes what the dense one does, and
that layer's output too, before the gate leaves it out: the search needs it, to know what leaving it
out does to the loss. So the dense model runs from there, from the residual stream of the mask of
its window that came farthest. Ours, not the paper's; no figure changes by it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from e3jax import mesh
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params
from e3jax.training.optim import join_microbatches, split_microbatches

# Windows start at a layer of their own in parts of at least so many tokens: products of fewer rows
# leave a GPU's multiprocessors idle.
PART_TOKENS = 4096


def shared_layers(gates_wml: jax.Array, time: int) -> jax.Array:
    """Layers of the dense model that need not be run again, 1 to L: int32 [W, M].

    gates_wml: float32 of 0 and 1, M masks for each of W windows of `time` tokens. Windows that run
    together run the same layers: none counts more than the one of its part that shares least.
    """
    parts = _parts(len(gates_wml), time)
    kept = jnp.cumprod((gates_wml > 0).astype(jnp.int32), axis=-1)
    shared = jnp.minimum(jnp.sum(kept, axis=-1) + 1, gates_wml.shape[-1])
    most = jnp.max(shared, axis=1).reshape(-1, parts, out_sharding=mesh.out(("batch", None)))
    least = jnp.tile(jnp.min(most, axis=0), len(most))
    return jnp.minimum(shared, least[:, None])


def dense_hidden(
    params: Params,
    windows: Batch,
    cfg: ModelConfig,
    tapped: jax.Array,
    shared_wm: jax.Array,
    *,
    dtype: Any,
) -> jax.Array:
    """Final hidden states [W, T, D] of the dense model, without gradient.

    tapped: [W * M, T, D], the residual stream of the masked models out of the last of their
      `shared_layers`, before its gate.
    """
    place = mesh.out(("batch", None, None, None))
    tapped = tapped.reshape(*shared_wm.shape, *tapped.shape[1:], out_sharding=place)
    farthest = jnp.argmax(shared_wm, axis=1, keepdims=True) == jnp.arange(shared_wm.shape[1])
    h = jnp.sum(jnp.where(farthest[..., None, None], tapped, 0), axis=1)

    def resume(part: tuple[Batch, jax.Array, jax.Array]) -> jax.Array:
        batch, h, shared_w = part
        return decoder.resume(params, batch, cfg, h, jnp.min(shared_w), dtype=dtype)

    whole = (windows, h, jnp.max(shared_wm, axis=1))
    parts = _parts(*windows.tokens.shape)
    if parts == 1:
        return resume(whole)
    return join_microbatches(jax.lax.map(resume, split_microbatches(whole, parts)))


def _parts(rows: int, time: int) -> int:
    """Parts of the same size that the windows make; one where several devices have them."""
    if mesh.shards_rows():
        return 1
    fitting = (n for n in range(1, rows + 1) if rows % n == 0 and rows // n * time >= PART_TOKENS)
    return max(fitting, default=1)
