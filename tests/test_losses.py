"""Chunked losses against dense float64 formulas: values, gradients, masks, memory, meshes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e3jax import devices, mesh
from e3jax.distill import losses, terms
from e3jax.distill.losses import Objective, Online, TopK
from e3jax.errors import UserError
from e3jax.models.head import Head

B, T, D, V = 4, 7, 8, 20
MEAN = 1.7  # of the entropy, nats


def problem(seed=0, b=B, t=T):
    """Hidden states and heads of student and teacher, targets, and a mask; every row differs."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    mask = rng.random((b, t)) < np.linspace(0.3, 0.9, b)[:, None]
    mask[:, 0] = True
    return {
        "h": normal(b, t, D),
        "head": normal(V, D),
        "targets": rng.integers(0, V, (b, t)).astype(np.int32),
        "mask": mask,
        "h_t": normal(b, t, D),
        "head_t": normal(V, D),
    }


def top_k(x, k, temperature, dtype=np.float32):
    """The stored teacher of a problem, in numpy float64."""
    z = np.einsum("btd,vd->btv", x["h_t"].astype(np.float64), x["head_t"]) / temperature
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    ids = np.argsort(-logp, axis=-1, kind="stable")[..., :k].astype(np.int32)
    entropy = -(np.exp(logp) * logp).sum(-1).astype(np.float32)
    return TopK(ids, np.take_along_axis(logp, ids, -1).astype(dtype), entropy)


def teacher_of(x, o, k):
    if k is None:
        return Online(jnp.asarray(x["h_t"]), jnp.asarray(x["head_t"]))
    return jax.tree.map(jnp.asarray, top_k(x, k, o.temperature)) if k else None


@functools.partial(jax.jit, static_argnames="o")
def chunked(h, head, x, teacher, o):
    """(Sums, d loss / d h, d loss / d head)."""

    def loss(h, head):
        return losses.token_sums(h, head, x["targets"], x["mask"], teacher, o, MEAN)

    (_, sums), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(h, head)
    return sums, *grads


def dense(x, o, k):
    """The same by the textbook on whole probability tables in float64; k None: online teacher."""

    def divergence(p, q):
        if o.divergence == "reverse_kl":
            p, q = q, p
        if o.divergence == "skew_kl":
            q = o.skew * p + (1 - o.skew) * q
        return jnp.sum(p * jnp.log(p / q), -1)

    def loss(h, head):
        z_q, z_p = h @ head.T, x["h_t"].astype(np.float64) @ x["head_t"].T
        nll = -jnp.log(jnp.take_along_axis(softmax(z_q), x["targets"][..., None], -1))[..., 0]
        if k == 0:
            return jnp.sum(x["mask"] * nll), {"weight": x["mask"].sum(1), "nll": x["mask"] * nll}
        p, q = softmax(z_p / o.temperature), softmax(z_q / o.temperature)
        h_p, h_q = -jnp.sum(p * jnp.log(p), -1), -jnp.sum(q * jnp.log(q), -1)
        if k is None or k == V:
            div, captured = divergence(p, q), jnp.ones_like(nll)
        else:
            ids = jnp.argsort(-p, axis=-1)[..., :k]
            p, q = jnp.take_along_axis(p, ids, -1), jnp.take_along_axis(q, ids, -1)
            captured = p.sum(-1)
            rest = lambda y: jnp.concatenate([y, 1 - y.sum(-1, keepdims=True)], -1)
            if o.tail == "bucket":
                div = divergence(rest(p), rest(q))
            else:
                p = p / p.sum(-1, keepdims=True) if o.tail == "renormalise" else p
                div = jnp.sum(p * jnp.log(p / q), -1)
        entropy = {"teacher": h_p, "student": h_q, "joint": (h_p + h_p * h_q / np.log(V)) / 2}
        w = jnp.ones_like(nll)
        if o.weight != "uniform":
            w = jnp.clip((entropy[o.weight] / MEAN) ** o.weight_power, *o.weight_clip)
        w = jax.lax.stop_gradient(w) * x["mask"]
        token = (1 - o.ce) * o.temperature**2 * div + o.ce * nll
        found = {"weight": w, "nll": x["mask"] * nll, "entropy": x["mask"] * h_p}
        return jnp.sum(w * token), {**found, "captured": x["mask"] * captured}

    with jax.enable_x64(True):
        h, head = x["h"].astype(np.float64), x["head"].astype(np.float64)
        (total, sums), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(h, head)
        return (
            float(total),
            {n: float(jnp.sum(v)) for n, v in sums.items()},
            *map(np.asarray, grads),
        )


