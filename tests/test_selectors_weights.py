"""Scores of the layers' matrices against torch's autograd, places, and chance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from e3jax.errors import UserError
from e3jax.selectors import fixed, weights
from e3jax.selectors.selection import Calibration, Task
from selectors_tiny import as_batch, make_tiny
from sharded_tiny import MODELS, numbers, placed
from test_selectors_similarity import calibrate, documents, in_forms
from training_tiny import random_batch, set_mesh

LAYERS = 8
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def tiny(request, tmp_path_factory):
    """(transformers' model in float64, our parameters, configuration); biases, or norms of heads
    and a tied head."""
    changes = {"tie_word_embeddings": request.param == "qwen3", "num_hidden_layers": LAYERS}
    model, params, cfg = make_tiny(tmp_path_factory.mktemp("tiny"), request.param, **changes)
    assert cfg.tied == (request.param == "qwen3") and cfg.qkv_bias == (request.param == "qwen2")
    return model, params, cfg


def torch_sums(model, term) -> np.ndarray:
    """sum |term(weight)| over the matrices of each layer."""
    return np.array(
        [
            sum(
                float(term(w).abs().sum())
                for name, w in layer.named_parameters()
                if name.endswith("weight") and name.split(".")[-2] in MATRICES
            )
            for layer in model.model.layers
        ]
    )


def torch_taylor(model, texts) -> np.ndarray:
    model.zero_grad()
    total, count = 0.0, 0
    for ids in texts:
        tokens = torch.as_tensor(ids)[None]
        logits = model(tokens, use_cache=False).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
        count += len(ids) - 1
    (total / count).backward()
    return torch_sums(model, lambda w: w.detach() * w.grad)


def test_magnitude(tiny):
    model, params, cfg = tiny
    found = weights.magnitude(calibrate(params, cfg, []), Task(LAYERS, 5))
    want = torch_sums(model, lambda w: w.detach())
    np.testing.assert_allclose(found.scores, want, rtol=1e-5)
    assert found.order == tuple(np.argsort(want)[:3])
    assert (found.tokens, found.teacher_tokens) == (0, 0)


@pytest.mark.cases(1)
def test_taylor_is_that_of_autograd(tiny):
    """Over documents whose gradients cancel in part, however they come."""
    model, params, cfg = tiny
    texts = documents(cfg)
    want = torch_taylor(model, texts)
    for form, batches in in_forms(texts).items():
        found = weights.taylor(calibrate(params, cfg, batches), Task(LAYERS, 5))
        np.testing.assert_allclose(found.scores, want, rtol=1e-4, err_msg=form)
        assert found.order == tuple(np.argsort(want)[:3])
        assert (found.tokens, found.teacher_tokens) == (0, 28)
    apart = sum(torch_taylor(model, [ids]) * (len(ids) - 1) for ids in texts) / 25
    assert np.all(apart > 1.04 * want)  # so the signs matter


def test_only_predictions_that_carry_loss_count(tiny):
    _, params, cfg = tiny
    first, second, _ = documents(cfg)
    batch = as_batch([[first, second], []], 31)
    half = batch.replace(mask=batch.mask & (batch.segments == 2))
    found = weights.taylor_scores(calibrate(params, cfg, [half]))
    want = weights.taylor_scores(calibrate(params, cfg, [as_batch([[second], []], 31)]))
    np.testing.assert_allclose(found, want, rtol=1e-4)


def test_taylor_plus_keeps_the_ends(tiny):
    _, params, cfg = tiny
    calibration = calibrate(params, cfg, in_forms(documents(cfg))["packed"])
    plain = weights.taylor(calibration, Task(LAYERS, 6))
    found = weights.taylor_plus(calibration, Task(LAYERS, 6))
    assert found.scores == plain.scores and found.teacher_tokens == 28
    assert sorted(found.order) == [4, 5]
    assert found.order[0] == min((4, 5), key=lambda i: plain.scores[i])
    found = weights.taylor_plus(calibration, Task(LAYERS, 7, force=frozenset({5})))
    assert found.order == (5,)
    for task in (
        Task(LAYERS, 5),
        Task(LAYERS, 6, protect=frozenset({4})),
        Task(LAYERS, 6, force=frozenset({0})),
    ):
        with pytest.raises(UserError, match=r"taylor_plus never removes layers \[0, 1, 2, 3, 6, 7"):
            weights.taylor_plus(calibration, task)


def test_protected_and_forced_layers(tiny):
    _, params, cfg = tiny
    calibration = calibrate(params, cfg, in_forms(documents(cfg))["packed"])
    for rule in (weights.magnitude, weights.taylor):
        first, second, *_, last = rule(calibration, Task(LAYERS, 1)).order
        task = Task(LAYERS, 6, protect=frozenset({first}), force=frozenset({last}))
        assert rule(calibration, task).order == (last, second)


@pytest.mark.slow
def test_eight_devices_give_the_scores_of_one():
    """With a mesh axis that does not divide every size."""
    cfg, task = MODELS["odd"], Task(4, 2)
    batches = [random_batch(0), random_batch(1)]
    rules = (weights.magnitude, weights.taylor)
    want = [rule(calibrate(numbers("odd"), cfg, batches), task) for rule in rules]
    with set_mesh(2, 2, 2):
        found = [rule(calibrate(placed("odd"), cfg, batches), task) for rule in rules]
    for a, b in zip(found, want, strict=True):
        assert a.order == b.order
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4)


def test_bfloat16_parameters_are_added_up_in_float32():
    """In bfloat16 forty equal gradients would not add up to forty times one."""
    cfg = MODELS["even"]
    params = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), numbers("even"))
    batches = [random_batch(0)]
    once = weights.taylor_scores(calibrate(params, cfg, batches))
    often = weights.taylor_scores(calibrate(params, cfg, batches * 40))
    np.testing.assert_allclose(often, once, rtol=1e-5)
    found = weights.magnitude(calibrate(params, cfg, []), Task(4, 3)).scores
    layers = params["layers"]
    names = ("q", "k", "v", "o", "gate", "up", "down")
    want = sum(np.abs(np.asarray(layers[n], np.float64)).reshape(4, -1).sum(1) for n in names)
    np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.slow
def test_layers_of_two_stacks():
    """Experts and the router count, norms and biases do not; layers keep their numbers."""
    cfg, params = MODELS["sparse"], numbers("sparse")
    found = weights.magnitude(calibrate(params, cfg, []), Task(4, 3)).scores
    want = np.zeros(4)
    for stack, ids in (("dense_layers", [0]), ("layers", [1, 2, 3])):
        for name, w in params[stack].items():
            if "norm" not in name and "bias" not in name:
                want[ids] += np.abs(w).reshape(len(ids), -1).sum(1)
    np.testing.assert_allclose(found, want, rtol=1e-5)
    scores = weights.taylor_scores(calibrate(params, cfg, [random_batch(0)]))
    assert scores.shape == (4,) and (scores > 0).all()


def nothing(seed: int = 0) -> Calibration:
    """What a selector that looks at nothing is given."""
    return Calibration({}, MODELS["even"], [], jnp.float32, chunk=1, seed=seed)


def test_places():
    assert fixed.tail(nothing(), Task(24, 18)).order == tuple(range(18, 24))
    assert fixed.deepest(nothing(), Task(24, 18)).order == tuple(range(17, 23))
    assert fixed.deepest(nothing(), Task(24, 18)).keep == (*range(17), 23)
    assert fixed.deepest(nothing(), Task(4, 1)).order == (0, 1, 2)
    assert fixed.tail(nothing(), Task(8, 6, frozenset({5}), frozenset({6}))).order == (6, 7)
    for rule in (fixed.tail, fixed.deepest):
        with pytest.raises(UserError, match=rf"{rule.__name__} removes layers \[6\]"):
            rule(nothing(), Task(8, 6, protect=frozenset({6})))
        with pytest.raises(UserError, match=rf"{rule.__name__} keeps layers \[2\]"):
            rule(nothing(), Task(8, 6, force=frozenset({2})))


def test_chance():
    task = Task(24, 18, protect=frozenset({0, 23}), force=frozenset({7}))
    found = [fixed.random(nothing(seed), task) for seed in range(40)]
    assert found[3] == fixed.random(nothing(3), task)
    assert len({f.keep for f in found}) == 40
    assert all(f.order[0] == 7 and not {0, 23} & set(f.order) for f in found)
    assert all(len(set(f.order)) == 6 for f in found)
    assert {i for f in found for i in f.order} == set(range(1, 23))
