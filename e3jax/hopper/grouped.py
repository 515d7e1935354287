"""Grouped products: rows times their group's matrix, a kernel for all groups.

Rows lie group after group, each group in blocks of `BLOCK` rows of its own (the last filled up with
zeros), so that a block of rows meets one matrix and nothing is masked. Tensor cores multiply
bfloat16 or float16 and add up in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu

from e3jax.hopper import kernel

ACC = gpu.ACC  # pyright: ignore[reportPrivateImportUsage]
BLOCK = 128  # rows
DEPTH = 64  # summed at a time: the widths of matrices are multiples of it
WIDTH = 192  # columns of a block of the result
STAGES = 4  # of the pipeline from memory


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(x_mk: jax.Array, matrices: jax.Array, group_b: jax.Array, axis: int) -> jax.Array:
    """Rows [M, K] times the matrix of their block's group, [M, N], in x's dtype.

    matrices [E, N, K] with axis 2, [E, K, N] with axis 1: the axis that is summed over. group_b:
    int32 [M / BLOCK], E for blocks of no group, whose rows of the result nobody wrote.
    """
    return _rows_by_matrices(x_mk, matrices, group_b, axis)


def _forward(x_mk, matrices, group_b, axis):
    return product(x_mk, matrices, group_b, axis), (x_mk, matrices, group_b)


def _backward(axis, kept, dy_mn):
    x_mk, matrices, group_b = kept
    dx = _rows_by_matrices(dy_mn, matrices, group_b, 3 - axis)
    left, right = (dy_mn, x_mk) if axis == 2 else (x_mk, dy_mn)
    return dx, _rows_by_rows(left, right, group_b, len(matrices)), None


product.defvjp(_forward, _backward)


def _rows_by_matrices(x: jax.Array, w: jax.Array, group: jax.Array, axis: int) -> jax.Array:
    (rows, depth), width = x.shape, w.shape[3 - axis]
    count = len(w)
    blocks = rows // BLOCK, pl.cdiv(width, WIDTH)

    def body(group_ref, x_ref, w_ref, y_ref):
        @gpu.nd_loop((blocks[0] * blocks[1],), collective_axes="sm")
        def _(loop):
            row, column = gpu.planar_snake(loop.index[0], blocks, 1, 4)
            of = group_ref[row]

            def multiply(sums):
                def step(_, x_shared, w_shared):
                    w_shared = w_shared.transpose((1, 0)) if axis == 2 else w_shared
                    gpu.wgmma(sums, x_shared, w_shared)

                shape = (WIDTH, DEPTH) if axis == 2 else (DEPTH, WIDTH)
                at = (lambda k: (column, k)) if axis == 2 else (lambda k: (k, column))
                pipeline = gpu.emit_pipeline(
                    step,
                    grid=(depth // DEPTH,),
                    in_specs=[
                        gpu.BlockSpec((BLOCK, DEPTH), lambda k: (row, k), delay_release=1),
                        gpu.BlockSpec(shape, at, delay_release=1),
                    ],
                    max_concurrent_steps=STAGES,
                )
                pipeline(x_ref, w_ref.at[of])
                return sums[...]

            @pl.when(of < count)
            def _():
                sums = pl.run_scoped(multiply, ACC((BLOCK, WIDTH)))
                _store(sums, y_ref.at[pl.ds(row * BLOCK, BLOCK), pl.ds(column * WIDTH, WIDTH)])

    return kernel(body, jax.ShapeDtypeStruct((rows, width), x.dtype))(group, x, w)


def _rows_by_rows(left: jax.Array, right: jax.Array, group: jax.Array, count: int) -> jax.Array:
    """The sum over each group's rows of left [M, I] x right [M, J]: [E, I, J]."""
    height, width = left.shape[1], right.shape[1]
    blocks = pl.cdiv(height, BLOCK), pl.cdiv(width, WIDTH)
    first = jnp.searchsorted(group, jnp.arange(count + 1, dtype=jnp.int32)).astype(jnp.int32)
    steps = BLOCK // DEPTH

    def body(first_ref, left_ref, right_ref, out_ref):
        @gpu.nd_loop((count, blocks[0] * blocks[1]), collective_axes="sm")
        def _(loop):
            of = loop.index[0]
            row, column = gpu.planar_snake(loop.index[1], blocks, 1, 4)
            begin, end = first_ref[of], first_ref[of + 1]

            def multiply(sums):
                def step(_, left_shared, right_shared):
                    gpu.wgmma(sums, left_shared.transpose((1, 0)), right_shared)

                @pl.when(end > begin)
                def _():
                    pipeline = gpu.emit_pipeline(
                        step,
                        grid=((end - begin) * steps,),
                        in_specs=[
                            gpu.BlockSpec(
                                (DEPTH, BLOCK), lambda k: (begin * steps + k, row), delay_release=1
                            ),
                            gpu.BlockSpec(
                                (DEPTH, WIDTH),
                                lambda k: (begin * steps + k, column),
                                delay_release=1,
                            ),
                        ],
                        max_concurrent_steps=STAGES,
                    )
                    pipeline(left_ref, right_ref)

                return sums[...]

            sums = pl.run_scoped(multiply, ACC((BLOCK, WIDTH)))
            place = pl.ds(row * BLOCK, BLOCK), pl.ds(column * WIDTH, WIDTH)
            _store(sums, out_ref.at[(of, *place)])

    out = jax.ShapeDtypeStruct((count, height, width), left.dtype)
    return kernel(body, out)(first, left, right)


def _store(sums: jax.Array, out) -> None:
    @functools.partial(pl.run_scoped, shared=gpu.SMEM(sums.shape, out.dtype))
    def _(shared):
        shared[...] = sums.astype(out.dtype)
        gpu.commit_smem()
        gpu.copy_smem_to_gmem(shared, out)
        gpu.wait_smem_to_gmem(0, wait_read_only=True)
