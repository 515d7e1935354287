"""Stage 2's step: the same on every mesh and for every split, exact about what is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e3jax import mesh
from e3jax.distill import distill
from e3jax.models import decoder
from e3jax.training.optim import make_optimizer
from training_tiny import (
    CFG,
    KEEP,
    STUDENT,
    assert_bitwise,
    assert_close,
    dense_params,
    make_student,
    random_batch,
    recipe,
    run_steps,
    set_mesh,
    written_out,
)


def log_probs(params, batch, cfg):
    h = decoder.hidden(params, batch, cfg, dtype=jnp.float32, remat="none")
    return jax.nn.log_softmax(decoder.logits(params, h, cfg))


def dense_loss_sums(params, teacher, batch, mean_entropy=2.0):
    """Sum of w KL(p || q) over loss tokens and sum of w, written out over the whole vocabulary."""
    logp, logq = log_probs(teacher, batch, CFG), log_probs(params, batch, STUDENT)
    p = jnp.exp(logp)
    weight = jnp.clip(-jnp.sum(p * logp, -1) / mean_entropy, 0.2, 5.0) * batch.mask
    return jnp.sum(weight * jnp.sum(p * (logp - logq), -1)), jnp.sum(weight)


def rows(batch, index):
    return jax.tree.map(lambda x: x[index], batch)


@pytest.fixture(scope="module")
def single():
    """Three steps on one device: student, metrics of each step."""
    with set_mesh():
        state, step, teacher = make_student()
        state, record = run_steps(state, step, teacher, 0, 3)
        return jax.device_get(state), record


def first_gradient(spec, batch):
    """The gradient of the first step, recovered from Adam's first moment: m = (1 - b1) g."""
    with set_mesh():
        state, step, teacher = make_student(spec)
        state, out = step(state, teacher, mesh.shard_batch(batch), None)
        moment = jax.device_get(state.opt_state[1][0].mu)
    clip = min(1.0, spec.optimizer.clip / float(out["grad_norm"]))
    return jax.tree.map(lambda m: m / (1 - spec.optimizer.b1) / clip, moment)


def test_loss_and_gradient_are_those_of_the_dense_formula():
    batch = random_batch(0)
    teacher = dense_params()
    student = decoder.take_layers(teacher, CFG, KEEP)

    def loss(params):
        total, weight = dense_loss_sums(params, teacher, batch)
        return total / weight

    truth, gradient = jax.jit(jax.value_and_grad(loss))(student)
    with set_mesh():
        state, step, params = make_student()
        _, out = step(state, params, mesh.shard_batch(batch), None)
    assert float(truth) > 0.05
    np.testing.assert_allclose(float(out["loss"]), float(truth), rtol=1e-5)
    assert_close(first_gradient(recipe(), batch), gradient, atol=2e-6)


def test_micro_batches_of_unequal_token_counts_add_up_to_the_batch():
    batch = random_batch(1)
    counts = batch.mask.sum(1)
    assert counts.max() > 2 * counts.min(), "the test needs rows of unequal counts"
    whole = first_gradient(recipe(), batch)
    split = first_gradient(recipe(microbatch=2), batch)
    assert_close(split, whole, atol=1e-6)


