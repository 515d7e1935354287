"""The sampler, its relaxations and its score function, against enumeration of every outcome."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e3jax import mesh
from e3jax.search import gumbel

THETA = np.array([0.5, -1.0, 1.5, 0.0, -0.3])
L, K = 5, 3
KINDS = ("threshold", "khot", "softmax")
sample = jax.jit(gumbel.sample, static_argnames="rows")
straight_through = jax.jit(gumbel.straight_through, static_argnames="kind")
score_gradient = jax.jit(gumbel.score_gradient)


def fixed(num_layers=L, *layers):
    return np.isin(np.arange(num_layers), layers)


def draw(theta=THETA, k=K, rows=1, seed=0, protect=(), force=()):
    theta = jnp.asarray(theta, jnp.float32)
    n = len(theta)
    key = jax.random.key(seed)
    return sample(key, theta, k, rows=rows, protect_l=fixed(n, *protect), force_l=fixed(n, *force))


def ordered_probabilities(theta, k):
    """Plackett-Luce: {ordered k-tuple: probability}, float64, by drawing one after the other."""
    weights, table = np.exp(np.asarray(theta, float)), {}
    for layers in itertools.permutations(range(len(theta)), k):
        p, rest = 1.0, weights.sum()
        for i in layers:
            p, rest = p * weights[i] / rest, rest - weights[i]
        table[layers] = p
    return table


def in_order(layers, num_layers=L):
    """The Draws (one row each) in which the kept layers came in the given orders."""
    perturbed = np.full((len(layers), num_layers), -10.0, np.float32)
    for row, order in enumerate(layers):
        perturbed[row, list(order)] = np.arange(len(order), 0, -1)
    keep = perturbed > 0
    return gumbel.Draw(
        jnp.asarray(keep),
        jnp.asarray(perturbed),
        jnp.ones(num_layers, bool),
        jnp.int32(len(layers[0])),
    )


# --- the sampler


def test_frequencies_of_kept_sets_are_plackett_luce():
    rows = 40_000
    exact = {}
    for layers, p in ordered_probabilities(THETA, K).items():
        exact[frozenset(layers)] = exact.get(frozenset(layers), 0.0) + p
    keep = np.asarray(draw(rows=rows).keep)
    assert np.all(keep.sum(1) == K)
    sets, counts = np.unique(keep, axis=0, return_counts=True)
    seen = {frozenset(np.flatnonzero(s)): n for s, n in zip(sets, counts, strict=True)}
    chi = sum((seen.get(s, 0) - rows * p) ** 2 / (rows * p) for s, p in exact.items())
    assert len(exact) == 10 and chi < 21.7  # the 99th percentile of chi-square, 9 degrees


@pytest.mark.parametrize("k,kept", [(0, 1), (1, 1), (3, 3), (5, 4), (9, 4)])
def test_every_row_keeps_k_or_what_is_allowed(k, kept):
    """Layer 1 protected, layer 4 forced out: from 1 to 4 layers can be kept."""
    keep = np.asarray(draw(k=k, rows=200, protect=(1,), force=(4,)).keep)
    assert np.all(keep.sum(1) == kept)
    assert keep[:, 1].all() and not keep[:, 4].any()


def test_protected_and_forced_layers_get_no_gradient():
    protect, force = fixed(L, 2), fixed(L, 0)

    def through(theta, kind):
        d = sample(jax.random.key(1), theta, K, 8, protect, force)
        weights = jnp.arange(40.0).reshape(8, L)
        return jnp.sum(weights * straight_through(d, 0.7, kind))

    theta = jnp.asarray(THETA, jnp.float32)
    for kind in KINDS:
        grad = np.asarray(jax.grad(through)(theta, kind))
        assert np.all(grad[[0, 2]] == 0) and np.all(grad[[1, 3, 4]] != 0)
    d = sample(jax.random.key(1), theta, K, 8, protect, force)
    grad = np.asarray(score_gradient(theta, d, jnp.arange(8.0)))
    assert np.all(grad[[0, 2]] == 0) and np.all(grad[[1, 3, 4]] != 0)


# --- the score function


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_log_prob_is_plackett_luce(k):
    exact = ordered_probabilities(THETA, k)
    got = gumbel.log_prob(jnp.asarray(THETA, jnp.float32), in_order(list(exact)))
    np.testing.assert_allclose(got, np.log(list(exact.values())), atol=1e-5)
    assert math.isclose(float(jnp.sum(jnp.exp(got))), 1.0, abs_tol=1e-5)


def test_log_prob_of_what_competes():
    """A protected and a forced layer leave a Plackett-Luce distribution over the others."""
    d = draw(rows=50, protect=(2,), force=(0,))
    others = [1, 3, 4]
    exact = ordered_probabilities(THETA[others], 2)
    for row, got in enumerate(np.asarray(gumbel.log_prob(jnp.asarray(THETA, jnp.float32), d))):
        order = tuple(others.index(i) for i in np.asarray(d.order)[row, :2])
        assert math.isclose(got, math.log(exact[order]), abs_tol=1e-5)


def test_score_gradient_is_unbiased():
    """Its expectation over all ordered subsets is the gradient of the exact expected loss."""
    outcomes = list(itertools.permutations(range(L), K))
    loss = {frozenset(s): np.random.default_rng(sum(s)).normal() + s[0] for s in
            itertools.combinations(range(L), K)}  # fmt: skip
    f = np.array([loss[frozenset(s)] for s in outcomes])

    def expected(theta):
        return sum(p * y for p, y in zip(ordered_probabilities(theta, K).values(), f, strict=True))

    eps = 1e-5
    want = [(expected(THETA + eps * e) - expected(THETA - eps * e)) / (2 * eps) for e in np.eye(L)]
    p = np.array(list(ordered_probabilities(THETA, K).values()))
    weighted = jnp.asarray(p * f * len(f), jnp.float32)  # score_gradient averages over rows
    got = score_gradient(jnp.asarray(THETA, jnp.float32), in_order(outcomes), weighted)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(want).min() > 1e-2


def test_score_gradient_adds_in_a_fixed_order():
    """A scatter adds in any order on a GPU: the devices' copies of theta would drift apart."""
    traced = jax.make_jaxpr(gumbel.score_gradient)(
        jnp.asarray(THETA, jnp.float32), draw(rows=8), jnp.arange(8.0)
    )
    assert "scatter" not in str(traced)


