"""Recovery of what comes after the cut (`distill.freeze`): ours, not the paper's.

Up to the first layer removed the student is the dense model. If that part stays as it is, with the
embeddings, one pass serves both models, and none of it has a gradient, master weights or moments.
The last layer before the cut is trained all the same: what it hands on is read where a removed
layer's output used to be.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params
from e3jax.models.head import Head


def frozen_layers(keep: Sequence[int], merges: Sequence[tuple[int, Sequence[int]]] = ()) -> int:
    """How many of the first layers stay: those that hand on to the same layer in both models, and
    into which no other is merged (Mask.merges). Where it is none the embeddings are trained too."""
    before = next((i for i, layer in enumerate(keep) if layer != i), len(keep))
    return min([max(0, before - 1), *(into for into, _ in merges)])


def trained(params: Params, cfg: ModelConfig, frozen: int) -> Params:
    """Of the student's parameters those that are trained, with so many frozen layers: a model of
    `trained_config` without embeddings; all of them where no layer is frozen."""
    if not frozen:
        return params
    return _without_embeddings(decoder.take_layers(params, cfg, range(frozen, cfg.num_layers)))


def abstract_trained(cfg: ModelConfig, frozen: int) -> Params:
    """ShapeDtypeStructs of `trained`, with their shardings."""
    params = decoder.abstract_params(trained_config(cfg, frozen))
    return _without_embeddings(params) if frozen else params


def _without_embeddings(params: Params) -> Params:
    return {name: w for name, w in params.items() if name != "embed"}


def trained_config(cfg: ModelConfig, frozen: int) -> ModelConfig:
    """Of the layers that are trained. cfg: of the student."""
    return cfg.take_layers(range(frozen, cfg.num_layers))


def whole(own: Params, dense: Params, cfg: ModelConfig, frozen: int) -> Params:
    """The student's float32 parameters, from those trained and the dense model's; cfg: the
    latter's."""
    if not frozen:
        return own
    below = decoder.take_layers(dense, cfg, range(frozen))
    joined = own | {"embed": jnp.array(dense["embed"], jnp.float32)}  # a copy: dense goes on
    for name in cfg.stacks:
        wide = jax.tree.map(lambda w: jnp.array(w, jnp.float32), below.get(name, {}))
        parts = [part for part in (wide, own.get(name)) if part]
        if parts:
            joined[name] = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    return joined


def dense_hidden(
    dense: Params, batch: Batch, cfg: ModelConfig, frozen: int, *, dtype: Any, observe: Any = None
) -> tuple[jax.Array | None, Any]:
    """(the residual stream that the student goes on from, None where no layer is frozen; the dense
    model's `decoder.hidden`, whose statistics are of the layers from there)."""
    if not frozen:
        return None, decoder.hidden(dense, batch, cfg, dtype=dtype, remat="none", observe=observe)
    stream = decoder.stream_after(dense, batch, cfg, frozen, dtype)
    ids = jnp.arange(frozen, cfg.num_layers)
    return stream, decoder.hidden(
        dense,
        batch,
        cfg,
        dtype=dtype,
        layer_ids=ids,
        stream=stream,
        remat="none",
        observe=observe,
    )


def head(own: Params, dense: Params | None, cfg: ModelConfig) -> tuple[Head, bool]:
    """The student's output head, and whether it stays as it is: that of frozen embeddings does."""
    if not cfg.tied or "embed" in own:
        return decoder.head(own, cfg), False
    assert dense is not None
    return decoder.head(dense, cfg), True
