"""How little layers turn the stream: against transformers, by hand, and with idle layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from e3jax import config, job
from e3jax.data.text import tokenize
from e3jax.errors import UserError
from e3jax.hf.families import read_config
from e3jax.hf.load import load_params
from e3jax.models import decoder
from e3jax.models.decoder import Batch
from e3jax.selectors import fixed, similarity
from e3jax.selectors.selection import Calibration, Task
from hf_tiny import random_tokens
from selectors_tiny import as_batch, make_tiny
from training_tiny import set_mesh

LAYERS = 6
BLOCKS = [similarity.streamline, similarity.angular, similarity.angular_released]
RULES = [similarity.shortgpt, similarity.shortgpt_released, similarity.minitron, *BLOCKS]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"), "llama", num_hidden_layers=LAYERS)


def calibrate(params, cfg, batches) -> Calibration:
    return Calibration(params, cfg, batches, jnp.float32, chunk=10)


def documents(cfg, lengths=(12, 7, 9)) -> list[np.ndarray]:
    return [random_tokens(cfg.vocab_size, n, rows=1)[0] for n in lengths]


def in_forms(texts) -> dict[str, list[Batch]]:
    """Three documents in windows of one shape: a row each, over two batches; side by side."""
    first, second, third = texts
    return {
        "rows": [as_batch([[first], [second]], 31), as_batch([[third], []], 31)],
        "packed": [as_batch([texts, []], 31)],
    }


def torch_streams(model, texts, *, final_norm) -> list[np.ndarray]:
    """h_0..h_L of each document alone, float64 [L + 1, T, D]."""
    last, streams = [], []
    handle = model.model.norm.register_forward_hook(lambda _, args, out: last.append(args[0]))
    for ids in texts:
        with torch.no_grad():
            out = model(torch.as_tensor(ids)[None], output_hidden_states=True, use_cache=False)
        found = [*out.hidden_states[:-1], out.hidden_states[-1] if final_norm else last[-1]]
        streams.append(torch.cat(found).numpy())
    handle.remove()
    assert all(h.dtype == np.float64 and len(h) == LAYERS + 1 for h in streams)
    return streams


def cosines(streams: np.ndarray, n: int) -> np.ndarray:
    """Of h_l and h_{l+n}: [L - n + 1, T]."""
    unit = streams / np.linalg.norm(streams, axis=-1, keepdims=True)
    return np.sum(unit[:-n] * unit[n:], -1)


@pytest.mark.parametrize("form", ["rows", "packed"])
def test_scores_are_those_of_transformers(tiny, form):
    """However the tokens come: padding, empty rows and neighbours in the window change nothing."""
    model, params, cfg = tiny
    texts = documents(cfg)
    calibration, task = calibrate(params, cfg, in_forms(texts)[form]), Task(LAYERS, 4)
    alone, turned = {}, {}
    for final_norm in (False, True):
        streams = torch_streams(model, texts, final_norm=final_norm)
        alone[final_norm] = 1 - np.concatenate([cosines(h, 1) for h in streams], axis=1).mean(1)
        turned[final_norm] = np.mean([np.arccos(cosines(h, 2)[:, -1]) for h in streams], 0) / np.pi
    streams = torch_streams(model, texts, final_norm=False)
    across = np.concatenate([cosines(h, 2) for h in streams], axis=1).mean(1)
    rules = {
        similarity.shortgpt: alone[False],
        similarity.shortgpt_released: alone[True],
        similarity.streamline: across,
        similarity.angular: turned[False],
        similarity.angular_released: turned[True],
    }
    for rule, scores in rules.items():
        found = rule(calibration, task)
        np.testing.assert_allclose(found.scores, scores, atol=3e-6, err_msg=rule.__name__)
        assert (found.tokens, found.teacher_tokens) == (0, 28)
        assert np.ptp(scores) > 0.05
    np.testing.assert_allclose(similarity.block_influence(calibration), alone[False], atol=3e-6)
    for plain, released in (alone.values(), turned.values()):
        np.testing.assert_array_equal(plain[:-1], released[:-1])
        assert abs(plain[-1] - released[-1]) > 1e-3


def test_choices_follow_the_scores(tiny):
    """Blocks by hand: the first of the largest cosine, of the least angle."""
    _, params, cfg = tiny
    calibration = calibrate(params, cfg, in_forms(documents(cfg))["packed"])
    for keep in (3, 4):
        task, n = Task(LAYERS, keep), LAYERS - keep
        for rule in RULES:
            found = rule(calibration, task)
            scores = np.array(found.scores)
            if rule not in BLOCKS:
                assert found.order == tuple(np.argsort(scores)[:n])
                continue
            assert len(scores) == keep + 1
            skip = int(rule is similarity.angular_released)  # which does not look at h_0
            goodness = scores if rule is similarity.streamline else -scores
            start = skip + int(np.argmax(goodness[skip:]))
            assert found.order == tuple(range(start, start + n))
            assert found.keep == (*range(start), *range(start + n, LAYERS))


def test_blocks_of_one_are_block_influence(tiny):
    _, params, cfg = tiny
    calibration, task = calibrate(params, cfg, in_forms(documents(cfg))["rows"]), Task(LAYERS, 5)
    found = similarity.streamline(calibration, task)
    influence = similarity.block_influence(calibration)
    np.testing.assert_allclose(1 - np.array(found.scores), influence, atol=1e-6)
    assert found.order == similarity.shortgpt(calibration, task).order


def test_minitron_adds_up_the_means_of_batches(tiny):
    """A batch of few tokens counts like one of many, and one without any not at all."""
    _, params, cfg = tiny
    first, second, third = documents(cfg)
    parts = [as_batch([[first, second], []], 31), as_batch([[third[:2]], []], 31)]
    empty = as_batch([[], []], 31)
    each = [similarity.block_influence(calibrate(params, cfg, [part])) for part in parts]
    found = similarity.minitron(calibrate(params, cfg, [*parts, empty]), Task(LAYERS, 4))
    np.testing.assert_allclose(found.scores, each[0] + each[1], atol=1e-6)
    pooled = similarity.block_influence(calibrate(params, cfg, [*parts, empty]))
    np.testing.assert_allclose(pooled, (19 * each[0] + 2 * each[1]) / 21, atol=1e-6)
    assert found.teacher_tokens == 21 and not np.allclose(each[0], each[1], atol=1e-3)


def without_effect(params, layers):
    """The same model, in which these layers add nothing to the stream."""
    index = jnp.asarray(layers)
    idle = {name: params["layers"][name].at[index].set(0) for name in ("o", "down")}
    return {**params, "layers": {**params["layers"], **idle}}


def test_layers_that_do_nothing_go_first(tiny):
    _, params, cfg = tiny
    batches = in_forms(documents(cfg))["packed"]
    for idle in range(1, LAYERS):
        calibration = calibrate(without_effect(params, [idle]), cfg, batches)
        for rule in (similarity.shortgpt, similarity.minitron):
            found = rule(calibration, Task(LAYERS, 3))
            assert found.order[0] == idle and abs(found.scores[idle]) < 1e-5
    for start in range(1, LAYERS - 2):
        gone = tuple(range(start, start + 3))
        calibration = calibrate(without_effect(params, gone), cfg, batches)
        for rule in BLOCKS:
            assert rule(calibration, Task(LAYERS, 3)).order == gone


def test_final_norm_makes_an_idle_last_layer_busy(tiny):
    """The accident of the released code: what the norm does is put down to the last layer."""
    _, params, cfg = tiny
    params = {**without_effect(params, [LAYERS - 1]), "final_norm": jnp.arange(32.0) % 3}
    calibration = calibrate(params, cfg, in_forms(documents(cfg))["rows"])
    assert similarity.block_influence(calibration)[-1] < 1e-6
    assert similarity.block_influence(calibration, final_norm=True)[-1] > 0.1


def test_angles_by_hand():
    x = jnp.array([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, 4.0]])
    y = jnp.array([[0.0, 5.0], [-2.0, 0.0], [1.0, 0.0], [7.0, 7.0], [4.0, 3.0]])
    np.testing.assert_allclose(
        similarity.cosine(x, y), [0, -1, np.sqrt(0.5), 1, 0.96], atol=1e-6, rtol=1e-6
    )
    angles = similarity._angle(x, y)
    np.testing.assert_allclose(angles, [0.5, 1, 0.25, 0, np.arccos(0.96) / np.pi], atol=2e-4)


def test_last_tokens_of_documents():
    batch = as_batch([[np.arange(3), np.arange(1), np.arange(2)], [np.arange(8)], []], 8)
    found = np.argwhere(similarity._last_of_document(batch)).tolist()
    assert found == [[0, 2], [0, 3], [0, 5], [1, 7]]


def test_protected_and_forced_layers(tiny):
    _, params, cfg = tiny
    calibration = calibrate(params, cfg, in_forms(documents(cfg))["rows"])
    for rule in RULES:
        free = set(rule(calibration, Task(LAYERS, 4)).order)
        task = Task(LAYERS, 4, protect=frozenset(free))
        assert not free & set(rule(calibration, task).order)
        for layer in range(1, LAYERS):
            task = Task(LAYERS, 4, force=frozenset({layer}), protect=frozenset({0}))
            order = rule(calibration, task).order
            assert layer in order and 0 not in order and len(order) == 2
    for rule in BLOCKS:
        for protect, force in (({1, 3, 5}, set()), (set(), {1, 4}), ({2}, {1})):
            task = Task(LAYERS, 4, frozenset(protect | {0}), frozenset(force))
            with pytest.raises(UserError, match=rf"{rule.__name__} removes 2 layers in a row"):
                rule(calibration, task)


@pytest.mark.slow
def test_eight_devices_give_the_scores_of_one(tiny):
    _, params, cfg = tiny
    texts = [documents(cfg, (9, 1 + n)) for n in range(8)]
    batches, task = [as_batch(texts, 20)], Task(LAYERS, 4)
    params = jax.device_get(params)
    one = [rule(calibrate(params, cfg, batches), task) for rule in RULES]
    with set_mesh(2, 2, 2):
        places = jax.tree.map(lambda s: s.sharding, decoder.abstract_params(cfg))
        placed = jax.device_put(params, places)
        many = [rule(calibrate(placed, cfg, batches), task) for rule in RULES]
    for a, b in zip(one, many, strict=True):
        assert a.order == b.order
        np.testing.assert_allclose(a.scores, b.scores, atol=2e-6)


@pytest.mark.slow
def test_published_choices(shared, tmp_path, one_device):
    """The six layers of a real model that go, on the 24 rows of the published figures."""
    folder = shared / "models" / "chain-math-24l"
    train = shared / "data" / "chain-math" / "train.jsonl.gz"
    source = config.Source(path=str(train), rows=("0:24",))
    data = config.Data(train=(source,), window=512, cache=str(tmp_path), decontaminate=())
    windows = tokenize(data.train, data, folder)
    assert windows.meta["documents"] == 24
    cfg = read_config(folder)
    params = load_params(folder, cfg, jnp.float32)
    calibration = calibrate(params, cfg, list(job.ordered(windows, 8)))
    chosen = {rule: sorted(rule(calibration, Task(24, 18)).order) for rule in (*RULES, fixed.tail)}
    assert chosen[similarity.shortgpt] == [10, 11, 13, 14, 15, 17]
    assert chosen[similarity.streamline] == list(range(10, 16))
    assert chosen[fixed.tail] == list(range(18, 24))