def test_advantage_leaves_the_own_row_out_of_the_baseline():
    tokens = np.array([10.0, 3.0, 20.0, 7.0])
    mean = np.array([0.3, 2.0, 0.01, 5.0])  # nats a token
    log = np.log(mean)
    centred = [log[b] - np.delete(log, b).mean() for b in range(4)]
    want = np.array(centred) / log.std()
    np.testing.assert_allclose(gumbel.advantage(mean * tokens, tokens), want, rtol=1e-5)
    assert np.all(np.asarray(gumbel.advantage(jnp.full(4, 0.7), jnp.ones(4))) == 0)


def test_advantage_of_rows_that_say_nothing_is_zero():
    """No loss tokens, or a loss that overflowed: as if the row were not there."""
    loss, tokens = np.array([3.0, 0.0, np.inf, 0.5, np.nan]), np.array([2.0, 0.0, 4.0, 1.0, 3.0])
    got = np.asarray(gumbel.advantage(loss, tokens))
    np.testing.assert_allclose(got[[0, 3]], gumbel.advantage(loss[[0, 3]], tokens[[0, 3]]))
    np.testing.assert_array_equal(got[[1, 2, 4]], 0)
    # A masked model equal to the dense one has loss 0, or a little below it by rounding.
    assert np.all(np.isfinite(gumbel.advantage(jnp.array([0.0, 1.0, -1e-7]), jnp.ones(3))))


# --- relaxations


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_exactly_the_hard_mask(kind):
    theta = np.random.default_rng(0).normal(size=10)
    d = draw(theta, 4, rows=10_000)
    for tau in (4.0, 0.3):
        mask = np.asarray(straight_through(d, tau, kind))
        np.testing.assert_array_equal(mask, np.asarray(d.keep, np.float32))  # 1e5 values each


@pytest.mark.parametrize("k", [1, 3, 4, 6])
def test_relaxations_become_the_hard_mask(k):
    """As tau falls; rows whose boundary is within reach of tau are left out."""
    theta = np.random.default_rng(0).normal(size=7)
    d = draw(theta, k, rows=200)
    ranked = np.sort(np.asarray(d.perturbed), axis=1)[:, ::-1]
    clear = np.min(ranked[:, :-1] - ranked[:, 1:], axis=1) > 0.02
    assert clear.sum() > 50
    for soft in (gumbel.threshold(d, 1e-3), gumbel.khot(d, 1e-3)):
        np.testing.assert_allclose(np.asarray(soft)[clear], np.asarray(d.keep)[clear], atol=1e-3)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("fixed_", [((), ()), ((0,), (4,))], ids=["free", "fixed"])
