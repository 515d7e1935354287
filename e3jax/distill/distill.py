"""Stage 2: entropy-aware distillation of the pruned model, and plain training by the same step.

The student is the surviving layers, embeddings, last norm and head, all trained, or what comes
after the cut (freezing.py): float32 master weights and moments, compute in `dtype`. The teacher
is the dense model (online), its stored top-k (cache), or nobody (next-token cross-entropy).
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from e3jax import config, mesh
from e3jax.distill import freezing, losses
from e3jax.models import decoder, float8, recompute
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params
from e3jax.training import optim


@flax.struct.dataclass
class TrainState:
    """Everything training carries from step to step; all of it is checkpointed."""

    step: jax.Array  # int32, batches seen
    params: Params  # float32
    opt_state: Any
    mean_entropy: jax.Array  # float32, H of the weights w = H_t / H: nats a token, a constant
    skipped: jax.Array  # int32, steps left out because they were not finite


def init_state(
    params: Params, optimizer: optax.GradientTransformation, mean_entropy: float
) -> TrainState:
    """The state before the first step; the moments are born with the parameters' shardings."""
    # A copy even of float32: the step donates it, and the dense model shares the embedding.
    params = jax.tree.map(lambda w: jnp.array(w, jnp.float32), params)
    return TrainState(
        step=mesh.replicate(jnp.int32(0)),
        params=params,
        opt_state=jax.jit(optimizer.init)(params),
        mean_entropy=mesh.replicate(jnp.float32(mean_entropy)),
        skipped=mesh.replicate(jnp.int32(0)),
    )


def abstract_state(
    cfg: ModelConfig, optimizer: optax.GradientTransformation, frozen: int = 0
) -> TrainState:
    """ShapeDtypeStructs of `init_state`, with their shardings: nothing is allocated."""
    params = freezing.abstract_trained(cfg, frozen)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(
        step=count,
        params=params,
        opt_state=jax.eval_shape(optimizer.init, params),
        mean_entropy=scalar,
        skipped=count,
    )
    return mesh.abstract(state)


def make_train_step(
    cfg: ModelConfig,
    recipe: config.Distill,
    optimizer: optax.GradientTransformation,
    *,
    teacher_cfg: ModelConfig | None,
    keep: Sequence[int] | None = None,
    frozen: int = 0,
    gates: Callable[[jax.Array, int], jax.Array] | None = None,
    dtype: Any,
    remat: str,
) -> Callable[[TrainState, Params | None, Batch, losses.TopK | None], tuple[TrainState, dict]]:
    """A jitted (state, teacher params, batch, stored teacher) -> (state, metrics) of one step.

    cfg: the student's. The teacher's parameters are for `teacher: online`, the stored rows for
    `cache`; both are None for `none`. keep: the teacher's layers that the student has, for
    `recipe.hidden`. frozen: the first so many of them stay as they are, with the embeddings, and
    the state has the other parameters alone (freezing.py); the teacher must be online. gates: (the
    step's number, rows) -> float32 [B, L], the layers that each row has of a student of all the
    teacher's, in place of `keep`; all if None.
    Metrics are float32 scalars, averages over tokens.
    """
    objective = losses.Objective.of(recipe)
    count = recipe.batch // recipe.together

    def step(state: TrainState, teacher: Params | None, batch: Batch, stored: losses.TopK | None):
        gates_bl = None if gates is None else gates(state.step, batch.tokens.shape[0])

        def sums_fn(
            params: Params, micro: tuple[Batch, losses.TopK | None, jax.Array | None]
        ) -> Any:
            rows, known, gates_bl = micro
            observe = beside = stream = None
            if recipe.teacher == "online":
                assert teacher is not None and teacher_cfg is not None
                dense = float8.marked(teacher, teacher_cfg) if recipe.float8 else teacher
                see = (lambda _, after: after) if recipe.hidden else None
                stream, h = freezing.dense_hidden(
                    dense, rows, teacher_cfg, frozen, dtype=dtype, observe=see
                )
                if recipe.hidden:
                    h, streams = h
                    if gates_bl is None:
                        assert keep is not None
                        beside = streams[ends(keep, teacher_cfg.num_layers)[frozen:] - frozen]
                    else:
                        aims_lb = ends_of_rows(gates_bl).T[:, :, None, None]
                        beside = jnp.take_along_axis(streams, aims_lb, axis=0)
                    beside = jax.lax.stop_gradient(beside)
                    observe = functools.partial(apart, mask=rows.mask)
                known = losses.Online(jax.lax.stop_gradient(h), decoder.head(teacher, teacher_cfg))
            h = decoder.hidden(
                params,
                rows,
                freezing.trained_config(cfg, frozen),
                dtype=dtype,
                gates_bl=gates_bl,
                stream=stream,
                remat=remat,
                observe=observe,
                beside=beside,
            )
            h, gaps = h if observe else (h, jnp.zeros((1, 1)))
            head, frozen_head = freezing.head(params, teacher, cfg)
            loss, sums = losses.token_sums(
                h,
                head,
                rows.targets,
                rows.mask,
                known,
                objective,
                state.mean_entropy,
                frozen_head=frozen_head,
            )
            if observe and gates_bl is not None:
                gap = jnp.sum(gaps * gates_bl.T / jnp.sum(gates_bl, axis=1))
            else:
                gap = jnp.sum(gaps) / cfg.num_layers  # frozen ones are at no distance
            return loss + recipe.hidden * gap, _StepSums(sums, gap)

        grads, found = optim.accumulate(sums_fn, state.params, (batch, stored, gates_bl), count)
        sums = found.tokens
        params, opt_state, norm, finite = optim.update(
            optimizer, grads, state.opt_state, state.params
        )
        tokens = jnp.maximum(sums.tokens, 1.0)
        metrics = {
            "loss": sums.loss / jnp.maximum(sums.weight, 1e-9),
            "nll": sums.nll / tokens,
            "kl": sums.kl / tokens,
            "agreement": sums.agree / tokens,
            "weight": sums.weight / tokens,
            "captured": sums.captured / tokens,
            "grad_norm": norm,
            "tokens": jnp.sum(batch.segments > 0).astype(jnp.float32),
            "skipped": 1.0 - finite,
        }
        if recipe.hidden:
            metrics["hidden"] = found.gap / tokens
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            skipped=state.skipped + (1 - finite.astype(jnp.int32)),
        )
        return state, metrics

    return jax.jit(step, donate_argnums=0, compiler_options=recompute.compiler_options())


