"""AdamW as both distillation and plain training use it, and exact gradient accumulation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from e3jax import config, mesh

Tree = Any


def make_schedule(o: config.Optimizer, steps: int) -> optax.Schedule:
    """Learning rate of a step: linear warm-up, then cosine to `final` of the peak at `steps`."""
    warmup = round(o.warmup * steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=o.lr / max(warmup, 1),
        peak_value=o.lr,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=o.lr * o.final,
    )


def make_optimizer(o: config.Optimizer, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with float32 moments; decay on matrices only."""
    return optax.chain(
        optax.clip_by_global_norm(o.clip),
        optax.adamw(
            make_schedule(o, steps),
            b1=o.b1,
            b2=o.b2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            mask=decayed,
        ),
    )


def decayed(params: Tree) -> Tree:
    """True for the leaves that weight decay applies to: all but norms and biases.

    By name, since a stacked norm [L, D] looks like a matrix.
    """

    def is_matrix(path: tuple, _: Any) -> bool:
        name = str(path[-1].key)
        return not name.endswith(("norm", "bias"))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def split_microbatches(batch: Tree, count: int) -> Tree:
    """[B, ...] leaves -> [count, B / count, ...]; every micro-batch takes rows of every device.

    Rows are dealt out with a stride, so each device's rows stay where they are.
    Raises UserError when the devices cannot share a micro-batch evenly.
    """
    mesh.check_shared("microbatch", len(jax.tree.leaves(batch)[0]) // count)

    def split(x: jax.Array) -> jax.Array:
        rows = x.shape[0] // count
        place = mesh.out(("batch",) + (None,) * x.ndim)
        x = x.reshape(rows, count, *x.shape[1:], out_sharding=place)
        return jnp.swapaxes(x, 0, 1)

    return jax.tree.map(split, batch)


def join_microbatches(parts: Tree) -> Tree:
    """What `split_microbatches` took apart, put together: [count, b, ...] -> [count * b, ...]."""

    def join(x: jax.Array) -> jax.Array:
        place = mesh.out(("batch",) + (None,) * (x.ndim - 2))
        x = jnp.swapaxes(x, 0, 1)
        return x.reshape(-1, *x.shape[2:], out_sharding=place)

    return jax.tree.map(join, parts)


def accumulate(
    sums_fn: Callable[[Tree, Tree], Any], params: Tree, batch: Tree, count: int
) -> tuple[Tree, Any]:
    """Gradient of (sum of losses) / (sum of weights) over `count` micro-batches, and the sums.

    sums_fn(params, micro_batch) -> the sum of losses, and a pytree of float32 sums with the field
    `weight`. Both are added up and divided once, so micro-batches with unequal weights count as
    they should.
    """

    def loss_fn(params: Tree, micro: Tree) -> tuple[jax.Array, Any]:
        loss, sums = sums_fn(params, micro)
        return loss, jax.tree.map(jnp.sum, sums)

    grad_fn = jax.grad(loss_fn, has_aux=True)
    if count == 1:
        grads, sums = grad_fn(params, batch)
    else:

        def body(total: tuple, micro: Tree) -> tuple[tuple, None]:
            return jax.tree.map(jnp.add, total, grad_fn(params, micro)), None

        micros = split_microbatches(batch, count)
        first = jax.tree.map(lambda x: x[0], micros)
        shapes = jax.eval_shape(grad_fn, params, first)
        zeros = jax.tree.map(_zeros_like, shapes)
        (grads, sums), _ = jax.lax.scan(body, zeros, micros)
    weight = jnp.maximum(sums.weight, 1e-9)
    return jax.tree.map(lambda g: g / weight, grads), sums


def _zeros_like(shape: Any) -> jax.Array:
    place = None if mesh.current() is None else shape.sharding.spec
    return jnp.zeros(shape.shape, shape.dtype, out_sharding=place)


def update(
    optimizer: optax.GradientTransformation, grads: Tree, opt_state: Tree, params: Tree
) -> tuple[Tree, Tree, jax.Array, jax.Array]:
    """One optimiser step, or none: (params, opt_state, gradient norm, finite).

    If any gradient is not finite everything stays as it was, the optimiser's own count included, so
    a skipped step does not move the schedule.
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm)
    updates, new_state = optimizer.update(grads, opt_state, params)
    new_params = optax.apply_updates(params, updates)
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    return (
        jax.tree.map(keep, new_params, params),
        jax.tree.map(keep, new_state, opt_state),
        norm,
        finite,
    )
