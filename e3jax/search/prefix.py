"""The forward pass of a search step: masked models, and the dense one where they leave it.

Up to the first layer that its mask removes a masked model computes what the dense one does, and
that layer's output too, before the gate leaves it out: the search needs it, to know what leaving it
out does to the loss. So the dense model runs from there, from the residual stream of that mask of
its window which came farthest. And layer 0 is run once for all of them, with no gradient below its
gate. Ours, not the paper's; no figure changes by it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from e3jax import mesh
from e3jax.models import decoder, recompute
from e3jax.models.config import ModelConfig, Run
from e3jax.models.decoder import Batch, Params
from e3jax.models.gate import apply_gate, choose_rows
from e3jax.training.optim import join_microbatches, split_microbatches

# Windows start at a layer of their own in parts of at least so many tokens: products of fewer rows
# leave a GPU's multiprocessors idle.
PART_TOKENS = 4096


def hidden_states(
    params: Params,
    windows: Batch,
    cfg: ModelConfig,
    gates_wml: jax.Array,
    *,
    dtype: Any,
    remat: str,
    dense: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Final hidden states [W * M, T, D] of masked models, and [W, T, D] of the dense one.

    gates_wml: float32 of 0 and 1, M masks for each of W windows; the gradient reaches every gate
    (see gate.py). dense: whether the dense model's are wanted, else None; they have no gradient.
    """
    shared_wm = shared_layers(gates_wml, windows.tokens.shape[1])
    tap_b = shared_wm.reshape(-1, out_sharding=mesh.out(("batch",))) - 1
    rows = mesh.out(("batch", None))
    gates_lb = gates_wml.reshape(-1, cfg.num_layers, out_sharding=rows).T
    first = decoder.first_stream(params, windows.tokens, cfg, dtype)
    weights = decoder.weights_of(params, cfg.runs[0], 0)
    one = decoder.applier(windows, cfg, dtype)(weights, first, 0)
    masks = gates_wml.shape[1]
    batch, first, one = jax.tree.map(lambda x: mesh.repeat_rows(x, masks), (windows, first, one))
    apply = decoder.applier(batch, cfg, dtype)

    def step_of(run: Run) -> Callable[..., Any]:
        def gated(h: jax.Array, xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            index, gate_b = xs
            y = apply(decoder.weights_of(params, run, index), h, index)
            return apply_gate(h, y, gate_b), y

        gated = recompute.checkpoint(gated, remat)

        def step(carry: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, jax.Array]) -> Any:
            h, tapped = carry
            h, y = gated(h, xs)
            if dense:
                tapped = choose_rows(xs[0] <= tap_b, jax.lax.stop_gradient(y), tapped)
            return (h, tapped), None

        return step

    state = apply_gate(first, one, gates_lb[0]), one
    for run in cfg.runs:
        begin, end = max(run.first, 1), run.first + run.count
        if begin < end:
            xs = jnp.arange(begin, end), gates_lb[begin:end]
            state, _ = jax.lax.scan(step_of(run), state, xs)
    h, tapped = state
    h = decoder.last_norm(params, h, cfg)
    return h, _dense(params, windows, cfg, tapped, shared_wm, dtype) if dense else None


def shared_layers(gates_wml: jax.Array, time: int) -> jax.Array:
    """Layers of the dense model that need not be run again, 1 to L: int32 [W, M].

    Windows, of `time` tokens, that run together run the same layers: none counts more than the one
    of its part that shares least.
    """
    parts = _parts(len(gates_wml), time)
    kept = jnp.cumprod((gates_wml > 0).astype(jnp.int32), axis=-1)
    shared = jnp.minimum(jnp.sum(kept, axis=-1) + 1, gates_wml.shape[-1])
    most = jnp.max(shared, axis=1).reshape(-1, parts, out_sharding=mesh.out(("batch", None)))
    least = jnp.tile(jnp.min(most, axis=0), len(most))
    return jnp.minimum(shared, least[:, None])


def _dense(
    params: Params,
    windows: Batch,
    cfg: ModelConfig,
    tapped: jax.Array,
    shared_wm: jax.Array,
    dtype: Any,
) -> jax.Array:
    """Of the dense model, [W, T, D]. tapped: [W * M, T, D], the masked models' residual stream out
    of the last of their `shared_layers`, before its gate."""
    place = mesh.out(("batch", None, None, None))
    tapped = tapped.reshape(*shared_wm.shape, *tapped.shape[1:], out_sharding=place)
    farthest = jnp.argmax(shared_wm, axis=1, keepdims=True) == jnp.arange(shared_wm.shape[1])
    h = jnp.sum(jnp.where(farthest[..., None, None], tapped, 0), axis=1)

    def go_on(part: tuple[Batch, jax.Array, jax.Array]) -> jax.Array:
        batch, h, shared_w = part
        apply = decoder.applier(batch, cfg, dtype)

        for run in cfg.runs:

            def body(index: jax.Array, h: jax.Array, run: Run = run) -> jax.Array:
                return apply(decoder.weights_of(params, run, index), h, index)

            end = run.first + run.count
            h = jax.lax.fori_loop(jnp.clip(jnp.min(shared_w), run.first, end), end, body, h)
        return h

    whole = (windows, h, jnp.max(shared_wm, axis=1))
    parts = _parts(*windows.tokens.shape)
    if parts == 1:
        h = go_on(whole)
    else:
        h = join_microbatches(jax.lax.map(go_on, split_microbatches(whole, parts)))
    return decoder.last_norm(params, h, cfg)


def _parts(rows: int, time: int) -> int:
    """Parts of the same size that the windows make; one where several devices have them."""
    if mesh.shards_rows():
        return 1
    fitting = (n for n in range(1, rows + 1) if rows % n == 0 and rows // n * time >= PART_TOKENS)
    return max(fitting, default=1)
