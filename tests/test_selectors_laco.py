"""LaCo's merges and cosines against torch in float64, and its sweep worked out by hand."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from e3jax.errors import UserError
from e3jax.hf.families import read_config
from e3jax.hf.load import load_params
from e3jax.models import decoder
from e3jax.selectors import laco
from e3jax.selectors.selection import Task
from hf_tiny import random_tokens, save_tiny
from selectors_tiny import as_batch, make_tiny
from sharded_tiny import MODELS, numbers
from test_selectors_similarity import calibrate, documents
from training_tiny import CFG, set_mesh

LAYERS = 7


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(transformers' model in float64, a calibration by three documents) of random layers."""
    folder = tmp_path_factory.mktemp("laco")
    model, params, cfg = make_tiny(folder, "llama", num_hidden_layers=LAYERS)
    return model, calibrate(params, cfg, [as_batch([[ids] for ids in documents(cfg)], 12)])


def collapse(layers, into: int, gone: range, added: list[int]):
    """A module list after one merge, its numbers being places: by the paper's formula."""
    layers = list(layers)
    old = [dict(layer.named_parameters()) for layer in layers]
    layers[into] = copy.deepcopy(layers[into])
    with torch.no_grad():
        for name, weight in layers[into].named_parameters():
            if "layernorm" not in name:
                for k in added:
                    weight += old[k][name] - old[into][name]
    return torch.nn.ModuleList(x for i, x in enumerate(layers) if i not in gone)


def last_states(model, layers, texts) -> list[torch.Tensor]:
    """Of each document alone, after the last norm, flattened."""
    whole, model.model.layers = model.model.layers, layers
    with torch.no_grad():
        found = [
            model.model(torch.as_tensor(ids)[None], use_cache=False).last_hidden_state.flatten()
            for ids in texts
        ]
    model.model.layers = whole
    return found


def hand_sweep(similarity, layers=10, threshold=-1.0, **changes):
    options = {"size": 3, "lowest": 0, "highest": layers - 1, "interval": 2, "released": False}
    options |= {"protect": frozenset(), "most": layers} | changes
    options = {"stacks": (range(layers),)} | options
    return laco._sweep(similarity, num_layers=layers, threshold=threshold, **options)


def test_only_layers_that_are_alike_merge():
    """Layers 0 to 3 are dense and the others have experts."""
    found = hand_sweep(lambda *_: 0.5, stacks=(range(4), range(4, 10)), interval=1)
    for into, gone in found.merges:
        assert len({layer < 4 for layer in (into, *gone)}) == 1
    assert found.keep == (0, 4, 9)


def test_merge_in_a_model_of_two_stacks():
    cfg = MODELS["sparse"]  # layer 0 is dense
    params = numbers("sparse")
    merged = laco.merge(jax.tree.map(jnp.asarray, params), cfg, ((1, (3,)),))
    jax.tree.map(np.testing.assert_array_equal, merged["dense_layers"], params["dense_layers"])
    for name, w in params["layers"].items():
        want = w if laco.is_norm(name) else np.stack([w[2], w[1], w[2]])
        np.testing.assert_array_equal(merged["layers"][name], want, err_msg=name)


FIVE = dataclasses.replace(CFG, num_layers=5, windows=(None,) * 5)


def test_merge_by_hand():
    """Sums in float32, later merges of what earlier ones made, norms and the input untouched."""
    values = jnp.asarray([1.0, 1.0, 256.0, 1.0, 8.0], jnp.bfloat16)[:, None]
    params = {"layers": {"q": values, "attn_norm": values, "mlp_norm": values}, "embed": values}
    merged = laco.merge(params, FIVE, ((1, (2, 3)), (0, (1, 4))))
    # 256 + 1 - 1 by way of 257, which bfloat16 has not; then 256 + 8 - 1 rounded to 264.
    want = jnp.asarray([264.0, 256.0, 256.0, 1.0, 8.0], jnp.bfloat16)[:, None]
    assert merged["layers"]["q"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged["layers"]["q"], want)
    for left in (merged["layers"]["attn_norm"], merged["layers"]["mlp_norm"], merged["embed"]):
        np.testing.assert_array_equal(left, values)
    np.testing.assert_array_equal(params["layers"]["q"], values)


