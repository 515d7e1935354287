"""Figures of a model against the dense one on token windows: sums over tokens, divided once."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e3jax import mesh, notice, processes
from e3jax.distill import freezing, losses
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params
from e3jax.progress import over


@dataclasses.dataclass(frozen=True)
class Figures:
    """Averages over the tokens that carry loss."""

    perplexity: float
    kl: float  # KL(dense || model), nats a token; without a teacher KL from the data
    agreement: float  # share of tokens where both models' most likely token is the same
    tokens: int
    windows: tuple[tuple[float, float], ...] = ()  # KL and tokens of each, sums


def make_figures(
    cfg: ModelConfig,
    student_cfg: ModelConfig,
    *,
    dtype: Any,
    chunk: int,
    temperature: float = 1.0,
    frozen: int = 0,
) -> Callable[..., Figures]:
    """(dense params, student params, numpy batches, keep=None, each_window=False) -> Figures.

    With `keep` the student is those layers of its parameters, chosen by gates: one compilation
    serves every mask, and equals the sliced model exactly.
    Instead of the dense parameters each batch may come with the TopK that they gave: the KL is then
    of its k + 1 outcomes at `temperature`, never above that of the full vocabulary.
    frozen: the student's first so many layers, and its embeddings, are the dense model's, and not
    among its parameters (distill/freezing.py).
    """
    own_cfg = freezing.trained_config(student_cfg, frozen)

    @jax.jit
    def sums(
        dense: Params | None,
        student: Params,
        batch: Batch,
        stored: losses.TopK | None,
        gates_l: jax.Array,
    ) -> tuple[losses.Sums, tuple[jax.Array, jax.Array]]:
        known: losses.Online | losses.TopK | None = stored
        stream = None
        if dense is not None:
            stream, h_dense = freezing.dense_hidden(dense, batch, cfg, frozen, dtype=dtype)
            known = losses.Online(h_dense, decoder.head(dense, cfg))
        gates = jnp.broadcast_to(gates_l, (batch.tokens.shape[0], gates_l.shape[0]))
        h = decoder.hidden(
            student, batch, own_cfg, dtype=dtype, remat="none", gates_bl=gates, stream=stream
        )
        _, sums = losses.token_sums(
            h,
            freezing.head(student, dense, own_cfg)[0],
            batch.targets,
            batch.mask,
            known,
            losses.Objective(chunk=chunk, temperature=temperature),
        )
        return jax.tree.map(jnp.sum, sums), (sums.kl, sums.tokens)

    def figures(
        dense: Params | None,
        student: Params,
        batches: Iterable[Batch | tuple[Batch, losses.TopK | None]],
        keep: Sequence[int] | None = None,
        *,
        each_window: bool = False,
    ) -> Figures:
        gates = np.ones(own_cfg.num_layers, np.float32)
        if keep is not None:
            gates[np.setdiff1d(np.arange(len(gates)), keep)] = 0.0
        nll = kl = agree = tokens = 0.0
        windows: list[tuple[float, float]] = []
        for batch in over("batches measured", notice.interruptible(batches)):
            rows_and_stored = batch if isinstance(batch, tuple) else (batch, None)
            part, rows = sums(dense, student, *mesh.shard_batch(rows_and_stored), gates)
            if each_window:
                windows += zip(*(processes.whole(x).tolist() for x in rows), strict=True)
            nll, kl = nll + float(part.nll), kl + float(part.kl)
            agree, tokens = agree + float(part.agree), tokens + float(part.tokens)
        count = max(tokens, 1.0)
        return Figures(
            perplexity=math.exp(min(nll / count, 700.0)),
            kl=kl / count,
            agreement=agree / count,
            tokens=int(tokens),
            windows=tuple(windows),
        )

    return figures