def test_khot_sums_to_k(k, fixed_):
    protect, force = fixed_
    theta = np.random.default_rng(0).normal(size=6)
    d = draw(theta, k, rows=20, protect=protect, force=force)
    soft = np.asarray(gumbel.khot(d, 0.8))[:, np.asarray(d.competes)]
    np.testing.assert_allclose(soft.sum(1), float(d.slots), rtol=1e-4, atol=1e-5)


def test_khot_of_a_majority_is_of_the_complement():
    d = draw(np.random.default_rng(0).normal(size=8), 6, rows=20)
    removed = d.replace(perturbed=-d.perturbed, slots=jnp.int32(2))
    np.testing.assert_allclose(gumbel.khot(d, 0.5), 1 - gumbel.khot(removed, 0.5), atol=1e-6)


def test_khot_is_xie_and_ermon():
    """The recursion in float64, K <= L / 2."""
    d, tau = draw(np.random.default_rng(0).normal(size=8), 3, rows=5), 0.5
    s, total = np.asarray(d.perturbed, float), 0.0
    for _ in range(3):
        a = np.exp(s / tau) / np.exp(s / tau).sum(1, keepdims=True)
        s, total = s + np.log(1 - a), total + a
    np.testing.assert_allclose(gumbel.khot(d, tau), total, rtol=1e-4)


def boundary_share(kind, tau, num_layers, k, rows=200):
    """Share of |dL/d theta| on the six layers around the boundary, theta and dL/dm normal."""
    rng = np.random.default_rng(0)
    d = draw(rng.normal(size=num_layers), k, rows=rows)
    upstream = jnp.asarray(rng.normal(size=(rows, num_layers)), jnp.float32)
    relax = lambda s: straight_through(d.replace(perturbed=s), tau, kind)
    grad = jnp.abs(jax.vjp(relax, d.perturbed)[1](upstream)[0])
    ranked = jnp.take_along_axis(grad, d.order, axis=1)
    return float(jnp.mean(ranked[:, k - 3 : k + 3].sum(1) / ranked.sum(1)))


@pytest.mark.parametrize(
    "kind,num_layers,k,shares",
    [
        ("softmax", 32, 12, {4.0: 0.19, 1.0: 0.11, 0.5: 0.02, 0.1: 0.00}),
        ("khot", 32, 12, {4.0: 0.20, 1.0: 0.20, 0.5: 0.23, 0.1: 0.23}),
        ("threshold", 32, 12, {4.0: 0.28, 0.1: 0.87}),
        ("threshold", 24, 18, {4.0: 0.33, 0.1: 0.92}),
        ("threshold", 64, 48, {4.0: 0.17, 0.1: 0.71}),
    ],
)
def test_share_of_the_gradient_at_the_boundary(kind, num_layers, k, shares):
    """Where each relaxation looks as tau falls: softmax loses the boundary, threshold finds it."""
    for tau, want in shares.items():
        assert abs(boundary_share(kind, tau, num_layers, k) - want) < 0.035, tau


def test_khot_of_the_complement_keeps_the_boundary():
    """Without it the share falls to 0.06 at 24/18; even would be 0.25."""
    assert boundary_share("khot", 0.1, 24, 18) > 0.4


@pytest.mark.parametrize("kind", KINDS)
def test_no_boundary_no_gradient(kind):
    def loss(theta, k, protect):
        d = sample(jax.random.key(0), theta, k, 4, protect, fixed())
        weights = jnp.arange(4.0 * L).reshape(4, L)
        return jnp.sum(weights * straight_through(d, 0.5, kind))

    theta = jnp.asarray(THETA, jnp.float32)
    assert np.all(np.asarray(jax.grad(loss)(theta, L, fixed())) == 0)
    assert np.all(np.asarray(jax.grad(loss)(theta, 2, fixed(L, 0, 1))) == 0)
    assert np.any(np.asarray(jax.grad(loss)(theta, L - 1, fixed())) != 0)