@flax.struct.dataclass
class _StepSums:
    """What a micro-batch's tokens add up to."""

    tokens: losses.Sums
    gap: jax.Array  # `apart`, averaged over the layers

    @property
    def weight(self) -> jax.Array:
        """What both are divided by."""
        return self.tokens.weight


def ends(keep: Sequence[int], num_layers: int) -> np.ndarray:
    """For each layer kept the last of the dense model before the next one kept, int64 [K]: the next
    one is used to read what comes out of it."""
    return np.array([*(layer - 1 for layer in keep[1:]), num_layers - 1])


def ends_of_rows(gates_bl: jax.Array) -> jax.Array:
    """The same of each row's layers, int32 [B, L], for the student that has all of the dense
    model's. gates: float32 [B, L], above 0 for those that a row has."""
    num_layers = gates_bl.shape[1]
    numbers = jnp.where(gates_bl > 0, jnp.arange(num_layers), num_layers)
    next_one = jax.lax.cummin(numbers, axis=1, reverse=True)[:, 1:]
    return jnp.pad(next_one, ((0, 0), (0, 1)), constant_values=num_layers) - 1


def apart(before: jax.Array, after: jax.Array, dense: jax.Array, mask: jax.Array) -> jax.Array:
    """Squared distance of a layer's residual stream to the dense model's, both [B, T, D], relative
    to the latter's square: float32 [B], sums over the tokens that carry loss. Ours."""
    wide, aim = after.astype(jnp.float32), dense.astype(jnp.float32)
    far = jnp.sum((wide - aim) ** 2, axis=-1) / jnp.maximum(jnp.sum(aim**2, axis=-1), 1e-12)
    return jnp.sum(jnp.where(mask, far, 0.0), axis=1)


def mean_teacher_entropy(
    params: Params,
    cfg: ModelConfig,
    batches: Iterable[Batch],
    *,
    temperature: float,
    dtype: Any,
    chunk: int,
) -> float:
    """The teacher's entropy in nats, averaged over the loss tokens of batches: H of the weights.

    Measured once, before the first step, so that it is a constant of the data.
    """
    objective = losses.Objective(temperature=temperature, chunk=chunk)

    @jax.jit
    def measure(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        h = decoder.hidden(params, batch, cfg, dtype=dtype, remat="none")
        head = decoder.head(params, cfg)
        known = losses.Online(h, head)
        _, sums = losses.token_sums(h, head, batch.targets, batch.mask, known, objective)
        return jnp.sum(sums.entropy), jnp.sum(sums.tokens)

    total, tokens = 0.0, 0.0
    for batch in batches:
        entropy, count = measure(params, mesh.shard_batch(batch))
        total, tokens = total + float(entropy), tokens + float(count)
    return total / max(tokens, 1.0)
