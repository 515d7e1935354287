"""The kernels for Hopper are lowered for it by every JAX; not every one can interpret them."""

import functools

import jax
import jax.numpy as jnp
import pytest

from e3jax.hopper import grouped, rows, sums


def arrays(*shapes_and_types):
    return [jax.ShapeDtypeStruct(*each) for each in shapes_and_types]


LOGITS, ROW = ((64, 151_936), jnp.float32), ((64,), jnp.float32)
HALF = ((256, 9728), jnp.bfloat16), ((256,), jnp.float32)
KERNELS = {
    "sums": (sums.row_sums, arrays(LOGITS, LOGITS, ROW, ROW, ((64,), jnp.int32))),
    "rows": (rows.rounded_rows, arrays(HALF[0])),
    "norm": (
        functools.partial(rows.rounded_norm, eps=1e-6),
        arrays(HALF[0], ((9728,), jnp.float32)),
    ),
    "silu": (rows.rounded_silu, arrays(*HALF, *HALF)),
    "grouped": (
        functools.partial(grouped.product, axis=2),
        arrays(((512, 128), jnp.bfloat16), ((8, 192, 128), jnp.bfloat16), ((4,), jnp.int32)),
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_it_is_lowered(name):
    kernel, shapes = KERNELS[name]
    lowered = jax.jit(kernel).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in lowered


def test_which_rows_fit():
    of_two = functools.partial(rows.fits, arrays=2)
    assert all(map(of_two, (512, 6144, 9728, 17_408, 25_088)))
    assert not any(map(of_two, (11_008, 25_600)))  # no multiple of 512; no shared memory for it
    assert all(map(rows.fits, (1024, 2560, 16_384, 24_576))) and not rows.fits(2880)
