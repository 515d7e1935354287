"""cuDNN's attention, for NVIDIA GPUs: the only place that imports JAX's interface to packed rows.

Nothing of [T, T] exists, forward or backward. Documents of a packed row are told apart by where
they begin and how long they are, so each is a sequence of its own to the kernel: what one sees of
another is not a matter of a mask's rounding.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as kernels

from e3jax import mesh

DTYPES = (jnp.bfloat16, jnp.float16)
# The forward kernel: what `selective` keeps of it are its output and its softmax's normalisers.
FORWARD = "dot_product_attention_fwd_wrapper"
HOPPER = "9.0"


def suits(time: int, head_dim: int, dtype: Any, documents: int | None) -> bool:
    """Whether the kernel is for rows of `time` tokens of at most `documents` documents.

    On a GPU that is there; older ones than Hopper take one document a row.
    """
    if not takes(time, head_dim, dtype, documents) or not kernels.check_compute_capability("8.0"):
        return False
    return kernels.check_compute_capability(HOPPER) or (documents == 1 and head_dim <= 128)


def takes(time: int, head_dim: int, dtype: Any, documents: int | None) -> bool:
    """The same on a GPU of Hopper's kind, which need not be there.

    It computes in half precision. The work space of its backward pass grows with the documents that
    a row may have, a row's head of H numbers a token for each: beyond some, a dense mask is less.
    """
    if documents is None or dtype not in DTYPES or head_dim % 8 or head_dim > 256:
        return False
    return documents * head_dim <= 2 * time


def make_attention(segments_bt: jax.Array, documents: int) -> Callable[..., jax.Array]:
    """A (q [B, T, K, G, H], k and v [B, T, K, H]) -> [B, T, K, G, H], in q's dtype.

    softmax(q k / sqrt(H)) v over the keys of the query's own document, none later. Each device runs
    the kernel on its own rows and heads. What padding sees nobody asks for: it is finite.
    """

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        attend = functools.partial(_local, documents=documents)
        return mesh.on_own_heads(attend, q, k, v, segments_bt)

    return attention


def spans(segments_bt: jax.Array, documents: int) -> tuple[jax.Array, jax.Array]:
    """Where the documents of each row begin, int32 [B, M + 1], and their lengths, int32 [B, M].

    Padding counts as a document (what no document covers the kernel would leave unwritten), so
    M = documents + 1; -1 where a row has fewer.
    """
    time = segments_bt.shape[1]
    before = jnp.pad(segments_bt[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    places = jnp.where(segments_bt != before, jnp.arange(time, dtype=jnp.int32), time)
    count = documents + 2  # the end of the last one too
    first = jnp.sort(jnp.pad(places, ((0, 0), (0, count)), constant_values=time))[:, :count]
    lengths = first[:, 1:] - first[:, :-1]
    return jnp.where(first < time, first, -1), jnp.where(lengths > 0, lengths, -1)


def _local(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    documents: int,
) -> jax.Array:
    """The kernel on one device's rows and heads."""
    rows, time, kv_heads, groups, width = q.shape
    packed: dict[str, Any] = {"mask_type": kernels.MaskType.CAUSAL}
    if documents > 1:
        begin, length = spans(segments, documents)
        packed = {
            "mask_type": kernels.MaskType.PADDING_CAUSAL,
            "q_seqlen": length,
            "kv_seqlen": length,
            "q_offsets": begin,
            "kv_offsets": begin,
        }
        # A head of keys for each of queries: else the backward pass of packed rows takes a work
        # space of documents x heads x tokens, and JAX 0.10 misplaces the documents' keys.
        k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    y = kernels.dot_product_attention(
        q.reshape(rows, time, kv_heads * groups, width),
        k,
        v,
        scale=width**-0.5,
        **packed,
    )
    return y.reshape(q.shape)