def softmax(z):
    e = jnp.exp(z)
    return e / e.sum(-1, keepdims=True)


CASES = {
    "ce": (Objective(), 0),
    "forward": (Objective(), None),
    "forward-hot": (Objective(temperature=2.0, weight="teacher"), None),
    "reverse": (Objective(divergence="reverse_kl", weight="student", weight_power=0.5), None),
    "skew": (Objective(divergence="skew_kl", weight="joint", weight_clip=(0.7, 1.1)), None),
    "mixed-ce": (Objective(ce=0.3, temperature=1.5, weight="joint", weight_power=2.0), None),
    "bucket": (Objective(weight="teacher", ce=0.2), 5),
    "bucket-reverse-hot": (Objective(divergence="reverse_kl", temperature=2.0), 5),
    "bucket-skew": (Objective(divergence="skew_kl", weight="student"), 5),
    "renormalise": (Objective(tail="renormalise", temperature=1.5), 5),
    "drop": (Objective(tail="drop", weight="joint"), 5),
    "bucket-all": (Objective(temperature=2.0), V),
    "bucket-all-reverse": (Objective(divergence="reverse_kl"), V),
    "renormalise-all": (Objective(tail="renormalise"), V),
    "drop-all": (Objective(tail="drop"), V),
}


@pytest.mark.cases(4)
@pytest.mark.parametrize("case", CASES)
def test_chunked_equals_dense(case):
    o, k = CASES[case]
    x = problem()
    total, sums, d_h, d_head = dense(x, o, k)
    o = dataclasses.replace(o, chunk=3 * B)  # three positions at a time: does not divide seven
    found, g_h, g_head = chunked(x["h"], x["head"], x, teacher_of(x, o, k), o)
    np.testing.assert_allclose(jnp.sum(found.loss), total, rtol=2e-5)
    for name, value in sums.items():
        np.testing.assert_allclose(jnp.sum(getattr(found, name)), value, rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(g_h, d_h, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(g_head, d_head, rtol=2e-4, atol=5e-5)
    np.testing.assert_array_equal(np.asarray(g_h)[~x["mask"]], 0.0)
    np.testing.assert_array_equal(found.tokens, x["mask"].sum(1))


@pytest.mark.parametrize("sums", [terms.one_pass, terms.online, terms.two_passes])
@pytest.mark.parametrize("sample", [2, 1024])
@pytest.mark.parametrize("size,offset", [(1, 0), (10, 0), (30, 0), (3, 1000), (3, -1000)])
def test_comparison_of_logits(sums, sample, size, offset, monkeypatch):
    """In either number of passes what float64 says, wherever the greatest logit lies (of 30 it is
    far above the first two), and no more than rounding from a KL of 0."""
    monkeypatch.setattr(terms, "SAMPLE", sample)
    rng = np.random.default_rng(0)
    z_q, z_p = (rng.normal(size=(2, 9, 200)) * size + offset).astype(np.float32)
    z_p[0], z_p[1, [3, 7]] = z_q[0], 5 * size + offset  # equal logits; two that are greatest
    z_q[1, [3, 8]] = 5 * size + offset
    targets = rng.integers(0, 200, 9).astype(np.int32)
    found, normalisers = jax.jit(lambda *x: sums(*x))(z_q, z_p, targets)
    wide_q, wide_p = z_q.astype(np.float64), z_p.astype(np.float64)
    lse_q, lse_p = (np.logaddexp.reduce(z, -1) for z in (wide_q, wide_p))
    logq, logp = wide_q - lse_q[:, None], wide_p - lse_p[:, None]
    kl, entropy = np.sum(np.exp(logp) * (logp - logq), -1), -np.sum(np.exp(logp) * logp, -1)
    above = max(np.max(z.max(-1) - z[:, :sample].max(-1)) for z in (z_q, z_p))
    near = {"rtol": 1e-5, "atol": 1e-6 * (size + (above if above < terms.NEAR else 0))}
    np.testing.assert_allclose(found.kl, kl, **near)
    np.testing.assert_allclose(found.entropy, entropy, **near)
    np.testing.assert_allclose(found.nll, -logq[np.arange(9), targets], **near)
    np.testing.assert_allclose(normalisers, (lse_q, lse_p), rtol=1e-6)
    assert found.kl[0] == 0
    agree = z_q.argmax(-1) == z_p.argmax(-1)
    assert agree[:2].all()
    np.testing.assert_array_equal(found.agree, agree)


@pytest.mark.parametrize("offset", [0, 100])
def test_comparison_by_kernel(hopper_kernels, offset):
    """On a vocabulary that is no multiple of what the kernel reads at a time; of an offset of 100
    the greatest logits are far above the first, and all is done again without it."""
    rng = np.random.default_rng(0)
    z_q, z_p = rng.normal(size=(2, 2, 3, 19 * 128)).astype(np.float32) * 3
    z_p[0, 0] = z_q[0, 0]
    z_q[1, :, 2000] += offset
    targets = rng.integers(0, 19 * 128, (2, 3)).astype(np.int32)
    found = jax.jit(lambda *x: terms.one_pass(*x))(z_q, z_p, targets)
    wanted = terms.two_passes(z_q, z_p, targets)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert found[0].kl[0, 0] == 0


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 4, 1)])
def test_the_kernel_on_a_mesh(hopper_kernels, monkeypatch, shape):
    """The search's loss, its gradient in the hidden states and its sums, head and rows sharded."""
    monkeypatch.setattr(devices, "platform", lambda: "gpu")
    rng, o = np.random.default_rng(0), Objective(chunk=16)
    x = problem(b=4) | {n: rng.normal(size=(256, D)).astype(np.float32) for n in ("head", "head_t")}
    total, _, *expected = dense(x, o, None)
    count = math.prod(shape)
    with jax.set_mesh(mesh.make_mesh(*shape, devices=jax.devices()[:count])):
        rows = mesh.shard_batch({n: x[n] for n in ("h", "targets", "mask", "h_t")})
        place = mesh.sharding(("vocab", "embed"))
        head, head_t = (jax.device_put(x[n], place) for n in ("head", "head_t"))
        sums, *found = chunked(rows["h"], head, rows, Online(rows["h_t"], head_t), o)
    np.testing.assert_allclose(np.sum(sums.loss), total, rtol=1e-4)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_any_chunk_size_gives_the_same():
    x = problem()
    results = []
    for chunk in (1, 2 * B, 3 * B + 1, 1000):
        o = Objective(weight="teacher", ce=0.1, chunk=chunk)
        results.append(chunked(x["h"], x["head"], x, teacher_of(x, o, None), o))
    for other in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), other, results[0]
        )


