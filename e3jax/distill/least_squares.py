"""A start for the recovery, and all of it where nothing is trained: least squares.

What a removed layer gave is missing where the next one that stays begins. So each layer that stays
has the last matrix of its mlp fitted in closed form: with it the pruned model's residual stream is
as near as it can be to the dense model's there. Layer by layer, on what the pruned model itself
computes once the layers before are fitted. ReplaceMe (arXiv 2505.02819) fits one map in the place
of a block of layers; this is ours.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from e3jax import mesh
from e3jax.distill.distill import ends
from e3jax.models import decoder
from e3jax.models import layer as layers
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params

RIDGE = 0.3  # of the mean square of an activation: how firmly a matrix stays what it was


def fitted(
    dense: Params,
    cfg: ModelConfig,
    keep: Sequence[int],
    student: Params,
    batches: Sequence[Batch],
    *,
    dtype: Any,
) -> Params:
    """The student's parameters with the mlps' last matrices fitted, those in float32.

    student: of the layers `keep` of the dense model. batches: on the devices; a residual stream of
    each of both models is held, in `dtype`. What an mlp gives must go to the stream as it is:
    layers with experts, and those with a norm after the mlp, stay as they are.
    """
    of_student = cfg.take_layers(keep)

    @jax.jit
    def after(params: Params, h: jax.Array, batch: Batch, index: Any) -> jax.Array:
        return decoder.by_number(params, cfg, decoder.applier(batch, cfg, dtype))(index, h)

    @jax.jit
    def after_own(w: Params, h: jax.Array, batch: Batch, index: Any) -> jax.Array:
        return decoder.applier(batch, of_student, dtype)(w, h, index)

    @jax.jit
    def sums(w: Params, h: jax.Array, aim: jax.Array, batch: Batch, index: Any) -> tuple:
        around = decoder.applier(batch, of_student, dtype, of=_around_last_matrix)
        a, y = around(w, h, index)
        return _sums(a, aim.astype(jnp.float32) - y, aim, batch.segments > 0)

    def first(batch: Batch) -> jax.Array:
        return decoder.first_stream(dense, batch.tokens, cfg, dtype)

    aims = [jax.jit(first)(batch) for batch in batches]
    streams, done = list(aims), 0
    for number, end in enumerate(ends(keep, cfg.num_layers)):
        while done <= end:
            aims = [after(dense, h, b, done) for h, b in zip(aims, batches, strict=True)]
            done += 1
        run = next(r for r in of_student.runs if r.first <= number < r.first + r.count)
        w = decoder.weights_of(student, run, number)
        if "down" in w and "mlp_out_norm" not in w:
            parts = [sums(w, *x, number) for x in zip(streams, aims, batches, strict=True)]
            w["down"] = _solved(w["down"], functools.reduce(_added, parts), of_student)
            student = _with_down(student, run.stack, number - run.first + run.at, w["down"])
        streams = [after_own(w, h, b, number) for h, b in zip(streams, batches, strict=True)]
        # Not all layers at once in the queue: on CPUs their sums over devices could wait forever.
        jax.block_until_ready((streams, aims))
    return student


def _around_last_matrix(
    w: Params, h: jax.Array, cos_sin: Any, see: Any, cfg: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """What `down` multiplies, [B, T, F], and the residual stream after the layer, float32."""
    _, x = layers.attended(w, h, cos_sin, see, cfg)
    a = layers.activations(w, x, "", layers.ACTIVATIONS[cfg.activation])
    return a, layers.layer(w, h, cos_sin, see, cfg).astype(jnp.float32)


def _sums(a: jax.Array, gap: jax.Array, aim: jax.Array, mask: jax.Array) -> tuple:
    """a^T a [F, F] and a^T gap [F, D], a token's share relative to the square of its stream."""
    size = jnp.sum(aim.astype(jnp.float32) ** 2, axis=-1)
    weight = jnp.where(mask, 1.0 / jnp.maximum(size, 1e-12), 0.0)[..., None]
    a = mesh.place(a, ("batch", None, None)).astype(jnp.float32)
    product = functools.partial(
        jnp.einsum, precision="highest", out_sharding=mesh.out((None, None))
    )
    return product("btf,btg->fg", a * weight, a), product("btf,btd->fd", a * weight, gap)


def _added(a: tuple, b: tuple) -> tuple:
    return jax.tree.map(jnp.add, a, b)


@functools.partial(jax.jit, static_argnums=2)
def _solved(down: jax.Array, found: tuple, cfg: ModelConfig) -> jax.Array:
    """float32 [D, F]: down and what makes the gaps least, less than which it costs to change it."""
    squares, moments = found
    squares, moments = cfg.residual_scale**2 * squares, cfg.residual_scale * moments
    ridge = RIDGE * jnp.trace(squares) / len(squares)
    factor = jax.scipy.linalg.cho_factor(squares + ridge * jnp.eye(len(squares)))
    return down.astype(jnp.float32) + jax.scipy.linalg.cho_solve(factor, moments).T


def _with_down(params: Params, stack: str, place: int, down: jax.Array) -> Params:
    """The parameters with a layer's matrix put into its stack, in float32."""
    whole = params[stack]["down"].astype(jnp.float32)
    whole = whole.at[place].set(jax.sharding.reshard(down, jax.typeof(whole[place]).sharding.spec))
    return {**params, stack: {**params[stack], "down": whole}}
