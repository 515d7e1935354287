"""One decoder layer: self-attention and the feed-forward network, with their norms.

Axes as in decoder.py. What a norm gives to matrices in float8 may be float8.Rounded already.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from e3jax.models import float8, latent, moe, recompute, rope
from e3jax.models.attention import Attend, scaled
from e3jax.models.config import ModelConfig
from e3jax.models.float8 import Activations
from e3jax.models.norm import norm, norm_rotate, rms_norm, scale_of
from e3jax.models.params import Params
from e3jax.models.product import project

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def layer(
    w: Params,
    h_btd: jax.Array,
    cos_sin: tuple[jax.Array, jax.Array],
    attend: Attend,
    cfg: ModelConfig,
    *,
    absorbed: bool = False,
    watch: Callable[[jax.Array], object] | None = None,
) -> jax.Array:
    """One decoder layer, residual stream in and out; `w` has no layer axis.

    attend: knows who sees whom, and in decoding the keys that came before. absorbed: what latent
    attention gives it are latent vectors (latent.py). watch: is given what the feed-forward network
    reads.
    """
    h_btd, x = attended(w, h_btd, cos_sin, attend, cfg, absorbed=absorbed)
    if watch is not None:
        watch(x)
    y = feed_forward(w, x, cfg)
    return recompute.keep(h_btd + _added(w, "mlp_out_norm", y, cfg))


def attended(
    w: Params,
    h_btd: jax.Array,
    cos_sin: tuple[jax.Array, jax.Array],
    attend: Attend,
    cfg: ModelConfig,
    *,
    absorbed: bool = False,
) -> tuple[jax.Array, Any]:
    """A layer's first half: the residual stream with attention in it, and what the feed-forward
    network reads."""
    x = _read_by(("q", "k", "v"), w, "attn_norm", h_btd, cfg)
    if cfg.latent is not None:
        y = latent.attention(w, x, cos_sin, attend, cfg, absorbed=absorbed)
    else:
        y = attention(w, x, cos_sin, attend, cfg)
    h_btd = h_btd + _added(w, "attn_out_norm", y, cfg)
    if not cfg.parallel:
        h_btd = recompute.keep(h_btd)
        x = _read_by(("gate", "up"), w, "mlp_norm", h_btd, cfg)
    return h_btd, x


def _read_by(
    names: Sequence[str], w: Params, norm_name: str, h_btd: jax.Array, cfg: ModelConfig
) -> Any:
    """A norm of the residual stream, float8.Rounded for the matrices that read it where they do."""
    is_rms = norm_name in w and cfg.norm == "rms" and not cfg.parallel
    if is_rms and float8.read_rounded(h_btd, *map(w.get, names)):
        return float8.normed(h_btd, scale_of(w, norm_name, cfg), cfg.norm_eps)
    return norm(w, norm_name, h_btd, cfg)


def _added(w: Params, norm_name: str, y_btd: jax.Array, cfg: ModelConfig) -> jax.Array:
    """What goes to the residual stream of what attention or mlp give."""
    y = norm(w, norm_name, y_btd, cfg)
    if cfg.residual_scale == 1.0:
        return y
    # In float32: rounded to bfloat16, 0.22 would be 0.1 per cent less for every number.
    return (y.astype(jnp.float32) * cfg.residual_scale).astype(y.dtype)


def attention(
    w: Params,
    x_btd: Activations,
    cos_sin: tuple[jax.Array, jax.Array],
    attend: Attend,
    cfg: ModelConfig,
) -> jax.Array:
    """Self-attention with grouped queries."""
    q = project("btd,kghd->btkgh", x_btd, w["q"], ("batch", None, "heads", "groups", None))
    k = project("btd,khd->btkh", x_btd, w["k"], ("batch", None, "heads", None))
    v = project("btd,khd->btkh", x_btd, w["v"], ("batch", None, "heads", None))
    if cfg.qkv_bias:
        q, k, v = (
            y + w[f"{n}_bias"].astype(y.dtype) for n, y in zip("qkv", (q, k, v), strict=True)
        )
    q, k, v = map(recompute.keep, (q, k, v))  # before the norm, whose backward asks for its input
    if cfg.qk_norm == "whole":
        q = rms_norm(q, scale_of(w, "q_norm", cfg), cfg.norm_eps, axes=3)
        k = rms_norm(k, scale_of(w, "k_norm", cfg), cfg.norm_eps, axes=2)
    if cfg.qkv_clip is not None:
        q, k, v = (jnp.clip(y, -cfg.qkv_clip, cfg.qkv_clip) for y in (q, k, v))
    if cfg.qk_norm is True and cfg.rope_dim == cfg.head_dim and not cfg.rope.interleaved:
        q = norm_rotate(q, scale_of(w, "q_norm", cfg), cos_sin, cfg.norm_eps)
        k = norm_rotate(k, scale_of(w, "k_norm", cfg), cos_sin, cfg.norm_eps)
    else:
        if cfg.qk_norm is True:
            q = rms_norm(q, scale_of(w, "q_norm", cfg), cfg.norm_eps)
            k = rms_norm(k, scale_of(w, "k_norm", cfg), cfg.norm_eps)
        q, k = (rope.rotate(x, cos_sin, cfg.rope.interleaved) for x in (q, k))
    y = attend(scaled(q, cfg), k, v, *([w["sink_bias"]] if cfg.sinks else []))
    y = project("btnxy,dnxy->btd", y, w["o"], ("batch", None, None))
    return y + w["o_bias"].astype(y.dtype) if cfg.out_bias else y


def feed_forward(w: Params, x_btd: Activations, cfg: ModelConfig) -> jax.Array:
    """The layer's experts, with what all tokens share, or its mlp."""
    activation = ACTIVATIONS[cfg.activation]
    if "router" not in w:
        return mlp(w, x_btd, cfg)
    assert cfg.experts is not None and not isinstance(x_btd, float8.Rounded)
    y = moe.mixture(w, x_btd, cfg.experts, activation)
    if cfg.experts.shared_width:
        y = y + moe.shared(w, x_btd, gated(w, x_btd, "shared_", activation))
    return y


