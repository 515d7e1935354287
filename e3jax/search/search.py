"""Stage 1: the differentiable search of a layer mask (E3-Pruner, arXiv 2511.17205).

theta [L] scores the layers; each step draws exact Gumbel-TopK masks for each window of the batch,
runs the masked models against the dense one, and moves theta by a gradient estimator. Weights are
frozen and never differentiated. The current answer is scored on held-out windows and the best one
is kept.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from e3jax import config, mesh
from e3jax.distill import losses
from e3jax.errors import UserError
from e3jax.models import decoder, recompute
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Batch, Params
from e3jax.search import gumbel, prefix
from e3jax.training import optim


@flax.struct.dataclass
class SearchState:
    """Everything the search carries from step to step; all of it is checkpointed."""

    step: jax.Array  # int32
    seed: jax.Array  # uint32, of the masks drawn: no constant of the step, so seeds share a program
    theta: jax.Array  # float32 [L], the layer-mask parameter vector
    opt_state: Any
    gate_scale: jax.Array  # float32 [L], running root mean square of the straight-through gradient
    best_theta: jax.Array  # float32 [L], whose answer had the least held-out KL
    best_kl: jax.Array  # float32, that KL in nats a token
    tokens: jax.Array  # float32, processed by masked models so far
    drawn: jax.Array  # bool [steps, W * M, L], the masks of each step
    log_loss: jax.Array  # float32 [steps, W * M], of each, nats a token; NaN before they are drawn


def resolve_keep(keep: int | float | None, num_layers: int, key: str = "search.keep") -> int:
    """A count, or a share below 1, -> layers kept. Raises UserError unless 1 <= K < L."""
    keep = config.KEEP if keep is None else keep
    count = round(keep * num_layers) if keep < 1 else keep
    if int(count) != count or not 1 <= count < num_layers:
        raise UserError(
            f"{key}={keep}: the model has {num_layers} layers; expected a count from 1 to "
            f"{num_layers - 1}, or a share between 0 and 1"
        )
    return int(count)


def fixed_layers(spec: config.Search, num_layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Protected and forced layers as bool [L] each. Raises UserError when they cannot be met."""
    keep = resolve_keep(spec.keep, num_layers)
    masks = []
    for name, layers in (("protect", spec.protect), ("force", spec.force)):
        ids = [i + num_layers if i < 0 else i for i in layers]
        if wrong := [i for i, n in zip(layers, ids, strict=True) if not 0 <= n < num_layers]:
            raise UserError(f"search.{name}: no layer {wrong}; the model has 0 to {num_layers - 1}")
        masks.append(np.isin(np.arange(num_layers), ids))
    protect, force = masks
    if both := np.flatnonzero(protect & force).tolist():
        raise UserError(f"search.protect and search.force both name layers {both}")
    if protect.sum() > keep:
        raise UserError(
            f"search.protect names {protect.sum()} layers and search.keep={keep}: protect fewer or "
            "keep more"
        )
    if force.sum() > num_layers - keep:
        raise UserError(
            f"search.force names {force.sum()} layers and only {num_layers - keep} are removed"
        )
    return protect, force


def make_theta_optimizer(spec: config.Search) -> optax.GradientTransformation:
    """Adam on theta, float32, constant rate."""
    return optax.adam(spec.lr, b1=0.9, b2=0.99, eps=1e-8)


def init_state(theta_l: jax.Array, spec: config.Search, seed: int) -> SearchState:
    """The state before the first step."""
    theta = jnp.array(theta_l, jnp.float32)  # a copy: the step takes the state's memory
    rows = (spec.steps, spec.batch * spec.masks_per_window)
    return SearchState(
        step=jnp.int32(0),
        seed=jnp.uint32(seed),
        theta=theta,
        opt_state=make_theta_optimizer(spec).init(theta),
        gate_scale=jnp.zeros_like(theta),
        best_theta=jnp.array(theta),
        best_kl=jnp.float32(jnp.inf),
        tokens=jnp.float32(0),
        drawn=jnp.zeros((*rows, len(theta)), bool),
        log_loss=jnp.full(rows, jnp.nan, jnp.float32),
    )


def abstract_state(cfg: ModelConfig, spec: config.Search) -> SearchState:
    """ShapeDtypeStructs of `init_state`, whole on every device of the mesh that is set."""
    theta = jax.ShapeDtypeStruct((cfg.num_layers,), jnp.float32)
    return mesh.abstract(jax.eval_shape(lambda theta: init_state(theta, spec, 0), theta))


