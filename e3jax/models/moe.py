"""Mixtures of experts: which experts a token is sent to, and the sum of what they answer.

No token is dropped and none waits: the tokens of each expert lie together, and one grouped product
multiplies each by its expert's matrix. A device has some of the experts (`model` axis) and all
tokens of its rows: it answers for its own experts, and the answers are added up over the axis, as
those of a split mlp are.

Sources: Shazeer et al. (arXiv 1701.06538); DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437) for
groups of experts, the experts that all tokens share, and the bias that balances the load.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from e3jax import mesh
from e3jax.models import recompute
from e3jax.models.config import Experts
from e3jax.models.grouped import Groups, block_of, lay
from e3jax.models.params import Params, expert_axes
from e3jax.models.product import project


class Routes(NamedTuple):
    """Where S tokens are sent, and what weighs each answer."""

    experts: jax.Array  # int32 [S, k]
    weights: jax.Array  # float32 [S, k]


def route(w: Params, x_sd: jax.Array, experts: Experts) -> Routes:
    """The experts of each token, in float32: in bfloat16 near ones would change places."""
    outcomes = jnp.einsum(
        "sd,ed->se",
        x_sd.astype(jnp.float32),
        w["router"].astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    if "router_bias" in w:
        outcomes = outcomes + w["router_bias"].astype(jnp.float32)
    if experts.scores == "softmax":
        scores = jax.nn.softmax(outcomes, axis=-1)
    else:
        scores = jax.nn.sigmoid(outcomes) if experts.scores == "sigmoid" else outcomes
    wanted = jax.lax.stop_gradient(scores)
    if "router_choice_bias" in w:
        wanted = wanted + jax.lax.stop_gradient(w["router_choice_bias"].astype(jnp.float32))
    if experts.groups > 1:
        wanted = jnp.where(_in_best_groups(wanted, experts), wanted, -jnp.inf)
    _, chosen = jax.lax.top_k(wanted, experts.per_token)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.scores == "softmax of chosen":
        weights = jax.nn.softmax(weights, axis=-1)
    elif experts.normalised:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return Routes(chosen, weights * experts.scale)


def _in_best_groups(wanted_se: jax.Array, experts: Experts) -> jax.Array:
    """Bool [S, E]: the experts of the groups that a token may be sent to."""
    of_group = wanted_se.reshape(len(wanted_se), experts.groups, -1)
    count = 1 if experts.group_score == "greatest" else 2
    value = jnp.sum(jax.lax.top_k(of_group, count)[0], axis=-1)
    _, best = jax.lax.top_k(value, experts.groups_taken)
    taken = jnp.any(best[..., None] == jnp.arange(experts.groups), axis=1)
    return jnp.repeat(taken, experts.count // experts.groups, axis=-1)


def mixture(
    w: Params, x_btd: jax.Array, experts: Experts, activation: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """The experts' answers to [B, T, D], weighed and added up, in x's dtype."""
    axes = expert_axes(experts)
    own = {name: w[name].astype(x_btd.dtype) for name in axes}
    routers = routers_of(w)
    if mesh.current() is None:
        return _answers(routers, own, x_btd, 0, experts, activation)
    own = {name: mesh.gather(own[name], axes[name]) for name in axes}
    rows = mesh.spec(("batch", None, None))
    split = mesh.spec(("experts",), (experts.count,))[0]

    def here(routers: Params, own: Params, x: jax.Array) -> jax.Array:
        count = len(next(iter(own.values())))
        first = 0 if split is None else jax.lax.axis_index(split) * count
        y = _answers(routers, own, x, first, experts, activation)
        return y if split is None else jax.lax.psum(y, split)

    in_specs = (
        {name: mesh.spec((None,) * x.ndim) for name, x in routers.items()},
        {name: mesh.spec(_whole(axes[name]), x.shape) for name, x in own.items()},
        rows,
    )
    run = jax.shard_map(here, in_specs=in_specs, out_specs=rows, check_vma=False)
    return run(routers, own, x_btd)


def routers_of(w: Params) -> Params:
    """What chooses a layer's experts, whole on every device."""
    found = {name: x for name, x in w.items() if name.startswith("router")}
    return {name: mesh.gather(x, (None, "embed")[: x.ndim]) for name, x in found.items()}


def _whole(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """Of what is gathered: only experts are split."""
    return tuple(a if a == "experts" else None for a in axes)


def _answers(
    routers: Params,
    own: Params,
    x_btd: jax.Array,
    first: jax.Array | int,
    experts: Experts,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Of the experts from `first` on, whose parameters are `own`, to the tokens of a device."""
    x = x_btd.reshape(-1, x_btd.shape[-1])
    routes = route(routers, x, experts)
    count = len(next(iter(own.values())))
    place = routes.experts - first  # all those elsewhere are one more, whose answers are zero
    place = jnp.where((place >= 0) & (place < count), place, count).reshape(-1)
    groups = lay(place, count, block_of(own, x.dtype))
    # Each token k times, then in order: both are permutations backward, where a gather with
    # repetitions would add up in whatever order.
    sent = groups.send(jnp.repeat(x, experts.per_token, axis=0))
    if experts.joined:
        y = _joined(own, sent, groups, experts.limit)
    else:
        y = _gated(own, sent, groups, activation)
    y = groups.bring(y).reshape(len(x), experts.per_token, -1)
    y = jnp.sum(y.astype(jnp.float32) * routes.weights[..., None], axis=1)
    return y.astype(x.dtype).reshape(x_btd.shape)


def _gated(
    own: Params, x: jax.Array, groups: Groups, activation: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """down(activation(gate x) * up x) of rows that lie expert by expert; matrices are [out, in]."""
    gate, up = (
        recompute.keep_large(groups.product(x, own[f"expert_{name}"], axis=2))
        for name in ("gate", "up")
    )
    return groups.product(activation(gate) * up, own["expert_down"], axis=2)


def _joined(own: Params, x: jax.Array, groups: Groups, limit: float | None) -> jax.Array:
    """The same by matrices [in, out], gate and up in one, with biases, as gpt-oss has it."""
    count, width, _, _ = own["expert_in"].shape
    of = groups.of_rows()
    both = groups.product(x, own["expert_in"].reshape(count, width, -1), axis=1)
    both = recompute.keep_large(both.reshape(len(x), -1, 2) + own["expert_in_bias"][of])
    gate, up = both[..., 0], both[..., 1]
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    y = (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)
    return groups.product(y, own["expert_out"], axis=1) + own["expert_out_bias"][of]


def shared(w: Params, x_btd: jax.Array, y_btd: jax.Array) -> jax.Array:
    """What all tokens are sent to, its answer weighed by a sigmoid where the model has one."""
    if "shared_router" not in w:
        return y_btd
    gate = project("btd,nd->btn", x_btd, w["shared_router"], ("batch", None, None))
    return y_btd * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(y_btd.dtype)
