"""Optimiser, accumulation, loop, record and checkpoints: what both stages share."""

import contextlib
import functools
import json
import logging
import math
import re
import shutil

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e3jax import config, mesh
from e3jax.distill import distill
from e3jax.errors import Diverged, UserError
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.search import search
from e3jax.training import optim
from e3jax.training.checkpoint import Checkpoints, open_checkpoints
from e3jax.training.loop import fit
from e3jax.training.metrics import read_metrics
from training_tiny import (
    CFG,
    STEPS,
    STUDENT,
    abstract,
    assert_bitwise,
    assert_close,
    dense_params,
    make_student,
    random_batch,
    recipe,
    set_mesh,
)

# ---------------------------------------------------------------- optimiser


def test_schedule_rises_linearly_and_falls_by_a_cosine():
    rate = optim.make_schedule(config.Optimizer(lr=2.0, warmup=0.1, final=0.25), 100)
    np.testing.assert_allclose(rate(0), 0.2, rtol=1e-6)
    np.testing.assert_allclose(rate(5), 1.1, rtol=1e-6)
    np.testing.assert_allclose(rate(10), 2.0, rtol=1e-6)
    np.testing.assert_allclose(rate(55), (2.0 + 0.5) / 2, rtol=1e-6)
    np.testing.assert_allclose([rate(100), rate(1000)], 0.5, rtol=1e-6)
    no_warmup = optim.make_schedule(config.Optimizer(lr=2.0, warmup=0.0), 1)
    np.testing.assert_allclose(no_warmup(0), 2.0, rtol=1e-6)


def test_weight_decay_is_for_matrices_by_name():
    """Stacked norms and biases have the rank of a matrix; every leaf of the model is listed."""
    cfg = ModelConfig(
        **{**vars(CFG), "qkv_bias": True, "out_bias": True, "mlp_bias": True, "tied": False}
    )
    mask = optim.decayed(decoder.abstract_params(cfg))
    layers = mask.pop("layers")
    assert mask == {"embed": True, "head": True, "final_norm": False}
    assert {n for n, on in layers.items() if on} == {"q", "k", "v", "o", "gate", "up", "down"}
    assert len(layers) == 18


def test_a_step_is_adamw_after_clipping():
    """Two steps against the published formulas in float64."""
    o = config.Optimizer(lr=0.1, warmup=0.0, final=1.0, weight_decay=0.2, clip=0.5, eps=1e-8)
    params = {"q": jnp.array([1.0, -2.0]), "q_norm": jnp.array([3.0])}
    gradients = [{"q": [3.0, 4.0], "q_norm": [12.0]}, {"q": [0.1, 0.2], "q_norm": [-0.2]}]
    optimizer = optim.make_optimizer(o, 10)
    state = optimizer.init(params)
    w = np.array([1.0, -2.0, 3.0])
    m = v = np.zeros(3)
    for t, gradient in enumerate(gradients, start=1):
        g = np.array(gradient["q"] + gradient["q_norm"])
        norm = np.sqrt((g**2).sum())
        g = g * min(1.0, 0.5 / norm)
        m, v = o.b1 * m + (1 - o.b1) * g, o.b2 * v + (1 - o.b2) * g**2
        adam = (m / (1 - o.b1**t)) / (np.sqrt(v / (1 - o.b2**t)) + o.eps)
        w = w - 0.1 * (adam + 0.2 * np.array([1, 1, 0]) * w)
        grads = jax.tree.map(jnp.asarray, gradient, is_leaf=lambda x: isinstance(x, list))
        params, state, found, finite = optim.update(optimizer, grads, state, params)
        np.testing.assert_allclose(found, norm, rtol=1e-6)
        assert finite
    np.testing.assert_allclose([*params["q"], *params["q_norm"]], w, rtol=1e-5)


@flax.struct.dataclass
class Weighted:
    weight: jax.Array


def test_accumulation_divides_once():
    """loss_b = weight_b * w * x_b: the gradient is the weighted mean of x, for any split."""
    x, weight = jnp.array([1.0, 2.0, 3.0, 40.0]), jnp.array([1.0, 1.0, 1.0, 9.0])

    def sums(w, batch):
        x, weight = batch
        return jnp.sum(weight * w * x), Weighted(weight)

    want = (x * weight).sum() / weight.sum()
    for count in (1, 2, 4):
        gradient, total = optim.accumulate(sums, jnp.float32(2.0), (x, weight), count)
        np.testing.assert_allclose(gradient, want, rtol=1e-6)
        np.testing.assert_allclose(total.weight, weight.sum())
    assert abs(want - x.mean()) > 1