def make_search_step(
    cfg: ModelConfig,
    spec: config.Search,
    *,
    dtype: Any,
    remat: str,
    chunk: int,
    above: int | None = None,
) -> Callable[[SearchState, Params, Batch], tuple[SearchState, dict[str, jax.Array]]]:
    """A jitted (state, params, batch) -> (state, metrics) of one search step.

    above: from which K falls, all layers if None.
    Metrics are float32 scalars: loss (nats a token of the masked models), kept (layers), tau,
    grad_norm, tokens (processed by masked models), skipped (1: not finite, nothing moved).
    """
    keep = resolve_keep(spec.keep, cfg.num_layers)
    above = max(above or cfg.num_layers, keep)
    protect, force = fixed_layers(spec, cfg.num_layers)
    optimizer = make_theta_optimizer(spec)
    objective = losses.Objective(chunk=chunk)
    masks = spec.masks_per_window

    def sums_fn(params: Params, windows: Batch, gates_wml: jax.Array) -> tuple[jax.Array, Any]:
        """Loss and sums of the masked models [W * M]; the dense one runs once for a window."""
        h, dense = prefix.hidden_states(
            params, windows, cfg, gates_wml, dtype=dtype, remat=remat, dense=spec.loss == "kl"
        )
        head = decoder.head(params, cfg)
        teacher = None if dense is None else losses.Online(dense, head)
        batch = jax.tree.map(lambda x: mesh.repeat_rows(x, masks), windows)
        return losses.token_sums(
            h, head, batch.targets, batch.mask, teacher, objective, frozen_head=True
        )

    def run(params: Params, micro: tuple[Batch, jax.Array]) -> tuple[jax.Array, Any]:
        """The loss's gradient in the gates [W, M, L], and the sums of each row [W, M]."""
        windows, gates = micro
        loss_fn = functools.partial(sums_fn, params, windows)
        if spec.estimator == "score":
            slope, (_, sums) = jnp.zeros_like(gates), loss_fn(gates)
        else:
            slope, sums = jax.grad(loss_fn, has_aux=True)(gates)
        place = mesh.out(("batch", None))
        return slope, jax.tree.map(lambda x: x.reshape(-1, masks, out_sharding=place), sums)

    def advantages(sums: losses.Sums) -> jax.Array:
        """Of each row, [W * M]. The masks of one window are compared with each other, for windows
        differ more than masks do; where each has one, all are."""
        flat = functools.partial(jnp.ravel, out_sharding=mesh.out(("batch",)))
        rows = (sums.loss, sums.weight) if masks > 1 else map(flat, (sums.loss, sums.weight))
        return flat(gumbel.advantage(*rows))

    def step(state: SearchState, params: Params, batch: Batch):
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)
        k = gumbel.curriculum(state.step, spec.steps, spec.curriculum, above, keep)
        tau = gumbel.temperature(state.step, spec.steps, spec.tau)
        count = batch.tokens.shape[0]

        def draw_gates(theta: jax.Array) -> tuple[jax.Array, gumbel.Draw]:
            draws = 1 if spec.masks == "batch" else count * masks
            draw = gumbel.sample(key, theta, k, draws, protect, force)
            if spec.estimator == "score":
                gates = draw.keep.astype(jnp.float32)
            else:
                gates = gumbel.straight_through(draw, tau, spec.relaxation)
            gates = jnp.broadcast_to(gates, (count * masks, cfg.num_layers))
            gates = gates.reshape(count, masks, cfg.num_layers)
            if mesh.current() is not None:
                gates = jax.sharding.reshard(gates, mesh.spec(("batch", None, None)))
            return gates, draw

        gates, pull, draw = jax.vjp(draw_gates, state.theta, has_aux=True)
        parts = count // spec.together
        if parts == 1:
            slope, sums = run(params, (batch, gates))
        else:
            micros = optim.split_microbatches((batch, gates), parts)
            found = jax.lax.map(functools.partial(run, params), micros)
            slope, sums = optim.join_microbatches(found)
        weight = jnp.maximum(jnp.sum(sums.weight), 1.0)
        through, gate_scale = jnp.zeros_like(state.theta), state.gate_scale
        if spec.estimator != "score":
            (through,) = pull(slope / weight)
            through, gate_scale = _normalise(through, gate_scale, state.step)
        grad = through
        if spec.estimator != "straight_through":
            grad = gumbel.score_gradient(state.theta, draw, advantages(sums))
        if spec.estimator == "mixed":
            grad = grad + through * _norm(grad) / jnp.maximum(_norm(through), 1e-12)
        log_loss = jnp.log(mesh.place(sums.loss / sums.weight, (None, None)).ravel())
        theta, opt_state, norm, finite = optim.update(optimizer, grad, state.opt_state, state.theta)
        gate_scale = jnp.where(finite, gate_scale, state.gate_scale)
        tokens = masks * jnp.sum(batch.segments > 0).astype(jnp.float32)
        metrics = {
            "loss": jnp.sum(sums.loss) / weight,
            "kept": k.astype(jnp.float32),
            "tau": tau,
            "grad_norm": norm,
            "tokens": tokens,
            "skipped": 1.0 - finite,
        }
        state = state.replace(
            step=state.step + 1,
            theta=theta,
            opt_state=opt_state,
            gate_scale=gate_scale,
            tokens=state.tokens + tokens,
            drawn=state.drawn.at[state.step].set(draw.keep),
            log_loss=state.log_loss.at[state.step].set(log_loss),
        )
        return state, metrics

    return jax.jit(step, donate_argnums=0, compiler_options=recompute.compiler_options())


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x))


def _normalise(
    grad_l: jax.Array, scale_l: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Divides each layer's gate gradient by its running root mean square (decay 0.9).

    At a kept layer the gate's derivative is about scaling the layer a little, not removing it, and
    grows with the layer's update: unscaled, the first layers drown all others.
    """
    mean_square = 0.9 * scale_l**2 + 0.1 * grad_l**2
    corrected = jnp.sqrt(mean_square / (1 - 0.9 ** (step + 1.0)))
    return grad_l / jnp.maximum(corrected, 1e-12), jnp.sqrt(mean_square)
