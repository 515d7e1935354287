"""`distill.freeze`: what comes before the cut stays, and is computed once for both models."""

import dataclasses
import functools
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from e3jax import mesh
from e3jax.distill import distill, freezing
from e3jax.evaluate.figures import make_figures
from e3jax.models import decoder
from e3jax.planning import compile, cost
from e3jax.training.optim import make_optimizer
from planning_tiny import MODEL, small_run
from sharded_tiny import MODELS, numbers
from test_pipeline import command, write_job
from test_restart import final_state, start, stderr, stop, write_configuration
from training_tiny import assert_bitwise, assert_close, random_batch, recipe, set_mesh, written_out

KEEP, FROZEN = (0, 1, 3), 1
NAMES = ("even", "odd", "sparse", "odd-norms")  # tied, not tied, two stacks, ropes that differ
HIDDEN = 0.7


@pytest.mark.parametrize(
    "keep, count",
    [((0, 1, 3), 1), ((0, 2, 3), 0), ((1, 2), 0), ((0, 1, 2), 2), ((0, 1, 2, 3, 7, 8), 3)],
)
def test_the_last_layer_before_the_cut_is_trained(keep, count):
    assert freezing.frozen_layers(keep) == count
    assert freezing.frozen_layers(keep, [(0, (4,))]) == 0  # it is not the dense model's any more


@functools.cache
def first_step(name, *sizes):
    """(state before, state after, metrics, dense parameters) of one step."""
    spec, cfg = recipe(hidden=HIDDEN, freeze=True, weight="uniform"), MODELS[name]
    optimizer = make_optimizer(spec.optimizer, spec.steps)
    student = cfg.take_layers(KEEP)
    with set_mesh(*sizes):
        dense = jax.device_put(numbers(name), shardings(decoder.abstract_params(cfg)))
        step = distill.make_train_step(
            student, spec, optimizer, teacher_cfg=cfg, keep=KEEP, frozen=FROZEN,
            dtype=jnp.float32, remat="none",
        )  # fmt: skip
        own = freezing.trained(decoder.take_layers(dense, cfg, KEEP), student, FROZEN)
        state = distill.init_state(own, optimizer, 2.0)
        like = distill.abstract_state(student, optimizer, FROZEN)
        assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, like)
        before = jax.device_get(state)
        after, said = step(state, dense, mesh.shard_batch(random_batch(0)), None)
        joined = freezing.whole(after.params, dense, cfg, FROZEN)
        said = {key: float(value) for key, value in said.items()}
        return before, jax.device_get(after), said, jax.device_get(joined)


def shardings(abstract):
    return jax.tree.map(lambda x: x.sharding, abstract)


