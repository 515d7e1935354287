"""Multi-head latent attention: DeepSeek-V2 (arXiv 2405.04434), section 2.1.

A token's keys and values, of all heads, are made from one vector of C numbers and one rotated key
that the heads share. Training and scoring make them, and attend as usual. Decoding never does: a
key's product with a query is that of the vector with the query taken through the key's matrix, so
the vectors themselves are the one key-value head of all query heads (`absorbed`), and the cache
holds C + R numbers a token instead of 2 N H.
"""

import jax
import jax.numpy as jnp

from e3jax import mesh
from e3jax.models import recompute, rope
from e3jax.models.attention import Attend, scaled
from e3jax.models.config import ModelConfig
from e3jax.models.norm import rms_norm
from e3jax.models.params import Params
from e3jax.models.product import project

HEADS = ("batch", None, "heads", None)


def attention(
    w: Params,
    x_btd: jax.Array,
    cos_sin: tuple[jax.Array, jax.Array],
    attend: Attend,
    cfg: ModelConfig,
    *,
    absorbed: bool,
) -> jax.Array:
    """Self-attention of [B, T, D]. `attend` is given q [B, T, N, 1, H], k [B, T, N, H] and values
    of their own width; absorbed: q [B, T, 1, N, C + R], k [B, T, 1, C + R], values [B, T, 1, C].
    """
    latent = cfg.latent
    assert latent is not None
    q = _queries(w, x_btd, cfg)
    kv = project("btd,cd->btc", x_btd, w["kv_down"], ("batch", None, None))
    kv = recompute.keep(kv)
    c = rms_norm(kv[..., : latent.kv_rank], w["kv_down_norm"], latent.norm_eps)
    k_turned = kv[..., None, latent.kv_rank :]  # [B, T, 1, R]
    q, q_turned = jnp.split(q, [latent.nope_dim], axis=-1)
    q_turned, k_turned = (
        rope.rotate(x, cos_sin, cfg.rope.interleaved) for x in (q_turned, k_turned)
    )
    if absorbed:
        of_keys, of_values = jnp.split(w["kv_up"], [latent.nope_dim], axis=1)
        q = project("btnh,nhc->btnc", q, of_keys, HEADS)
        q = jnp.concatenate([q, q_turned], axis=-1)[:, :, None]
        k = jnp.concatenate([c[:, :, None], k_turned], axis=-1)
        y = attend(scaled(q, cfg), k, c[:, :, None])[:, :, 0]
        y = project("btnc,nvc->btnv", y, of_values, HEADS)
    else:
        both = project("btc,nxc->btnx", c, w["kv_up"], HEADS)
        k, v = jnp.split(recompute.keep_large(both), [latent.nope_dim], axis=-1)
        place = mesh.out(HEADS, (*k.shape[:3], latent.rope_dim))
        k_turned = jnp.broadcast_to(k_turned, (*k.shape[:3], latent.rope_dim), out_sharding=place)
        k = jnp.concatenate([k, k_turned], axis=-1)
        q = jnp.concatenate([q, q_turned], axis=-1)[:, :, :, None]
        y = attend(scaled(q, cfg), k, v)[:, :, :, 0]
    return project("btnv,dnv->btd", y, w["o"], ("batch", None, None))


def _queries(w: Params, x_btd: jax.Array, cfg: ModelConfig) -> jax.Array:
    """[B, T, N, H]."""
    latent = cfg.latent
    assert latent is not None
    if latent.q_rank is None:
        return recompute.keep(project("btd,nhd->btnh", x_btd, w["q"], HEADS))
    q = project("btd,cd->btc", x_btd, w["q_down"], ("batch", None, None))
    q = rms_norm(recompute.keep(q), w["q_down_norm"], latent.norm_eps)
    return recompute.keep(project("btc,nhc->btnh", q, w["q_up"], HEADS))