def test_micro_batches_leave_rows_on_their_devices():
    with set_mesh(1, 4, 1):
        x = mesh.shard_batch(np.arange(16.0).reshape(8, 2))
        split = jax.jit(lambda x: optim.split_microbatches(x, 2))(x)
        assert split.shape == (2, 4, 2)
        assert split.sharding.spec[:2] == (None, mesh.BATCH)
        assert sorted(np.asarray(split)[..., 0].ravel()) == list(range(0, 16, 2))
        where = {s.device: set(np.asarray(s.data)[..., 0].ravel()) for s in x.addressable_shards}
        for shard in split.addressable_shards:
            assert set(np.asarray(shard.data)[..., 0].ravel()) == where[shard.device]


def test_a_micro_batch_that_the_devices_cannot_share_is_told():
    with (
        set_mesh(1, 8, 1),
        pytest.raises(UserError, match=r"microbatch=4: cannot be shared evenly .* a multiple of 8"),
    ):
        optim.split_microbatches(mesh.shard_batch(np.zeros((16, 2))), 4)


# ---------------------------------------------------------------- loop, on a toy


def toy_step(state, x):
    """A running hash of the batches seen, so that order and number of steps show."""
    bad = jnp.any(jnp.isnan(x))
    value = jnp.where(bad, state["value"], jnp.sin(3.0 * state["value"] + jnp.sum(x)))
    out = {"loss": value, "tokens": jnp.float32(x.size), "skipped": bad.astype(jnp.float32)}
    return {"value": value, "best": state["best"]}, out


def toy_score(step, state):
    """Changes the state, as the search's held-out score does."""
    state = {**state, "best": jnp.maximum(state["best"], state["value"])}
    return state, {"score": float(state["best"]), "list": [1.0, 2.0]}


def toy_fit(folder, last=12, **changes):
    """fit() of the toy; `last` kills it: the batch of that step raises."""

    def batches(step):
        if step >= last:
            raise KeyboardInterrupt
        return np.full((8, 2), changes.get("poison", {}).get(step, step), np.float32)

    options = {
        "steps": 12,
        "inputs": {"lr": 1.0},
        "checkpoint_every": 4,
        "evaluate": toy_score,
        "evaluate_every": 4,
        **{k: v for k, v in changes.items() if k not in ("poison", "make")},
    }
    step, make = jax.jit(toy_step, donate_argnums=0), changes.get("make", toy_state)
    return fit("toy", step, make, batches, like=abstract(toy_state()), folder=folder, **options)


def toy_state():
    return {"value": mesh.replicate(jnp.float32(0.3)), "best": mesh.replicate(jnp.float32(-1))}


def never():
    raise AssertionError("a state was made")


def lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.cases(4)
@pytest.mark.parametrize("every", [3, 4, 5])
@pytest.mark.parametrize("last", [1, 4, 5, 9, 11])
def test_cut_short_and_begun_again_is_the_same_run(tmp_path, one_device, last, every):
    """State and record, also where a checkpoint falls on an evaluation, before and after one."""
    whole = toy_fit(tmp_path / "whole", evaluate_every=every)
    with pytest.raises(KeyboardInterrupt):
        toy_fit(tmp_path / "cut", last, evaluate_every=every)
    assert_bitwise(toy_fit(tmp_path / "cut", evaluate_every=every), whole)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    scored = [line["step"] for line in read_metrics(tmp_path / "cut") if "score" in line]
    assert scored == [*range(0, 12, every), 12]


def test_a_restart_makes_no_state(tmp_path, one_device):
    """None that would lie beside the one that is read; but where no checkpoint was saved yet."""
    made = []
    for last in (3, 7, 12):
        with contextlib.suppress(KeyboardInterrupt):
            toy_fit(tmp_path, last, make=lambda: made.append(1) or toy_state())
    toy_fit(tmp_path, make=never)
    assert len(made) == 2


def test_the_best_is_kept_wherever_it_was_measured(tmp_path, one_device):
    """Not only where an evaluation falls on a checkpoint's step."""

    def score(step, state):
        return state, {"score": abs(step - 3.0)}

    toy_fit(tmp_path, evaluate=score, evaluate_every=3, checkpoint_every=5, keep=1, best="score")
    steps = tmp_path / "checkpoints" / "steps"
    assert sorted(int(p.name) for p in steps.iterdir()) == [3, 12]


def test_a_finished_run_is_left_as_it_is(tmp_path, one_device):
    whole = toy_fit(tmp_path)
    before = lines(tmp_path), sorted(tmp_path.rglob("*"))
    assert_bitwise(toy_fit(tmp_path, last=0), whole)
    assert (lines(tmp_path), sorted(tmp_path.rglob("*"))) == before