def test_one_merged_layer_replaces_to_the_bit():
    weights = jax.random.normal(jax.random.key(0), (4, 64)) * jnp.asarray([[1e6], [1], [1], [1e-6]])
    merged = laco.merge({"layers": {"q": weights}}, FIVE, ((0, (3,)),))
    np.testing.assert_array_equal(merged["layers"]["q"][0], weights[3])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_merge_is_that_of_state_dicts(tmp_path, family):
    """Every parameter of a layer, biases and query norms too, but for its two norms."""
    folder = save_tiny(tmp_path / "dense", family, num_hidden_layers=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    cfg = read_config(folder)
    model.model.layers = collapse(model.model.layers, 1, range(2, 4), [2, 3])
    model.config.num_hidden_layers = 2
    if family != "llama":
        model.config.layer_types = model.config.layer_types[:2]
    model.float().save_pretrained(tmp_path / "merged")
    params = laco.merge(load_params(folder, cfg, jnp.float32), cfg, ((1, (2, 3)),))
    want = load_params(tmp_path / "merged", cfg.take_layers((0, 1)), jnp.float32)
    ours = decoder.take_layers(params, cfg, (0, 1))
    assert jax.tree.structure(ours) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, want)


@pytest.mark.parametrize(
    ("form", "released"), [("rows", False), ("packed", False), ("batches", True)]
)
def test_cosines_are_those_of_transformers(tiny, form, released):
    """However the tokens come: a document counts once, whatever its length and neighbours."""
    model, calibration = tiny
    texts = documents(calibration.cfg)
    batches = {
        "rows": calibration.batches,
        "packed": [as_batch([texts, []], 31)],
        "batches": [as_batch([texts[:1], texts[1:2]], 12), as_batch([texts[2:], []], 12)],
    }[form]
    calibration = dataclasses.replace(calibration, batches=batches)
    found = laco.sweep(calibration, -1.0, size=3, interval=1, released=released)
    layers, numbers = model.model.layers, list(range(LAYERS))
    dense, cosines, order = last_states(model, layers, texts), [], list(found.order)
    for into, added in found.merges:
        place, last = numbers.index(into), numbers.index(added[-1])
        gone = range(place + 1, last + 1)
        layers = collapse(layers, place, gone, [last] if released else list(gone))
        assert [order.pop(0) for _ in gone] == [numbers[i] for i in gone]
        assert added == ((numbers[last],) if released else tuple(numbers[i] for i in gone))
        numbers = [x for i, x in enumerate(numbers) if i not in gone]
        states = zip(last_states(model, layers, texts), dense, strict=True)
        cosines.append(np.mean([float(torch.cosine_similarity(x, y, 0)) for x, y in states]))
    assert not order and found.keep == tuple(numbers)
    assert len(cosines) >= 2 and np.ptp(cosines) > 0.05
    np.testing.assert_allclose(found.scores, cosines, atol=2e-5)
    assert (found.tokens, found.teacher_tokens) == (len(cosines) * 28, 28)


def test_redundant_block_collapses_first(tiny):
    _, calibration = tiny
    layers = dict(calibration.params["layers"])
    for name in ("o", "down"):
        layers[name] = layers[name].at[2:5].set(0.0)
    planted = dataclasses.replace(calibration, params={**calibration.params, "layers": layers})
    found = laco.laco(planted, Task(LAYERS, LAYERS - 2))
    assert found.merges == ((2, (3, 4)),) and found.keep == (0, 1, 2, 5, 6)
    assert found.scores == pytest.approx((1.0,), abs=1e-6)
    assert found.tokens == 2 * planted.tokens  # places 3 and 2, at the first threshold


@pytest.mark.parametrize("select", [laco.laco, laco.laco_released])
def test_exact_count(tiny, select):
    _, calibration = tiny
    for keep in (7, 6, 5, 4):
        found = select(calibration, Task(LAYERS, keep))
        assert len(found.keep) == keep and len(found.scores) == len(found.merges)
        assert sorted(found.keep + found.order) == list(range(LAYERS))
        assert not select(calibration, Task(LAYERS, LAYERS)).merges


def test_one_program_for_all_trials(tiny):
    _, calibration = tiny
    laco.sweep(calibration, -1.0)
    before = laco._final._cache_size()
    laco.laco(calibration, Task(LAYERS, 4))
    assert laco._final._cache_size() == before


def test_threshold_form_reports_the_actual_number(tiny):
    _, calibration = tiny
    none, some = laco.sweep(calibration, 1.0, size=3), laco.sweep(calibration, -1.0, size=3)
    assert none.keep == tuple(range(LAYERS)) and not none.merges
    assert none.tokens == 4 * calibration.tokens  # places 3, 2, 1, 0
    assert some.merges == ((3, (4, 5)), (1, (2, 3))) and some.keep == (0, 1, 6)


