"""Rotary position embeddings, always in float32: bfloat16 angles turn position 257 into 256."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e3jax.models.config import Rope

CosSin = tuple[jax.Array, jax.Array]


def inverse_frequencies(rope: Rope, head_dim: int, length: jax.Array | int = 0) -> jax.Array:
    """Angle a token of each of the H/2 planes, float32 [..., H/2].

    length: [...], the longest position plus one; only `dynamic` and `longrope` look at it.
    """
    dims = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    if rope.kind == "dynamic":
        length = jnp.maximum(length, rope.original_max_position).astype(jnp.float32)[..., None]
        stretch = rope.factor * length / rope.original_max_position - (rope.factor - 1)
        theta = rope.theta * stretch ** (head_dim / (head_dim - 2))
        return 1.0 / theta**dims
    freqs = 1.0 / rope.theta**dims
    if rope.kind == "longrope":
        short, long = (
            freqs / np.asarray(f, np.float32) for f in (rope.short_factors, rope.long_factors)
        )
        return jnp.where(jnp.asarray(length)[..., None] > rope.original_max_position, long, short)
    if rope.kind == "linear":
        freqs = freqs / rope.factor
    elif rope.kind == "llama3":
        freqs = _llama3(freqs, rope)
    elif rope.kind == "yarn":
        freqs = _yarn(freqs, rope, head_dim)
    return jnp.asarray(freqs, jnp.float32)


def _llama3(freqs: np.ndarray, rope: Rope) -> np.ndarray:
    """Long waves are slowed by `factor`, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / freqs
    context = rope.original_max_position
    smooth = (context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    return smooth * freqs + (1 - smooth) * freqs / rope.factor


def _yarn(freqs: np.ndarray, rope: Rope, head_dim: int) -> np.ndarray:
    """NTK-by-parts (arXiv 2309.00071): planes that turn often in the old context stay."""

    def plane_turning(times: float) -> float:
        per_turn = rope.original_max_position / (times * 2 * math.pi)
        return head_dim * math.log(per_turn) / (2 * math.log(rope.theta))

    low, high = plane_turning(rope.beta_fast), plane_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - low) / max(high - low, 1e-3)
    slowed = np.clip(ramp, 0.0, 1.0)
    return slowed * freqs / rope.factor + (1 - slowed) * freqs


def make_angles(
    positions_bt: jax.Array, kinds: Sequence[Rope | None], dim: int
) -> Callable[[Any], CosSin]:
    """A (kind) -> `angles` of a layer whose rope is kinds[kind]; with one kind of them, whatever
    is asked for. Where the rope is None all angles are 0, and a rotation changes nothing."""
    found = [_none(positions_bt, dim) if r is None else angles(positions_bt, r, dim) for r in kinds]
    if len(found) == 1:
        return lambda _: found[0]
    cos, sin = zip(*found, strict=True)

    def of_kind(kind: Any) -> CosSin:
        which = jnp.int32(kind)
        return jax.lax.select_n(which, *cos), jax.lax.select_n(which, *sin)

    return of_kind


def _none(positions_bt: jax.Array, dim: int) -> CosSin:
    turn = jnp.zeros_like(positions_bt, jnp.float32)[..., None] * jnp.zeros(dim // 2)
    return turn + 1, turn


def angles(positions_bt: jax.Array, rope: Rope, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each float32 [B, T, H/2].

    Ropes that look at the length take each row's own longest position. transformers takes the
    longest of the batch, so that a row's result there depends on its neighbours; alone, a row is
    the same. While a row is decoded, keys of tokens before stay turned as they were.
    """
    freqs = inverse_frequencies(rope, head_dim, jnp.max(positions_bt, axis=1, keepdims=True) + 1)
    turn = positions_bt.astype(jnp.float32)[..., None] * freqs
    return jnp.cos(turn) * rope.attention_factor, jnp.sin(turn) * rope.attention_factor


def rotate(
    x: jax.Array, cos_sin: tuple[jax.Array, jax.Array], interleaved: bool = False
) -> jax.Array:
    """Rotates [B, T, ..., H] by the half-split convention of Hugging Face; keeps x's dtype.

    interleaved: the two numbers of a plane are neighbours in x. They leave half a head apart all
    the same: queries and keys alike, so that their products are what they should be.
    What is behind the numbers that `cos_sin` is for stays as it is.
    """
    cos, sin = for_heads(cos_sin, x.ndim)
    if 2 * cos.shape[-1] < x.shape[-1]:
        x, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
        return jnp.concatenate([rotate(x, cos_sin, interleaved), rest], axis=-1)
    wide = x.astype(jnp.float32)
    x1, x2 = (wide[..., ::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def for_heads(cos_sin: tuple[jax.Array, jax.Array], ndim: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, H/2] -> [B, T, 1.., H/2] of `ndim` axes."""
    cos, sin = (jnp.expand_dims(a, tuple(range(2, ndim - 1))) for a in cos_sin)
    return cos, sin