def test_sums_are_those_of_each_row():
    x, o = problem(), Objective(weight="teacher", chunk=5)
    both = chunked(x["h"], x["head"], x, teacher_of(x, o, None), o)[0]
    for b in range(B):
        row = {n: v[b : b + 1] if n not in ("head", "head_t") else v for n, v in x.items()}
        alone = chunked(row["h"], x["head"], row, teacher_of(row, o, None), o)[0]
        of_row = jax.tree.map(lambda a, b=b: a[b : b + 1], both)
        jax.tree.map(lambda a, s: np.testing.assert_allclose(a, s, rtol=1e-5), of_row, alone)


def test_a_student_equal_to_its_teacher():
    x, o = problem(), Objective(chunk=8)
    sums = chunked(x["h_t"], x["head_t"], x, teacher_of(x, o, None), o)[0]
    np.testing.assert_allclose(sums.kl, 0.0, atol=1e-5)
    np.testing.assert_array_equal(sums.agree, sums.tokens)
    stored = chunked(x["h_t"], x["head_t"], x, teacher_of(x, o, 5), o)[0]
    np.testing.assert_allclose(stored.kl, 0.0, atol=1e-5)
    np.testing.assert_array_equal(stored.agree, sums.tokens)


@pytest.mark.parametrize("k", [0, None, 5])
def test_agreement_counts_equal_arg_maxima(k):
    x, o = problem(), Objective(chunk=8)
    q = np.argmax(x["h"] @ x["head"].T, -1)
    p = x["targets"] if k == 0 else np.argmax(x["h_t"] @ x["head_t"].T, -1)
    p[0], x["targets"][0] = q[0], q[0]  # some of both
    if k != 0:
        x["h_t"][0], x["head_t"] = x["h"][0], x["head"]
        p = np.argmax(x["h_t"] @ x["head_t"].T, -1)
    sums = chunked(x["h"], x["head"], x, teacher_of(x, o, k), o)[0]
    np.testing.assert_array_equal(sums.agree, (x["mask"] & (p == q)).sum(1))


@pytest.mark.parametrize("k", [0, None, 5])
def test_nothing_to_learn_is_zero_and_finite(k):
    x, o = problem(), Objective(weight="joint", temperature=2.0, chunk=8)
    x["mask"] = np.zeros_like(x["mask"])
    found = chunked(x["h"], x["head"], x, teacher_of(x, o, k), o)
    jax.tree.map(lambda v: np.testing.assert_array_equal(v, 0.0), found)


