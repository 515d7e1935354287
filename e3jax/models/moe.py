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
from e3jax.models.params import Params
from e3jax.models.product import precision, project

# Both operands' last axis is summed over; the rows of the first are in groups, one an expert.
BY_EXPERT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


class Routes(NamedTuple):
    """Where S tokens are sent, and what weighs each answer."""

    experts: jax.Array  # int32 [S, k]
    weights: jax.Array  # float32 [S, k]


def route(
    x_sd: jax.Array, router_ed: jax.Array, bias_e: jax.Array | None, experts: Experts
) -> Routes:
    """The experts of each token, in float32: in bfloat16 near ones would change places."""
    outcomes = jnp.einsum(
        "sd,ed->se",
        x_sd.astype(jnp.float32),
        router_ed.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    if experts.scores == "softmax":
        scores = jax.nn.softmax(outcomes, axis=-1)
    else:
        scores = jax.nn.sigmoid(outcomes)
    wanted = jax.lax.stop_gradient(scores)
    if bias_e is not None:
        wanted = wanted + jax.lax.stop_gradient(bias_e.astype(jnp.float32))
    if experts.groups > 1:
        wanted = jnp.where(_in_best_groups(wanted, experts), wanted, -jnp.inf)
    _, chosen = jax.lax.top_k(wanted, experts.per_token)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if experts.normalised:
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
    bias = w.get("router_bias")
    matrices = [w[f"expert_{name}"] for name in ("gate", "up", "down")]
    router = w["router"]
    if mesh.current() is None:
        return _local(x_btd, router, bias, *matrices, experts=experts, activation=activation)
    axes = (("experts", None, "embed"),) * 2 + (("experts", "embed", None),)
    matrices = [mesh.gather(m.astype(x_btd.dtype), a) for m, a in zip(matrices, axes, strict=True)]
    router = mesh.gather(router, (None, "embed"))
    rows = mesh.spec(("batch", None, None))
    split = mesh.spec(("experts",), (experts.count,))[0]

    def here(x: jax.Array, router: jax.Array, bias: jax.Array | None, *m: jax.Array) -> jax.Array:
        first = 0 if split is None else jax.lax.axis_index(split) * m[0].shape[0]
        y = _local(x, router, bias, *m, experts=experts, activation=activation, first=first)
        return y if split is None else jax.lax.psum(y, split)

    whole = [mesh.spec(("experts", None, None), m.shape) for m in matrices]
    in_specs = (rows, mesh.spec((None, None)), mesh.spec((None,)), *whole)
    if bias is None:
        in_specs = (*in_specs[:2], None, *whole)
    run = jax.shard_map(here, in_specs=in_specs, out_specs=rows, check_vma=False)
    return run(x_btd, router, bias, *matrices)


def _local(
    x_btd: jax.Array,
    router: jax.Array,
    bias: jax.Array | None,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    experts: Experts,
    activation: Callable[[jax.Array], jax.Array],
    first: jax.Array | int = 0,
) -> jax.Array:
    """The answers of the experts from `first` on that a device has, to the tokens that it has."""
    x = x_btd.reshape(-1, x_btd.shape[-1])
    routes = route(x, router, bias, experts)
    count = len(gate)  # experts here; all those elsewhere are one more, whose answers are zero
    place = routes.experts - first
    place = jnp.where((place >= 0) & (place < count), place, count).reshape(-1)
    order = jnp.argsort(place)  # stable: the same sum whatever else is in the batch
    sizes = jnp.sum(place[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)

    def grouped(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot_general(
            rows,
            matrices.astype(rows.dtype),
            sizes,
            BY_EXPERT,
            precision=precision(rows.dtype),
        )

    # Each token k times, then in order: both are permutations backward, where a gather with
    # repetitions would add up in whatever order.
    sent = _permuted(jnp.repeat(x, experts.per_token, axis=0), order)
    y = activation(recompute.keep_large(grouped(sent, gate)))
    y = grouped(y * recompute.keep_large(grouped(sent, up)), down)
    known = jnp.arange(len(y)) < jnp.sum(sizes)
    y = jnp.where(known[:, None], y, 0)
    y = _permuted(y, jnp.argsort(order)).reshape(len(x), experts.per_token, -1)
    y = jnp.sum(y.astype(jnp.float32) * routes.weights[..., None], axis=1)
    return y.astype(x.dtype).reshape(x_btd.shape)


def _permuted(x: jax.Array, order: jax.Array) -> jax.Array:
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")


def shared(w: Params, x_btd: jax.Array, y_btd: jax.Array) -> jax.Array:
    """What all tokens are sent to, its answer weighed by a sigmoid where the model has one."""
    if "shared_router" not in w:
        return y_btd
    gate = project("btd,nd->btn", x_btd, w["shared_router"], ("batch", None, None))
    return y_btd * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(y_btd.dtype)