@pytest.mark.slow
def test_micro_batches_of_one_row(one_device):
    """A reshape of one row must not forget over which axes rows are spread."""
    spec = recipe(microbatch=1)
    state, step, teacher = make_student(spec)
    _, found = run_steps(state, step, teacher, 0, 1)
    state, step, teacher = make_student(recipe(microbatch=None))
    _, whole = run_steps(state, step, teacher, 0, 1)
    assert found[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-5)
    assert found[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_the_mean_of_micro_batch_means_would_be_another_gradient():
    """What the test above would not notice if the rows were too alike."""
    batch = random_batch(1)
    teacher = dense_params()
    student = decoder.take_layers(teacher, CFG, KEEP)

    @jax.jit
    @jax.grad
    def of_means(params):
        parts = [dense_loss_sums(params, teacher, rows(batch, slice(i, None, 4))) for i in range(4)]
        return sum(total / weight for total, weight in parts) / 4

    whole = first_gradient(recipe(), batch)
    gap = jax.tree.map(lambda a, b: np.abs(a - b).max(), of_means(student), whole)
    assert max(jax.tree.leaves(gap)) > 1e-3


@pytest.mark.slow
def test_eight_devices_give_the_steps_of_one(single):
    """Float32 sums in another order: metrics to 1e-4 relative, weights to 1e-5 after three steps
    at a learning rate of 1e-2. test_sharded.py takes a step on each mesh."""
    want, want_record = single
    with set_mesh(2, 2, 2):
        state, step, teacher = make_student(recipe(microbatch=4))
        assert len(state.params["layers"]["q"].sharding.device_set) == 8
        state, record = run_steps(state, step, teacher, 0, 3)
    for ours, theirs in zip(record, want_record, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert_close(state.params, want.params, atol=1e-5)


def test_a_step_trains(single):
    _, record = single
    with set_mesh():
        state, step, teacher = make_student()
        batch = mesh.shard_batch(random_batch(0))
        seen = []
        for _ in range(6):
            state, out = step(state, teacher, batch, None)
            seen.append(float(out["loss"]))
    assert seen[-1] < 0.7 * seen[0]
    assert record[0]["loss"] == pytest.approx(seen[0], rel=1e-5)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts():
    """Not the weights, not the moments, not the schedule: the next step is as if it never was."""
    batch = mesh.shard_batch(random_batch(0))
    with set_mesh():
        state, step, teacher = make_student()
        state, _ = step(state, teacher, batch, None)
        before = jax.device_get(state)
        broken = {**teacher, "final_norm": teacher["final_norm"].at[0].set(jnp.nan)}
        state, out = step(state, broken, batch, None)
        after = jax.device_get(state)
        state, fine = step(state, teacher, batch, None)
        went_on = jax.device_get(state)

        state, step, teacher = make_student()
        for _ in range(2):
            state, never_broken = step(state, teacher, batch, None)

    assert float(out["skipped"]) == 1 and not np.isfinite(float(out["loss"]))
    assert (int(after.step), int(after.skipped)) == (2, 1)
    assert_bitwise((after.params, after.opt_state), (before.params, before.opt_state))
    assert float(fine["skipped"]) == 0 and float(fine["loss"]) == float(never_broken["loss"])
    assert_bitwise(
        (went_on.params, went_on.opt_state), jax.device_get((state.params, state.opt_state))
    )


def test_the_teacher_gets_no_gradient_and_master_weights_are_float32(one_device):
    state, step, teacher = make_student()
    stored = jax.tree.map(lambda w: w.astype(jnp.bfloat16), teacher)
    frozen = jax.device_get(stored)
    state, _ = run_steps(state, step, stored, 0, 2)
    assert_bitwise(jax.device_get(stored), frozen)
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}


def test_mean_teacher_entropy_is_the_average_over_loss_tokens(one_device):
    teacher = dense_params()
    batches = [random_batch(i, rows=4) for i in range(3)]
    total = count = 0.0
    for batch in batches:
        logp = np.asarray(log_probs(teacher, batch, CFG), np.float64)
        total += (-(np.exp(logp) * logp).sum(-1) * batch.mask).sum()
        count += batch.mask.sum()
    found = distill.mean_teacher_entropy(
        teacher, CFG, batches, temperature=1.0, dtype=jnp.float32, chunk=32
    )
    assert found == pytest.approx(total / count, rel=1e-5)
    assert 0.5 < found < np.log(CFG.vocab_size)


def test_no_step_compiles_after_the_first(one_device):
    state, step, teacher = make_student()
    state, _ = run_steps(state, step, teacher, 0, 1)
    compiled = step._cache_size()
    run_steps(state, step, teacher, 1, 4)
    assert step._cache_size() == compiled


# ---------------------------------------------------------------- the layers' residual streams


def hidden_gap(params, teacher, batch, keep=KEEP):
    """Sum over loss tokens of the layers' term."""
    return written_out(params, teacher, CFG, keep, batch)[1] * jnp.sum(batch.mask)


@pytest.mark.slow
@pytest.mark.parametrize("micro", [None, 2])
def test_the_layers_term_is_that_of_the_formula(micro):
    batch, teacher = random_batch(0), dense_params()
    student = decoder.take_layers(teacher, CFG, KEEP)

    def loss(params):
        total, weight = dense_loss_sums(params, teacher, batch)
        return (total + 0.7 * hidden_gap(params, teacher, batch)) / weight

    want = jax.grad(loss)(student)
    spec = recipe(hidden=0.7, microbatch=micro)
    found = first_gradient(spec, batch)
    assert_close(found, want, atol=2e-5)
    with set_mesh():
        state, step, placed = make_student(spec)
        _, out = step(state, placed, mesh.shard_batch(batch), None)
    gap = hidden_gap(student, teacher, batch) / jnp.sum(batch.mask)
    assert float(out["hidden"]) == pytest.approx(float(gap), rel=1e-4) and gap > 0.01
    plain = first_gradient(recipe(), batch)
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), found, plain)
    assert max(jax.tree.leaves(apart)) > 1e-3


