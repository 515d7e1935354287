"""Rows rounded to float8 in one pass over what they are made of.

XLA makes them twice, for the greatest of each row and once more to round by that, at half of the
memory's speed or less. Here a warpgroup takes a row and keeps it while it looks for the greatest.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from e3jax.hopper import PROCESSORS, SHARED, kernel

LANES = 128
GROUPS = 4  # of lanes, taken at a time: rows are a multiple of both
STAGES = 2  # rows of each array that are there or on their way
PROGRAMS = 4  # of a multiprocessor, at most
REST = 4096  # bytes of shared memory for all else, at most
E4M3 = jnp.float8_e4m3fn
GREATEST = float(jnp.finfo(E4M3).max)
TINY = 1e-30  # the greatest of a row of zeros


def fits(width: int, arrays: int = 1) -> bool:
    """Whether the kernels take rows of so many, made of so many arrays."""
    return width % (GROUPS * LANES) == 0 and _bytes(width, arrays) <= SHARED


def _bytes(width: int, arrays: int) -> int:
    weight = 4 if arrays == 1 else 0
    return (STAGES * 2 * arrays + 1 + weight) * width + REST


def rounded_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """bfloat16 [S, F] as (numbers in e4m3 [S, F], float32 [S]: what each row is times)."""
    return _rounded(lambda x: x, (x,))


def rounded_norm(x: jax.Array, weight: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """The root-mean-square norm of bfloat16 [S, F], times float32 [F], in the same way."""
    return _rounded(lambda x, weight: x * weight, (x,), weight=weight, eps=eps)


def rounded_silu(
    gate: jax.Array, gate_scale: jax.Array, up: jax.Array, up_scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """silu(gate * gate_scale) * up * up_scale of bfloat16 [S, F] and float32 [S], in the same
    way."""

    def part(x: jax.Array, y: jax.Array, of_x: jax.Array, of_y: jax.Array) -> jax.Array:
        x, y = x * of_x, y * of_y
        half = jax.lax.rsqrt(1.0 + jnp.exp(-x))  # of the sigmoid, nothing is divided
        return x * (half * half) * y

    return _rounded(part, (gate, up), (gate_scale, up_scale))


def _rounded(
    part: Callable[..., jax.Array],
    arrays: tuple[jax.Array, ...],
    scales: tuple[jax.Array, ...] = (),
    *,
    weight: jax.Array | None = None,
    eps: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Rows that `part` makes of those of the arrays, and their numbers in `scales`.

    weight: its last argument, the same for all rows; they are then divided by the root mean square
    of the only array's, which goes into what each row is times.
    """
    rows, width = arrays[0].shape
    groups = width // LANES
    programs = min(PROGRAMS, SHARED // _bytes(width, len(arrays)))
    count = PROCESSORS * programs
    weights = [] if weight is None else [weight.reshape(groups, LANES)]
    layout = gpu.Layout.WG_STRIDED((GROUPS, LANES), vec_size=4)

    def body(*refs):
        array_refs, scale_refs = refs[: len(arrays)], refs[len(arrays) :][: len(scales)]
        *weight_refs, out_ref, scale_ref = refs[len(arrays) + len(scales) :]
        first = jax.lax.axis_index("sm")

        def row_of(step):
            return first + step * count

        def take(shared, at: int) -> jax.Array:
            taken = shared[pl.ds(at * GROUPS, GROUPS), :]
            return gpu.layout_cast(taken, layout).astype(jnp.float32)

        def everywhere(x: float) -> jax.Array:
            return gpu.layout_cast(jnp.full((GROUPS, LANES), x, jnp.float32), layout)

        def with_space(out_shared, barrier=None, *weight_shared):
            for ref, shared in zip(weight_refs, weight_shared, strict=True):
                gpu.copy_gmem_to_smem(ref, shared, barrier)
                gpu.barrier_wait(barrier)

            def step(index, *shared):
                row = row_of(index[0])
                of_row = [ref[row] for ref in scale_refs]
                top, squares, kept = everywhere(TINY), everywhere(0.0), []
                for at in range(groups // GROUPS):
                    parts = [take(each, at) for each in (*shared, *weight_shared)]
                    if weight_shared:
                        squares += parts[0] * parts[0]
                    y = part(*parts, *of_row)
                    top = jnp.maximum(top, jnp.abs(y))
                    kept.append(y.astype(jnp.bfloat16))  # a row in float32 is too many registers
                greatest = jnp.max(top)
                scale = greatest / GREATEST
                if weight_shared:
                    scale *= jax.lax.rsqrt(jnp.sum(squares) / width + eps)
                scale_ref[row] = scale
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
                step,
                grid=(steps,),
                in_specs=[block] * len(arrays),
                max_concurrent_steps=STAGES,
            )
            pipeline(*array_refs)
            gpu.wait_smem_to_gmem(0)

        @pl.when(first < rows)
        def _():
            of_weight = [gpu.Barrier(), gpu.SMEM((groups, LANES), jnp.float32)] if weights else []
            pl.run_scoped(with_space, gpu.SMEM((groups, LANES), E4M3), *of_weight)

    numbers, scale = kernel(
        body,
        (
            jax.ShapeDtypeStruct((rows * groups, LANES), E4M3),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ),
        programs=programs,
        approximate=True,
    )(*(x.reshape(-1, LANES) for x in arrays), *scales, *weights)
    return numbers.reshape(rows, width), scale