def test_sweep_by_hand():
    all_of = lambda *_: 0.5
    found = hand_sweep(all_of)
    assert found.merges == ((6, (7, 8)), (4, (5, 6)), (2, (3, 4)), (0, (1, 2)))
    assert found.keep == (0, 9) and found.order == (7, 8, 5, 6, 3, 4, 1, 2)
    assert hand_sweep(all_of, lowest=1).keep == (0, 1, 2, 9)
    assert hand_sweep(all_of, highest=6).merges[0] == (3, (4, 5))
    # The interval is the distance of merges where there is room for a whole one above.
    apart = hand_sweep(all_of, interval=4)
    assert apart.merges == ((6, (7, 8)), (2, (3, 4)))
    # The paper goes back up to a whole merge below the last layer; the authors' code does not, and
    # its second merge takes what is above: the merged layer and the last one.
    assert hand_sweep(all_of, interval=1).merges[1] == (4, (5, 6))
    released = hand_sweep(all_of, interval=1, released=True)
    assert released.merges[:3] == ((6, (8,)), (5, (9,)), (4, (5,)))
    assert released.order[:5] == (7, 8, 6, 9, 5)
    # A rejected merge moves one place down.
    choosy = hand_sweep(lambda merges, _: float(merges[-1][0] in (5, 1)), threshold=0.5)
    assert choosy.merges == ((5, (6, 7)), (1, (2, 3))) and choosy.scores == (1.0, 1.0)
    assert not hand_sweep(lambda *_: float("nan")).merges


def test_last_merge_is_shortened():
    found = hand_sweep(lambda *_: 0.5, most=3)
    assert found.merges == ((6, (7, 8)), (4, (5,))) and found.order == (7, 8, 5)
    found = hand_sweep(lambda *_: 0.5, most=3, released=True)
    assert found.merges == ((6, (8,)), (4, (5,)))


def test_protected_layers_take_no_part(tiny):
    found = hand_sweep(lambda *_: 0.5, protect=frozenset({8, 4}))
    assert found.merges[0] == (6, (7,))  # shortened
    changed = {i for into, added in found.merges for i in (into, *added)} | {*found.order}
    assert not changed & {4, 8} and {4, 8, 9} <= {*found.keep}
    found = laco.laco(tiny[1], Task(LAYERS, 5, protect=frozenset({2, 5})))
    assert len(found.keep) == 5 and {2, 5} <= {*found.keep}
    assert not {2, 5} & {into for into, _ in found.merges}


def test_what_cannot_be_done_is_said(tiny):
    _, calibration = tiny
    with pytest.raises(UserError, match=r"laco keeps layers \[6\], which search.force names"):
        laco.laco(calibration, Task(LAYERS, 6, force=frozenset({6})))
    with pytest.raises(UserError, match="laco_released can merge 0 of 7 layers away, and 2 are"):
        laco.laco_released(calibration, Task(LAYERS, 5, protect=frozenset(range(LAYERS))))


@pytest.mark.parametrize("axes", [(2, 4, 1), (2, 2, 2)])
def test_eight_devices_give_what_one_does(tiny, axes):
    _, calibration = tiny
    params = jax.tree.map(np.asarray, calibration.params)  # of no device, so good for either mesh
    rows = random_tokens(calibration.cfg.vocab_size, 12, rows=8)
    batches = [as_batch([[row] for row in rows], 12)]
    calibration = dataclasses.replace(calibration, params=params, batches=batches)
    one = laco.sweep(calibration, -1.0, size=3)
    with set_mesh(*axes):
        specs = decoder.abstract_params(calibration.cfg)
        params = jax.tree.map(lambda x, a: jax.device_put(x, a.sharding), params, specs)
        eight = laco.sweep(dataclasses.replace(calibration, params=params), -1.0, size=3)
        merged = laco.merge(params, calibration.cfg, one.merges)
        places = jax.tree.map(
            lambda x, a: x.sharding.is_equivalent_to(a.sharding, x.ndim), merged, specs
        )
    assert all(jax.tree.leaves(places))
    np.testing.assert_allclose(eight.scores, one.scores, atol=1e-5)
    assert dataclasses.replace(eight, scores=one.scores) == one and len(one.scores) > 1