def test_unequal_parts_add_up_to_the_whole():
    x, o = problem(), Objective(weight="teacher", ce=0.1, chunk=8)
    whole = chunked(x["h"], x["head"], x, teacher_of(x, o, None), o)
    assert whole[0].tokens[0] < whole[0].tokens[-1]
    parts = []
    for rows in (slice(0, 1), slice(1, B)):
        part = {n: v[rows] if n not in ("head", "head_t") else v for n, v in x.items()}
        parts.append(chunked(part["h"], x["head"], part, teacher_of(part, o, None), o))
    grads = [np.asarray(p[2], np.float64) for p in parts]
    weights = [float(np.sum(p[0].weight)) for p in parts]
    exact = np.asarray(whole[2]) / np.sum(whole[0].weight)
    np.testing.assert_allclose(sum(grads) / sum(weights), exact, atol=1e-6)
    means = sum(g / w for g, w in zip(grads, weights, strict=True)) / 2
    assert np.linalg.norm(means - exact) > 0.05 * np.linalg.norm(exact)  # the mistake is visible


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "skew_kl"])
def test_stored_in_float16_more_than_all_the_mass(divergence):
    """Rounded log-probabilities may add up to more than 1; a sure teacher to exactly 1."""
    x, o = problem(), Objective(divergence=divergence, chunk=8)
    x["h_t"] *= 10
    stored = top_k(x, 5, 1.0, np.float16)
    stored = stored.replace(logp=np.minimum(stored.logp + np.float16(1e-3), 0))
    assert np.exp(stored.logp.astype(np.float64)).sum(-1).max() > 1
    sums, g_h, g_head = chunked(x["h"], x["head"], x, jax.tree.map(jnp.asarray, stored), o)
    assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves((sums, g_h, g_head)))
    assert np.all(sums.captured <= sums.tokens)
    exact = chunked(x["h"], x["head"], x, teacher_of(x, o, 5), o)[0]
    np.testing.assert_allclose(jnp.sum(sums.loss), jnp.sum(exact.loss), rtol=0.02)


