"""Layer importance by published rules, and the selectors that remove the least important layers.

Averages run over real (not padding) tokens, in float32, sums and counts divided once.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e3jax import mesh
from e3jax.distill import losses
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params
from e3jax.progress import over


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which layers a selector keeps, what it scored them by, and what that cost."""

    selector: str
    keep: tuple[int, ...]  # ascending
    order: tuple[int, ...]  # removed layers, first removed first
    scores: tuple[float, ...]  # per layer; the lowest go first
    tokens: int  # processed by masked models (METHOD: how tokens are counted)


def least_important(
    selector: str,
    scores: np.ndarray,
    keep: int,
    tokens: int,
    protect: Iterable[int] = (),
    force: Iterable[int] = (),
) -> Selection:
    """One shot: the layers of least score go, forced ones first, protected ones never.

    protect, force: layer numbers, negative ones from the end, as `search.fixed_layers` allows them.
    """
    layers = len(scores)
    protected, forced = ({i % layers for i in ids} for ids in (protect, force))
    ranked = [i for i in np.argsort(scores, kind="stable").tolist() if i not in protected]
    order = sorted(ranked, key=lambda i: i not in forced)[: layers - keep]
    kept = tuple(i for i in range(layers) if i not in order)
    return Selection(selector, kept, tuple(order), tuple(map(float, scores)), tokens)


def leave_one_out_kl(
    params: Params, cfg: ModelConfig, batches: Iterable[Any], *, dtype: Any, chunk: int
) -> tuple[np.ndarray, int]:
    """KL(dense || without layer l), nats a token, float64 [L]: E3-Pruner's start (EvoPress's `kl`).

    `batches` are numpy Batch rows. Returns the scores and the tokens processed: L times the data.
    """
    layers = cfg.num_layers
    objective = losses.Objective(chunk=chunk)
    others = np.array([[i for i in range(layers) if i != out] for out in range(layers)], np.int32)

    @jax.jit
    def score(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        w = decoder.head(params, cfg)
        dense = decoder.hidden(params, batch, cfg, dtype=dtype, remat="none")

        def without(layer_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = decoder.hidden(params, batch, cfg, dtype=dtype, layer_ids=layer_ids, remat="none")
            _, sums = losses.token_sums(
                h, w, batch.targets, batch.mask, losses.Online(dense, w), objective
            )
            return jnp.sum(sums.kl), jnp.sum(sums.tokens)

        kl_l, count_l = jax.lax.map(without, others)
        return kl_l, count_l[0], jnp.sum(batch.segments > 0)

    total, count, tokens = np.zeros(layers), 0.0, 0
    for batch in over("batches measured", batches):
        kl_l, n, seen = score(params, mesh.shard_batch(batch))
        total, count, tokens = (
            total + np.asarray(kl_l, np.float64),
            count + float(n),
            tokens + int(seen),
        )
    return total / max(count, 1.0), tokens * layers


def block_influence(
    params: Params, cfg: ModelConfig, batches: Iterable[Any], *, dtype: Any
) -> tuple[np.ndarray, int]:
    """ShortGPT (arXiv 2403.03853): BI_l = 1 - E[cos(h_l, h_{l+1})], float64 [L], no final norm.

    Returns the scores and the tokens processed: one dense pass, so the data once.
    """

    @jax.jit
    def score(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        real = batch.segments > 0

        def cosine_sum(h_in: jax.Array, h_out: jax.Array) -> jax.Array:
            x, y = h_in.astype(jnp.float32), h_out.astype(jnp.float32)
            dot, xx, yy = jnp.sum(x * y, -1), jnp.sum(x * x, -1), jnp.sum(y * y, -1)
            return jnp.sum(jnp.where(real, dot * jax.lax.rsqrt(xx * yy + 1e-20), 0.0))

        _, cosine_l = decoder.hidden(
            params, batch, cfg, dtype=dtype, remat="none", observe=cosine_sum
        )
        return cosine_l, jnp.sum(real)

    total, tokens = np.zeros(cfg.num_layers), 0
    for batch in batches:
        cosine_l, n = score(params, mesh.shard_batch(batch))
        total, tokens = total + np.asarray(cosine_l, np.float64), tokens + int(n)
    return 1.0 - total / max(tokens, 1), tokens
