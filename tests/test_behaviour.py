"""Every token's figures against dense formulas in float64; tenths by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e3jax.evaluate import behaviour
from e3jax.evaluate.figures import make_figures
from e3jax.models import decoder
from test_evaluate import by_definition, log_probabilities, student_params, uneven_batches
from training_tiny import CFG, dense_params, set_mesh


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)])
def test_every_token_is_that_of_the_definition(sizes):
    dense, student, batches = dense_params(), student_params(), uneven_batches()
    with set_mesh(*sizes):
        places = jax.tree.map(lambda s: s.sharding, decoder.abstract_params(CFG))
        put = lambda params: jax.tree.map(jax.device_put, params, places)
        tokens = behaviour.make_tokens(CFG, CFG, dtype=jnp.float32, chunk=24)
        found = tokens(put(dense), put(student), iter(batches))
    p = np.concatenate([log_probabilities(dense, b, CFG)[b.mask] for b in batches])
    q = np.concatenate([log_probabilities(student, b, CFG)[b.mask] for b in batches])
    targets = np.concatenate([b.targets[b.mask] for b in batches])
    np.testing.assert_allclose(found.kl, np.sum(np.exp(p) * (p - q), -1), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.entropy, -np.sum(np.exp(p) * p, -1), rtol=1e-4)
    np.testing.assert_allclose(found.nll, -q[np.arange(len(q)), targets], rtol=1e-4)
    np.testing.assert_array_equal(found.agree, p.argmax(-1) == q.argmax(-1))
    windows = np.concatenate([8 * n + np.nonzero(b.mask)[0] for n, b in enumerate(batches)])
    np.testing.assert_array_equal(found.window, windows)
    figures = make_figures(CFG, CFG, dtype=jnp.float32, chunk=24)(dense, student, batches)
    assert found.figures().kl == pytest.approx(figures.kl, rel=1e-4)
    assert found.figures().perplexity == pytest.approx(figures.perplexity, rel=1e-5)
    assert found.figures().agreement == pytest.approx(figures.agreement, abs=1e-9)
    for window, (kl, count) in zip(np.unique(windows), found.windows(), strict=True):
        rows = jax.tree.map(lambda x, w=window: x[w % 8][None], batches[window // 8])
        _, expected, _, tokens = by_definition(dense, student, CFG, [rows])
        assert count == tokens and kl / count == pytest.approx(expected, rel=1e-3)


def planted(entropy, **fields):
    n = len(entropy)
    kl = np.asarray(fields.get("kl", np.zeros(n)), float)
    one = np.ones(n)
    return behaviour.Tokens(kl, one, np.asarray(entropy, float), one, np.arange(n))


def test_tenths_go_by_the_dense_models_entropy():
    entropy = np.random.default_rng(0).permutation(25)
    found = behaviour.deciles(planted(entropy, kl=2.0 * entropy))
    assert [x.tokens for x in found] == [3] * 5 + [2] * 5
    assert [x.entropy for x in found] == [2, 5, 8, 11, 14, 16, 18, 20, 22, 24]
    assert found[0].kl == 2.0 and found[-1].kl == 47.0
    equal = behaviour.deciles(planted(np.zeros(20), kl=np.arange(20)))
    assert [x.tokens for x in equal] == [2] * 10
    assert len(behaviour.deciles(planted([1.0, 2.0]))) == 2
