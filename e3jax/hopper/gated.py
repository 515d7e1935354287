"""silu(gate) * up of a network's products, rounded to float8, in one pass over them.

XLA makes it twice, for the greatest of each row and once more to round by that, at less than half
of the memory's speed. Here a warpgroup takes a row and keeps it while it looks for the greatest.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from e3jax.hopper import PROCESSORS, SHARED, kernel

LANES = 128
GROUPS = 4  # of lanes, taken at a time: rows are a multiple of both
STAGES = 2  # rows of both that are there or on their way
REST = 4096  # bytes of shared memory for all else, at most
E4M3 = jnp.float8_e4m3fn
GREATEST = float(jnp.finfo(E4M3).max)
TINY = 1e-30  # the greatest of a row of zeros


def fits(width: int) -> bool:
    """Whether the kernel takes rows of so many."""
    return width % (GROUPS * LANES) == 0 and _bytes(width) <= SHARED


def _bytes(width: int) -> int:
    return (STAGES * 2 * 2 + 1) * width + REST


def rounded_silu(
    gate: jax.Array, gate_scale: jax.Array, up: jax.Array, up_scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """silu(gate * gate_scale) * up * up_scale as (numbers in e4m3 [S, F], float32 [S]: what each
    row is times). gate, up: bfloat16 [S, F], with float32 [S] that they are times."""
    rows, width = gate.shape
    groups = width // LANES
    programs = 2 if 2 * _bytes(width) <= SHARED else 1
    count = PROCESSORS * programs
    layout = gpu.Layout.WG_STRIDED((GROUPS, LANES), vec_size=4)

    def body(gate_ref, gate_scale_ref, up_ref, up_scale_ref, out_ref, scale_ref):
        first = jax.lax.axis_index("sm")

        def row_of(step):
            return first + step * count

        def take(shared, at: int) -> jax.Array:
            part = shared[pl.ds(at * GROUPS, GROUPS), :]
            return gpu.layout_cast(part, layout).astype(jnp.float32)

        def with_space(out_shared):
            def step(index, gate_shared, up_shared):
                row = row_of(index[0])
                of_gate, of_up = gate_scale_ref[row], up_scale_ref[row]
                top = gpu.layout_cast(jnp.full((GROUPS, LANES), TINY, jnp.float32), layout)
                kept = []
                for at in range(groups // GROUPS):
                    x, y = take(gate_shared, at) * of_gate, take(up_shared, at) * of_up
                    half = jax.lax.rsqrt(1.0 + jnp.exp(-x))  # of the sigmoid, nothing is divided
                    y = x * (half * half) * y
                    top = jnp.maximum(top, jnp.abs(y))
                    kept.append(y.astype(jnp.bfloat16))  # a row in float32 is too many registers
                greatest = jnp.max(top)
                scale_ref[row] = greatest / GREATEST
                factor = GREATEST / greatest
                gpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the row before
                for at, y in enumerate(kept):
                    numbers = (y.astype(jnp.float32) * factor).astype(E4M3)
                    out_shared[pl.ds(at * GROUPS, GROUPS), :] = numbers
                gpu.commit_smem()
                gpu.copy_smem_to_gmem(out_shared, out_ref.at[pl.ds(row * groups, groups), :])

            block = gpu.BlockSpec((groups, LANES), lambda i: (row_of(i), 0))
            steps = (rows - first + count - 1) // count
            pipeline = gpu.emit_pipeline(
                step, grid=(steps,), in_specs=[block, block], max_concurrent_steps=STAGES
            )
            pipeline(gate_ref, up_ref)
            gpu.wait_smem_to_gmem(0)

        @pl.when(first < rows)
        def _():
            pl.run_scoped(with_space, gpu.SMEM((groups, LANES), E4M3))

    numbers, scale = kernel(
        body,
        (
            jax.ShapeDtypeStruct((rows * groups, LANES), E4M3),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ),
        programs=programs,
        approximate=True,
    )(gate.reshape(-1, LANES), gate_scale, up.reshape(-1, LANES), up_scale)
    return numbers.reshape(rows, width), scale
