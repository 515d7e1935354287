"""How the tokens are spread over a model's experts, before and after pruning."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e3jax import mesh
from e3jax.models import decoder, moe
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params


def make_loads(
    cfg: ModelConfig, *, dtype: Any
) -> Callable[[Params, Iterable[Batch]], dict[int, list[int]]]:
    """(params, numpy batches) -> for each layer with experts, by its number, the tokens that each
    expert is sent; padding apart."""

    @jax.jit
    def count(params: Params, batch: Batch) -> list[jax.Array]:
        apply = decoder.applier(batch, cfg, dtype)
        h, found = decoder.first_stream(params, batch.tokens, cfg, dtype), []
        for run in cfg.runs:
            sparse = cfg.is_sparse(run.first)

            def body(
                h: jax.Array, xs: tuple, sparse: bool = sparse
            ) -> tuple[jax.Array, jax.Array | None]:
                w, index = xs
                seen: list[jax.Array] = []
                h = apply(w, h, index, watch=seen.append)
                return h, _sent(w, seen[0], batch, cfg) if sparse else None

            ids = jnp.arange(cfg.num_layers)
            h, counts = jax.lax.scan(body, h, decoder.of_run((params, ids), run))
            if sparse:
                found.append(counts)
        return found

    def measure(params: Params, batches: Iterable[Batch]) -> dict[int, list[int]]:
        parts = [jax.device_get(count(params, mesh.shard_batch(batch))) for batch in batches]
        rows = np.sum([np.concatenate(part) for part in parts], axis=0, dtype=np.int64)
        layers = [i for i in range(cfg.num_layers) if cfg.is_sparse(i)]
        return dict(zip(layers, rows.tolist(), strict=True))

    return measure


def _sent(w: Params, x_btd: jax.Array, batch: Batch, cfg: ModelConfig) -> jax.Array:
    """Tokens that each expert of a layer is sent, int32 [E]. x: what the layer's router reads."""
    assert cfg.experts is not None
    real = batch.segments > 0
    if mesh.current() is not None:
        x_btd = jax.sharding.reshard(x_btd, mesh.spec((None, None, None)))
        real = jax.sharding.reshard(real, mesh.spec((None, None)))
    routes = moe.route(moe.routers_of(w), x_btd.reshape(-1, x_btd.shape[-1]), cfg.experts)
    to = routes.experts[..., None] == jnp.arange(cfg.experts.count)
    return jnp.sum(to & real.reshape(-1, 1, 1), axis=(0, 1), dtype=jnp.int32)


def summary(loads: Mapping[Any, list[int]]) -> dict[str, str]:
    """The busiest expert of a layer, in even shares: the mean and the greatest over layers; and how
    many of all experts are sent nothing."""
    rows = np.array(list(loads.values()), float)
    shares = rows / np.maximum(rows.mean(axis=1, keepdims=True), 1e-9)
    return {
        "busiest, mean": f"{shares.max(axis=1).mean():.2f}x",
        "greatest": f"{shares.max():.2f}x",
        "sent nothing": f"{int((rows == 0).sum())} of {rows.size}",
    }
