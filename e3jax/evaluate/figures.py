"""Figures of a model against the dense one on token windows: sums over tokens, divided once."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e3jax import mesh
from e3jax.distill import losses
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params


@dataclasses.dataclass(frozen=True)
class Figures:
    """Averages over the tokens that carry loss."""

    perplexity: float
    kl: float  # KL(dense || model), nats a token
    agreement: float  # share of tokens where both models' most likely token is the same
    tokens: int


def make_figures(
    cfg: ModelConfig, student_cfg: ModelConfig, *, dtype: Any, chunk: int
) -> Callable[..., Figures]:
    """(dense params, student params, numpy batches, layer_ids=None) -> Figures.

    With `layer_ids` (ascending) the student is those layers of `student params`, uncopied.
    """

    @jax.jit
    def sums(dense: Params, student: Params, batch: Batch, layer_ids: jax.Array | None):
        h_dense = decoder.hidden(dense, batch, cfg, dtype=dtype, remat="none")
        h = decoder.hidden(
            student, batch, student_cfg, dtype=dtype, remat="none", layer_ids=layer_ids
        )
        sums = losses.token_sums(
            h,
            decoder.head(student, student_cfg),
            batch.targets,
            batch.mask,
            losses.Online(h_dense, decoder.head(dense, cfg)),
            losses.Objective(chunk=chunk),
        )
        return jax.tree.map(jnp.sum, sums)

    def figures(
        dense: Params,
        student: Params,
        batches: Iterable[Any],
        layer_ids: Sequence[int] | None = None,
    ) -> Figures:
        ids = None if layer_ids is None else np.asarray(layer_ids, np.int32)
        nll = kl = agree = tokens = 0.0
        for batch in batches:
            part = sums(dense, student, mesh.shard_batch(batch), ids)
            nll, kl = nll + float(part.nll), kl + float(part.kl)
            agree, tokens = agree + float(part.agree), tokens + float(part.tokens)
        count = max(tokens, 1.0)
        return Figures(
            perplexity=math.exp(min(nll / count, 700.0)),
            kl=kl / count,
            agreement=agree / count,
            tokens=int(tokens),
        )

    return figures