def test_a_kill_between_the_last_score_and_its_checkpoint(tmp_path, one_device, monkeypatch):
    whole = toy_fit(tmp_path / "whole")

    def killed(self, step, state, figures, save=Checkpoints.save):
        if step == 12:
            raise KeyboardInterrupt
        save(self, step, state, figures)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            toy_fit(tmp_path / "cut")
    assert json.loads(lines(tmp_path / "cut")[-1])["step"] == 12
    assert_bitwise(toy_fit(tmp_path / "cut"), whole)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_steps_that_are_not_finite_stop_the_run_at_patience(tmp_path, one_device):
    nan = dict.fromkeys((2, 3, 6, 7, 8), np.nan)
    with pytest.raises(Diverged, match=r"3 steps in a row .* step 8: lower the learning rate"):
        toy_fit(tmp_path / "a", poison=nan, patience=3)
    toy_fit(tmp_path / "b", poison=nan, patience=4)
    skipped = [line["step"] for line in read_metrics(tmp_path / "b") if line.get("skipped")]
    assert skipped == list(nan)


def test_progress_is_plain_lines_of_80_columns(tmp_path, one_device, caplog):
    with caplog.at_level(logging.INFO):
        toy_fit(tmp_path)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("e3jax")]
    assert re.fullmatch(r"toy 12/12  [\d,]+ tok/s  loss -?\d\.\d{4}  0:00 left", told[-3])
    assert re.fullmatch(r"toy 12: score -?\d\.\d{4}", told[-2])
    assert re.fullmatch(r"toy: \d+\.\d % of the time waited for data", told[-1])
    assert max(map(len, told)) <= 80
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def saved(tmp_path, one_device):
    """A folder with checkpoints of steps 1 to 3, of which the last two are kept."""
    with open_checkpoints(tmp_path / "c", {"lr": 1.0, "seed": 0}) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, numbers(step))
    return tmp_path / "c"


def numbers(step):
    return {"x": jnp.arange(5000.0) * step, "n": {"count": jnp.int32(step)}}


def restore(folder):
    with open_checkpoints(folder, {"lr": 1.0, "seed": 0}) as checkpoints:
        return checkpoints.restore(abstract(numbers(0)))


