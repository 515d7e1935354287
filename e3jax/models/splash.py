"""Splash attention, the TPU kernel: the only place that imports JAX's experimental interface to it.

Blocks of keys are streamed through the chip's vector memory; those that the causal mask or the
sliding window hides are neither fetched nor multiplied, and no [T, T] array exists, forward or
backward. Documents of a packed row are told apart by their segment ids.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as kernels

from e3jax import devices, mesh
from e3jax.models import recompute

LANES = 128  # the least block, in tokens
# The greatest block, in tokens: a 512 x 512 float32 tile of scores is 1 MiB, and all tiles of the
# greediest kernel (dkv, H = 256, float32) fit the 16 MiB of vector memory that a v5e gives a
# program. Larger blocks would multiply more of the half block that a causal diagonal wastes.
BLOCK = 512


def suits(time: int, head_dim: int) -> bool:
    """Whether the kernel is for rows of `time` tokens and heads of `head_dim`.

    Below a block a dense mask is smaller than what the kernel pads a row to.
    """
    return time >= LANES and head_dim % 8 == 0 and head_dim <= 256


def blocks(time: int) -> tuple[int, int]:
    """Tokens of a block and blocks of a row: equal blocks, the fewest, that cover `time`."""
    count = -(-time // BLOCK)
    return -(-time // (count * LANES)) * LANES, count


def make_attention(
    segments_bt: jax.Array, window: int | None, cap: float | None = None
) -> Callable[..., jax.Array]:
    """A (q [B, T, K, G, H], k and v [B, T, K, H], sinks [K, G]) -> [B, T, K, G, H], in q's dtype.

    softmax(q k / sqrt(H)) v over the keys of the query's own segment, none later, and none more
    than `window` - 1 tokens back; the scores within the soft `cap`. Each device runs the kernel on
    its own rows and heads. Padding (segment 0) attends to padding, so that every query sees a key.
    Where the mesh is not of TPUs the kernel is interpreted, slowly.
    """

    def attention(
        q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None = None
    ) -> jax.Array:
        attend = functools.partial(_local, window=window, cap=cap)
        if q.dtype == jnp.float32:
            attend = _exact(attend)
        return mesh.on_own_heads(attend, q, k, v, segments_bt, sinks)

    return attention


def _exact(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """float32 multiplied as float32, forward and backward; a TPU would do it in bfloat16.

    The kernel takes no precision, and jax.default_matmul_precision around the call of a function
    does not reach its derivative: so that is taken here.
    """
    highest = functools.partial(jax.default_matmul_precision, "highest")

    @jax.custom_vjp
    def exact(*arrays: jax.Array) -> jax.Array:
        with highest():
            return attend(*arrays)

    def forward(*arrays: jax.Array) -> tuple[jax.Array, Callable]:
        with highest():
            return jax.vjp(attend, *arrays)

    def backward(pull: Callable, g: jax.Array) -> tuple:
        with highest():
            return pull(g)

    exact.defvjp(forward, backward)
    return exact


def _local(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *sinks: jax.Array,
    window: int | None,
    cap: float | None,
) -> jax.Array:
    """The kernel on one device's rows and heads. sinks: float32 [K, G], where there are any."""
    rows, time, kv_heads, groups, width = q.shape
    block, count = blocks(time)
    pad = block * count - time  # behind the row: no query of the row sees it

    def head_major(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, time + pad, -1, width), 1, 2)

    segments = jnp.pad(segments, ((0, 0), (0, pad)))
    kernel = _kernel(block, count, kv_heads * groups, window, cap)
    y = jax.vmap(kernel, (0, 0, 0, 0, *(None for _ in sinks)))(
        head_major(q * width**-0.5),
        head_major(k),
        head_major(v),
        kernels.SegmentIds(segments, segments),
        *(each.astype(jnp.float32).reshape(-1) for each in sinks),
    )
    return jnp.moveaxis(y, 2, 1)[:, :time].reshape(q.shape)


def _kernel(block: int, count: int, num_heads: int, window: int | None, cap: float | None):
    """The kernel for rows of `count` blocks; query head n reads key-value head n // G."""
    shape = (block * count,) * 2
    if window is None:
        mask = kernels.CausalMask(shape)
    else:
        mask = kernels.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    return kernels.make_splash_mha(
        kernels.MultiHeadMask([mask] * num_heads),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=cap,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=recompute.KEPT,
        interpret=devices.platform() != "tpu",
    )