def mlp(w: Params, x_btd: Activations, cfg: ModelConfig) -> jax.Array:
    """Feed-forward network of one or two products, and one back."""
    return gated(w, x_btd, "", ACTIVATIONS[cfg.activation])


def gated(w: Params, x_btd: Activations, prefix: str, activation: Callable) -> jax.Array:
    """down(`activations`) of the matrices whose names begin with `prefix`."""
    gate, up, down = (w.get(prefix + name) for name in ("gate", "up", "down"))
    if activation is jax.nn.silu and f"{prefix}up_bias" not in w and float8.has_kernel(gate, up):
        y = float8.silu_gated(x_btd, gate, up)
    else:
        y = activations(w, x_btd, prefix, activation)
    y = project("btf,df->btd", y, down, ("batch", None, None))
    return _with_bias(w, y, f"{prefix}down")


def activations(w: Params, x_btd: Activations, prefix: str, activation: Callable) -> jax.Array:
    """activation(gate x) * up x, [B, T, F]; without a gate activation(up x)."""

    def wide(name: str) -> jax.Array:
        y = project("btd,fd->btf", x_btd, w[prefix + name], ("batch", None, "mlp"))
        return recompute.keep_large(_with_bias(w, y, prefix + name))

    has_gate = f"{prefix}gate" in w
    y = activation(wide("gate" if has_gate else "up"))
    return y * wide("up") if has_gate else y


def _with_bias(w: Params, y: jax.Array, name: str) -> jax.Array:
    bias = w.get(f"{name}_bias")
    return y if bias is None else y + bias.astype(y.dtype)
