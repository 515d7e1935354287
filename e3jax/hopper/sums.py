"""The sums of distill/terms.py over the vocabulary, at the speed of the memory.

XLA's reduction of as many outcomes reaches less than half of it. Every warpgroup takes a row and
reads both logits once.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from e3jax.hopper import kernel

LANES = 128  # the vocabulary is a multiple of it
GROUPS = 16  # of lanes, read at a time
STAGES = 4  # of the pipeline from memory
PROGRAMS = 2  # of a multiprocessor
LEAST = np.float32(-1e30)  # e^LEAST is 0, LEAST e^LEAST too


def row_sums(
    z_q: jax.Array, z_p: jax.Array, ref_q: jax.Array, ref_p: jax.Array, targets: jax.Array
) -> jax.Array:
    """Of float32 logits [S, V] less their references [S], q and p: the greatest q, the greatest p,
    q where p is greatest, q at the target (int32 [S]), and the sums of e^q, e^p, e^p (p - q) and
    e^p p: float32 [S, 8]."""
    rows, vocabulary = z_q.shape
    shape = (GROUPS, LANES)
    layout = gpu.Layout.WG_STRIDED(shape, vec_size=4)

    def body(q_ref, p_ref, ref_q_ref, ref_p_ref, target_ref, out_ref):
        def everywhere(x: np.float32) -> jax.Array:
            return gpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)

        @gpu.nd_loop((rows,), collective_axes="sm")
        def _(loop):
            (row,) = loop.index
            base_q, base_p, target = ref_q_ref[row], ref_p_ref[row], target_ref[row]
            group, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
            first_places = gpu.layout_cast(group * LANES + lane, layout)

            def step(index, q_shared, p_shared, found):
                top_q, top_p, at_top, at_target, sum_q, sum_p, apart, of_p = found
                places = first_places + index[0] * (GROUPS * LANES)
                there = places < vocabulary
                q = jnp.where(there, q_shared[...] - base_q, LEAST)
                p = jnp.where(there, p_shared[...] - base_p, LEAST)
                e_p = jnp.exp(p)
                beside = jnp.where(p == top_p, jnp.maximum(at_top, q), at_top)
                return (
                    jnp.maximum(top_q, q),
                    jnp.maximum(top_p, p),
                    jnp.where(p > top_p, q, beside),
                    at_target + jnp.where(places == target, q, 0.0),
                    sum_q + jnp.exp(q),
                    sum_p + e_p,
                    apart + e_p * (p - q),
                    of_p + e_p * p,
                )

            block = gpu.BlockSpec(shape, lambda i: (i, 0))
            least, none = everywhere(LEAST), everywhere(np.float32(0))
            pipeline = gpu.emit_pipeline(
                step,
                grid=(pl.cdiv(vocabulary, GROUPS * LANES),),
                in_specs=[block, block],
                max_concurrent_steps=STAGES,
                init_carry=(least,) * 3 + (none,) * 5,
            )
            top_q, top_p, at_top, *sums = pipeline(q_ref.at[row], p_ref.at[row])
            greatest = jnp.max(top_p)
            out_ref[row, 0] = jnp.max(top_q)
            out_ref[row, 1] = greatest
            out_ref[row, 2] = jnp.max(jnp.where(top_p == greatest, at_top, LEAST))
            for place, x in enumerate(sums, 3):
                out_ref[row, place] = jnp.sum(x)

    by_lanes = (z.reshape(rows, vocabulary // LANES, LANES) for z in (z_q, z_p))
    out = jax.ShapeDtypeStruct((rows, 8), jnp.float32)
    return kernel(body, out, programs=PROGRAMS)(*by_lanes, ref_q, ref_p, targets)