def test_no_boundary_no_score_gradient():
    """At K = L there is one set; the orders it may come in are no reason to move."""
    orders = in_order([(0, 1, 2, 3, 4), (4, 2, 0, 1, 3)])
    got = score_gradient(jnp.asarray(THETA, jnp.float32), orders, jnp.array([1.0, -1.0]))
    np.testing.assert_array_equal(got, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_competes(kind):
    """Every layer protected or forced out: the one mask there is, and gradients of 0."""

    def loss(theta):
        d = sample(jax.random.key(0), theta, 2, 4, fixed(L, 0, 1), fixed(L, 2, 3, 4))
        mask = straight_through(d, 0.05, kind)
        return jnp.sum(mask * jnp.arange(L)), (mask, d)

    theta = jnp.asarray(THETA, jnp.float32)
    grad, (mask, d) = jax.grad(loss, has_aux=True)(theta)
    np.testing.assert_array_equal(mask, [[1, 1, 0, 0, 0]] * 4)
    np.testing.assert_array_equal(grad, 0)
    np.testing.assert_array_equal(score_gradient(theta, d, jnp.ones(4)), 0)


@pytest.mark.cases(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e4, 1e8])
def test_finite_at_extreme_theta(kind, scale):
    theta = jnp.asarray(THETA * scale, jnp.float32)

    def loss(theta, tau):
        d = sample(jax.random.key(0), theta, 3, 16, fixed(L, 0), fixed(L, 1))
        upstream = jax.random.normal(jax.random.key(1), (16, L))
        return jnp.sum(upstream * straight_through(d, tau, kind)), d

    for tau in (4.0, 0.05):
        (value, d), grad = jax.value_and_grad(loss, has_aux=True)(theta, tau)
        assert np.isfinite(value) and np.all(np.isfinite(grad))
    score = score_gradient(theta, d, jnp.linspace(-2, 2, 16))
    assert np.all(np.isfinite(score)) and np.all(np.isfinite(gumbel.log_prob(theta, d)))


def test_one_compilation_for_every_k():
    traced = []

    @jax.jit
    def step(theta, k, tau):
        traced.append(k)
        d = sample(jax.random.key(0), theta, k, 4, fixed(), fixed())
        soft = [straight_through(d, tau, kind) for kind in KINDS]
        return d.keep, soft, gumbel.log_prob(theta, d)

    for k in range(1, L + 1):
        keep, soft, _ = step(jnp.asarray(THETA, jnp.float32), k, 1.0 / k)
        assert np.all(np.asarray(keep).sum(1) == k)
        for mask in soft:
            np.testing.assert_array_equal(mask, np.asarray(keep, np.float32))
    assert len(traced) == 1


# --- the answer


def test_answer_is_topk_of_theta():
    theta = np.array([0.0, 3.0, 1.0, 1.0, 2.0])
    got = gumbel.answer(theta, 3, fixed(), fixed())
    np.testing.assert_array_equal(np.flatnonzero(got), [1, 2, 4])  # of the tie, the lower layer
    got = gumbel.answer(theta, 3, fixed(L, 0), fixed(L, 1))
    np.testing.assert_array_equal(np.flatnonzero(got), [0, 2, 4])


def test_keep_probability_of_two_layers():
    """K = 1 of two: the logistic function of the difference."""
    got = gumbel.keep_probability(
        jax.random.key(0), np.array([1.0, 0.0]), 1, fixed(2), fixed(2), 20_000
    )
    assert abs(got[0] - 1 / (1 + np.exp(-1))) < 0.015 and abs(got.sum() - 1) < 1e-5


def test_khot_takes_no_layer_twice():
    """Far ahead, 1 - a rounds to a few float32 steps: too large, and the layer would win again."""
    d = draw(np.array([40.0, 20.0, 0.1, 1.0, -1.0, 0.4, 0.7]), 3, rows=200)
    assert np.max(gumbel.khot(d, 0.1)) < 1.01


def test_noise_and_score_do_not_depend_on_the_mesh():
    def step(theta, advantage):
        d = sample(jax.random.key(1), theta, 3, 16, fixed(), fixed())
        return d.perturbed, score_gradient(theta, d, advantage)

    theta, advantage = THETA.astype(np.float32), np.linspace(-1, 1, 16, dtype=np.float32)
    perturbed, grad = jax.jit(step)(theta, advantage)
    with jax.set_mesh(mesh.make_mesh(1, 4, 2)):
        found = jax.jit(step)(mesh.replicate(theta), mesh.shard_batch(advantage))
    np.testing.assert_array_equal(found[0], perturbed)
    np.testing.assert_allclose(found[1], grad, atol=1e-6)


def test_mask_entropy_is_that_of_coins():
    assert gumbel.mask_entropy(np.array([0.0, 1.0])) == pytest.approx(0, abs=1e-9)
    quarter = 2 - 0.75 * np.log2(3)  # bits of a coin of 1 in 4
    found = gumbel.mask_entropy(np.array([0.5, 0.25, 0.75, 1.0], np.float32))
    assert found == pytest.approx((1 + 2 * quarter) / 4)