def loss_by_the_book(own, name):
    """KL and the layers' term; the frozen parameters are constants."""
    cfg, dense = MODELS[name], jax.tree.map(jnp.asarray, numbers(name))
    params = freezing.whole(own, dense, cfg, FROZEN)
    kl, gap = written_out(params, dense, cfg, KEEP, random_batch(0))
    return kl + HIDDEN * gap, (kl, gap)


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", NAMES)
def test_the_step_is_that_of_the_formula(name):
    before, after, said, joined = first_step(name)
    truth = jax.jit(jax.grad(loss_by_the_book, has_aux=True), static_argnums=1)
    gradient, (kl, gap) = truth(before.params, name)
    assert said["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert said["hidden"] == pytest.approx(float(gap), rel=1e-4) and gap > 0.01
    spec = recipe().optimizer
    clip = min(1.0, spec.clip / said["grad_norm"])
    found = jax.tree.map(lambda m: m / (1 - spec.b1) / clip, after.opt_state[1][0].mu)
    assert_close(found, gradient, atol=2e-5)
    assert "embed" not in after.params
    cfg = MODELS[name]
    assert_bitwise(
        decoder.take_layers(joined, cfg.take_layers(KEEP), range(FROZEN))["embed"],
        numbers(name)["embed"],
    )
    kept = decoder.take_layers(numbers(name), cfg, KEEP)
    for stack, ids in cfg.take_layers(KEEP).stacks.items():
        for at, layer in enumerate(ids):
            ours, theirs = (jax.tree.map(lambda w: w[at], x[stack]) for x in (joined, kept))  # noqa: B023
            same = all(jax.tree.leaves(jax.tree.map(np.array_equal, ours, theirs)))
            assert same == (layer < FROZEN)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_eight_devices_give_the_step_of_one(name):
    one, eight = first_step(name), first_step(name, 2, 2, 2)
    assert_close(eight[3], one[3], atol=2e-5)
    assert eight[2] == pytest.approx(one[2], rel=1e-3, abs=1e-6)


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", NAMES[:2])
def test_held_out_figures_are_those_of_the_whole_student(name):
    cfg, dense = MODELS[name], numbers(name)
    student = cfg.take_layers(KEEP)
    own = freezing.trained(decoder.take_layers(dense, cfg, KEEP), student, FROZEN)
    options = {"dtype": jnp.float32, "chunk": 32}
    batches = [random_batch(1)]
    found = make_figures(cfg, student, frozen=FROZEN, **options)(dense, own, batches)
    whole = freezing.whole(own, dense, cfg, FROZEN)
    wanted = make_figures(cfg, student, **options)(dense, whole, batches)
    assert found.kl == pytest.approx(wanted.kl, rel=1e-5) and found.kl > 0.01
    assert found.perplexity == pytest.approx(wanted.perplexity, rel=1e-5)


def test_it_needs_the_dense_model():
    for teacher in ("cache", "none"):
        with pytest.raises(ValueError, match="freeze=true needs the teacher's layers"):
            recipe(freeze=True, teacher=teacher)


def test_a_plan_counts_what_is_trained(tmp_path):
    """Layers 0 and 1 of three stay, and 0 is frozen."""
    mask = tmp_path / "mask.json"
    mask.write_text(json.dumps({"num_layers": 3, "keep": [0, 1]}))
    run = small_run(freeze=True, mask=str(mask))
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, remat="none"),
        evaluate=dataclasses.replace(run.evaluate, baselines=()),
    )
    layer, head = cost.body_flops(MODEL.take_layers((0,)), 64), cost.head_flops(MODEL)
    assert cost.train_flops(run, MODEL) == pytest.approx(3 * (layer + head) + 3 * layer + head)
    tied = dataclasses.replace(MODEL, tied=True)
    assert cost.train_flops(run, tied) == pytest.approx(2 * (3 * layer) + 3 * head)
    step, arguments = compile.train_inputs(run, MODEL, "float32")
    own = decoder.abstract_params(MODEL.take_layers((1,)))
    assert arguments[0].params == {name: x for name, x in own.items() if name != "embed"}
    state, _ = step.eval_shape(*arguments)
    assert state.params.keys() == {"layers", "final_norm", "head"}
    baselines = dataclasses.replace(run.evaluate, baselines=("shortgpt",))
    assert cost.student_layers(dataclasses.replace(run, evaluate=baselines), MODEL)[1] == 0


@pytest.mark.slow
def test_the_export_has_the_dense_models_first_layers(tmp_path):
    place = write_job(tmp_path)
    mask = place / "mask.json"
    mask.write_text(json.dumps({"num_layers": 4, "keep": list(KEEP)}))
    chosen = ("distill.freeze=true", f"distill.mask={mask}", "export.dtype=float32")
    assert command(place, "distill", *chosen) == 0
    assert command(place, "export", *chosen) == 0
    dense, cut = (
        load_file(place / f"{name}/model.safetensors") for name in ("model", "out/export")
    )
    stay = {n for n in cut if n.startswith(("model.layers.0.", "model.embed_tokens"))}
    for name in cut:
        theirs = name.replace("layers.2.", "layers.3.")
        same = np.array_equal(cut[name], dense[theirs])
        assert same == (name in stay), name


@pytest.mark.slow
def test_killed_it_ends_with_the_same_bits(tmp_path):
    configuration, mask = write_configuration(tmp_path), tmp_path / "mask.json"
    mask.write_text(json.dumps({"num_layers": 4, "keep": list(KEEP)}))

    def begin(out):
        return start(
            configuration, "distill", "distill.freeze=true", f"distill.mask={mask}", f"out={out}"
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = begin(whole)
    assert process.wait(300) == 0, stderr(configuration)
    process = begin(killed)
    record = killed / "distill" / "metrics.jsonl"
    assert stop(configuration, process, record, 25, signal.SIGKILL) == -signal.SIGKILL
    process = begin(killed)
    assert process.wait(300) == 0, stderr(configuration)
    assert "distill: going on from the checkpoint of step" in stderr(configuration)
    assert_bitwise(final_state(killed), final_state(whole))