@pytest.mark.slow
def test_the_layers_term_on_eight_devices():
    spec, batch = recipe(hidden=1.0), random_batch(0)
    results = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        with set_mesh(*shape):
            state, step, teacher = make_student(spec)
            state, out = step(state, teacher, mesh.shard_batch(batch), None)
            results.append((jax.device_get(state.params), {k: float(v) for k, v in out.items()}))
    (one, wanted), (eight, found) = results
    assert found == pytest.approx(wanted, rel=1e-3)
    assert_close(eight, one, atol=1e-5)


@pytest.mark.slow
def test_a_student_of_all_layers_is_at_no_distance():
    keep = range(CFG.num_layers)
    assert distill.ends(keep, CFG.num_layers).tolist() == list(keep)
    assert distill.ends((1, 3), 6).tolist() == [2, 5]
    teacher, batch = dense_params(), random_batch(0)
    optimizer = make_optimizer(recipe().optimizer, 3)
    step = distill.make_train_step(
        CFG, recipe(hidden=1.0), optimizer, teacher_cfg=CFG, keep=keep, dtype=jnp.float32,
        remat="layer",
    )  # fmt: skip
    _, out = step(distill.init_state(teacher, optimizer, 2.0), teacher, batch, None)
    assert float(out["hidden"]) == 0.0 and abs(float(out["kl"])) < 1e-5


@pytest.mark.parametrize("shape", [(1, 1, 1), pytest.param((1, 4, 2), marks=pytest.mark.slow)])
def test_each_row_has_layers_of_its_own(shape):
    """Their term is the sum of that of one student a row, and so is its gradient."""
    masks = ((0, 2, 3), (1, 2), (0, 1, 2, 3), (3,)) * 2
    batch, teacher = random_batch(0), dense_params()
    own = jax.tree.map(lambda w: w * 1.1, teacher)
    gates = np.array([np.isin(range(4), keep) for keep in masks], np.float32)
    spec = recipe(hidden=1e6, divergence="reverse_kl", weight="uniform")  # the other term is noise

    def term(params):
        gaps = [
            hidden_gap(decoder.take_layers(params, CFG, keep), teacher, rows(batch, [b]), keep)
            for b, keep in enumerate(masks)
        ]
        return sum(gaps) / jnp.sum(batch.mask)

    with set_mesh(*shape):
        optimizer, placed = make_optimizer(spec.optimizer, spec.steps), dense_params()
        step = distill.make_train_step(
            CFG,
            spec,
            optimizer,
            teacher_cfg=CFG,
            gates=lambda _, count: mesh.place(jnp.asarray(gates), ("batch", None)),
            dtype=jnp.float32,
            remat="layer",
        )
        state = distill.init_state(jax.tree.map(lambda w: w * 1.1, placed), optimizer, 2.0)
        state, out = step(state, placed, mesh.shard_batch(batch), None)
        moment = jax.device_get(state.opt_state[1][0].mu)
    want, gradient = jax.value_and_grad(term)(own)
    assert float(out["hidden"]) == pytest.approx(float(want), rel=1e-4)
    scale = (1 - spec.optimizer.b1) * min(1.0, spec.optimizer.clip / float(out["grad_norm"]))
    found = jax.tree.map(lambda m: m / scale / 1e6, moment)
    assert_close(found, gradient, atol=2e-4)


def test_the_layers_term_needs_the_teachers_layers():
    for teacher in ("cache", "none"):
        with pytest.raises(ValueError, match="needs the teacher's layers"):
            recipe(hidden=1.0, teacher=teacher)