def test_a_float16_cache_of_every_token_is_the_online_teacher():
    x, o = problem(), Objective(weight="teacher", temperature=2.0, chunk=8)
    online = chunked(x["h"], x["head"], x, teacher_of(x, o, None), o)
    stored = jax.tree.map(jnp.asarray, top_k(x, V, 2.0, np.float16))
    cached = chunked(x["h"], x["head"], x, stored, o)
    np.testing.assert_allclose(cached[0].loss, online[0].loss, rtol=2e-3)
    np.testing.assert_allclose(cached[0].weight, online[0].weight, rtol=1e-5)
    for ours, theirs in zip(cached[1:], online[1:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3 * np.abs(theirs).max())


@pytest.mark.parametrize("tail", ["drop", "renormalise"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "skew_kl"])
def test_tails_without_a_probability_are_refused(tail, divergence):
    x, o = problem(), Objective(divergence=divergence, tail=tail)
    with pytest.raises(UserError, match=r"distill\.tail=bucket"):
        chunked(x["h"], x["head"], x, teacher_of(x, o, 5), o)


def test_teacher_top_k():
    x = problem()
    for temperature, chunk in ((1.0, 9), (2.0, 1000)):
        ids, logp, entropy, normaliser = losses.teacher_topk(
            x["h_t"], x["head_t"], 5, temperature, chunk
        )
        known = top_k(x, 5, temperature)
        np.testing.assert_array_equal(ids, known.ids)
        np.testing.assert_allclose(logp, known.logp, atol=1e-5)
        np.testing.assert_allclose(entropy, known.entropy, atol=1e-5)
        z = x["h_t"] @ x["head_t"].T / temperature
        np.testing.assert_allclose(normaliser, np.log(np.exp(z).sum(-1)), atol=1e-5)


@pytest.mark.parametrize("facts", [{"cap": 2.0}, {"scale": 0.3}, {"scale": 2.5, "cap": 1.5}])
@pytest.mark.parametrize("taught", [False, True])
def test_heads_that_scale_and_cap(facts, taught):
    """Of student and teacher, against jax.grad of a loss of whole logits in float32."""
    x, o = problem(), Objective(ce=0.3 if taught else 0.0, chunk=9)
    of_teacher = {"scale": 0.7, "cap": 2.5}

    def logp(h, matrix, scale=1.0, cap=None):
        z = jnp.matmul(h, matrix.T, precision="highest") * scale
        return jax.nn.log_softmax(z if cap is None else cap * jnp.tanh(z / cap))

    log_p = logp(x["h_t"], x["head_t"], **of_teacher)

    def whole(h, matrix):
        log_q = logp(h, matrix, **facts)
        nll = -jnp.take_along_axis(log_q, x["targets"][..., None], -1)[..., 0]
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
        return jnp.sum(x["mask"] * ((1 - o.ce) * kl + o.ce * nll if taught else nll)), kl

    want, grads = jax.value_and_grad(whole, (0, 1), has_aux=True)(x["h"], x["head"])
    teacher = Online(x["h_t"], Head(x["head_t"], **of_teacher)) if taught else None
    sums, d_h, d_head = chunked(x["h"], Head(x["head"], **facts), x, teacher, o)
    np.testing.assert_allclose(jnp.sum(sums.loss), want[0], rtol=1e-5)
    for found, exact in zip((d_h, d_head.matrix), grads, strict=True):
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    heads = Head(x["head"], **facts), Head(x["head_t"], **of_teacher)
    each = losses.each_token(x["h"], heads[0], x["h_t"], heads[1], x["targets"], 9)
    np.testing.assert_allclose(each.kl, want[1], atol=1e-5)
    ids, top, _, _ = losses.teacher_topk(x["h_t"], heads[1], 3, 1.0, 9)
    np.testing.assert_allclose(top, jnp.take_along_axis(log_p, ids, -1), atol=1e-5)


def sizes(jaxpr):
    """The number of elements of everything a jaxpr computes, inner jaxprs included."""
    for eqn in jaxpr.eqns:
        yield from (int(np.prod(v.aval.shape)) for v in eqn.outvars)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


@pytest.mark.parametrize("k", [0, None, 3])
def test_nothing_of_size_tokens_by_vocabulary_is_held(k):
    rows, time = 2, 64
    x = problem(b=rows, t=time)

    def largest(chunk):
        o = Objective(weight="joint", ce=0.1, temperature=2.0, chunk=chunk)
        args = (x["h"], x["head"], x, teacher_of(x, o, k))
        return max(sizes(jax.make_jaxpr(functools.partial(chunked, o=o))(*args).jaxpr))

    assert largest(16) < rows * time * V / 2  # hidden states are 0.4 of it
    assert largest(rows * time) >= rows * time * V


def test_gradient_of_the_head_does_not_drift_over_chunks():
    """512 chunks in bfloat16: the head's gradient adds up in float32, whatever the head is."""
    time = 512
    x = problem(b=1, t=time)
    x["mask"] = np.ones_like(x["mask"])
    half = {n: jnp.asarray(x[n], jnp.bfloat16) for n in ("h", "head", "h_t", "head_t")}
    full = {n: v.astype(jnp.float32) for n, v in half.items()}
    o = Objective(chunk=1)
    exact = chunked(full["h"], full["head"], x, Online(full["h_t"], full["head_t"]), o)[2]

    def error(head):
        found = chunked(half["h"], head, x, Online(half["h_t"], half["head_t"]), o)[2]
        return jnp.linalg.norm(found.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)

    assert error(full["head"]) < 5e-3
    assert error(half["head"]) < 6e-3  # its sum rounded once


@pytest.mark.cases(2)
@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 4, 1)])
@pytest.mark.parametrize("k", [0, None, 5])
def test_sharded_equals_unsharded(shape, k):
    x, o = problem(b=8), Objective(weight="joint", ce=0.1, temperature=2.0, chunk=24)
    expected = chunked(x["h"], x["head"], x, teacher_of(x, o, k), o)
    known = top_k(x, 5, 2.0)
    with jax.set_mesh(mesh.make_mesh(*shape)):
        rows = mesh.shard_batch({n: x[n] for n in ("h", "targets", "mask", "h_t")})
        place = mesh.sharding(("vocab", "embed"))
        head, head_t = (jax.device_put(x[n], place) for n in ("head", "head_t"))
        teacher = {0: None, None: Online(rows["h_t"], head_t)}.get(k, mesh.shard_batch(known))
        found = chunked(rows["h"], head, rows, teacher, o)
        assert found[1].sharding.spec[0] == mesh.BATCH and found[2].sharding == place
        if k == 5:
            top = jax.jit(losses.teacher_topk, static_argnums=(2, 3, 4))(
                rows["h_t"], head_t, 5, 2.0, 24
            )
            np.testing.assert_array_equal(top[0], known.ids)
            np.testing.assert_allclose(top[1], known.logp, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
    )