def told(caplog):
    """What this program logged; Orbax leaves tasks behind that complain when they are collected."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("e3jax")]


def torn(path, how):
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if how == "cut" else b"")


@pytest.mark.cases(4)
@pytest.mark.parametrize("how", ["delete", "cut", "empty"])
@pytest.mark.parametrize(
    "what", ["_METADATA", "manifest.ocdbt", "d/*", "ocdbt.process_0/d/*", "**/*"]
)
def test_a_torn_checkpoint_is_told_and_the_one_before_used(saved, caplog, what, how):
    for path in list((saved / "steps" / "3" / "state").glob(what)):
        if path.is_file():
            torn(path, how)
    step, state = restore(saved)
    assert step == 2
    assert_bitwise(state, numbers(2))
    unread, aside = told(caplog)
    assert "step 3 cannot be read: " in unread and "steps [3] are set aside in " in aside
    assert (saved / "torn" / "3").is_dir()  # it may have been whole, and a disk away
    caplog.clear()
    assert restore(saved)[0] == 2
    assert not told(caplog)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_torn_checkpoint_is_never_restored_wrongly(saved):
    """Whichever file is damaged, in whichever way: the right state of step 3, or that of step 2."""
    names = [p.relative_to(saved) for p in (saved / "steps" / "3").rglob("*") if p.is_file()]
    for number, name in enumerate(names):
        copy = saved.parent / f"copy{number}"
        shutil.copytree(saved, copy)
        torn(copy / name, "cut")
        step, state = restore(copy)
        assert_bitwise(state, numbers(step))


def test_where_none_can_be_read_nothing_is_thrown_away(saved):
    for path in saved.rglob("_METADATA"):
        path.unlink()
    before = sorted(saved.rglob("*"))
    with pytest.raises(UserError, match=r"none of its checkpoints \(steps \[3, 2\]\) can be read"):
        restore(saved)
    assert sorted(saved.rglob("*")) == before


def test_another_configuration_is_refused_and_named(saved):
    for inputs in ({"lr": 2.0, "seed": 0}, {"lr": 2.0, "seed": 0, "new": 1}):
        with pytest.raises(UserError, match=r"another configuration:\n  lr: 1.0 -> 2.0"):
            Checkpoints(saved, inputs)
    assert restore(saved)[0] == 3


def test_what_a_killed_save_left_is_ignored(saved):
    """Orbax writes into a folder of another name; one is made here from a whole checkpoint."""
    for left in ("4.orbax-checkpoint-tmp-17", "4.orbax-checkpoint-tmp"):
        shutil.copytree(saved / "steps" / "3", saved / "steps" / left)
    assert restore(saved)[0] == 3
    assert sorted(p.name for p in (saved / "steps").iterdir()) == ["2", "3"]


def test_the_latest_and_the_best_stay(tmp_path, one_device):
    """The least figure, that of the first step, outlives the later ones."""
    figures = [3.0, 1.0, None, math.nan, 5.0, 4.0]
    with open_checkpoints(tmp_path, {}, keep=2, best="kl") as checkpoints:
        for step, kl in enumerate(figures):
            checkpoints.save(step, numbers(step), None if kl is None else {"kl": kl, "x": -kl})
    assert sorted(p.name for p in (tmp_path / "steps").iterdir()) == ["1", "4", "5"]
    with open_checkpoints(tmp_path, {}, keep=2, best="kl") as checkpoints:
        assert checkpoints.restore(abstract(numbers(0)))[0] == 5  # it goes on from the latest


def test_a_failed_background_save_stops_the_run(tmp_path, one_device):
    """The folder becomes a file while the run goes on: the next save raises, or the end does."""

    def replace(number, state):
        if number == 8:
            steps = tmp_path / "checkpoints" / "steps"
            steps.rename(tmp_path / "gone")  # at once: the save of step 8 may still be writing
            steps.write_text("")
        return state, {}

    with pytest.raises(UserError, match="checkpoints: a checkpoint could not be saved: "):
        toy_fit(tmp_path, evaluate=replace)


def test_saving_copies_before_the_step_donates(tmp_path, one_device):
    state = jax.jit(numbers)(jnp.int32(1))
    double = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
    with open_checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(1, state)
        for _ in range(5):
            state = double(state)
    with open_checkpoints(tmp_path, {}) as checkpoints:
        assert_bitwise(checkpoints.restore(abstract(numbers(0)))[1], numbers(1))


# ---------------------------------------------------------------- both stages' states


def make_search():
    spec = config.Search(keep=3, steps=STEPS, batch=8, estimator="mixed")
    step, params = search_step(spec, jax.sharding.get_mesh())
    theta = np.linspace(-1, 1, CFG.num_layers).astype(np.float32)
    state = mesh.replicate(search.init_state(theta, spec, 0))
    like = search.abstract_state(CFG, spec)
    return state, like, lambda state, batch: step(state, params, batch), step


@functools.cache
def search_step(spec, _):
    made = search.make_search_step(CFG, spec, dtype=jnp.float32, remat="none", chunk=32)
    return made, dense_params()


def make_distill():
    # Compiled for this test alone, which counts compilations.
    spec = recipe(patience=STEPS)
    state, step, teacher = make_student(spec)
    like = distill.abstract_state(STUDENT, optim.make_optimizer(spec.optimizer, spec.steps))
    return state, like, lambda state, batch: step(state, teacher, batch, None), step


def stage_fit(folder, make, last=STEPS, again=False):
    state, like, step, jitted = make()
    make_state = never if again else lambda: state

    def batches(number):
        if number >= last:
            raise KeyboardInterrupt
        return random_batch(number)

    options = {"steps": STEPS, "inputs": {}, "checkpoint_every": 3}
    state = fit("stage", step, make_state, batches, like=like, folder=folder, **options)
    return jax.device_get(state), jitted


@pytest.mark.cases(1)
@pytest.mark.parametrize("make", [make_search, make_distill])
def test_six_steps_are_three_and_a_restart_and_three(tmp_path, make):
    """Bitwise on the same device; on other meshes within the rounding of float32 sums."""
    with set_mesh(1, 1, 1):
        want, step = stage_fit(tmp_path / "whole", make)
        for name in ("same", "other"):
            with pytest.raises(KeyboardInterrupt):
                stage_fit(tmp_path / name, make, last=3)
        same, _ = stage_fit(tmp_path / "same", make, again=True)
        assert step._cache_size() == 1, "a step compiled after the first"
    assert int(same.step) == STEPS
    assert_bitwise(same, want)
    with set_mesh(1, 4, 2):
        other, _ = stage_fit(tmp_path / "other", make, again=True)
    assert len(read_metrics(tmp_path / "other")) == STEPS
    assert_close(other, want, atol=2e-4)
