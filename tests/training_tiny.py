"""A tiny model, packed windows and a recipe for the tests of both stages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from e3jax import config, mesh
from e3jax.data.batches import gather
from e3jax.data.windows import Windows
from e3jax.distill import distill
from e3jax.job import to_batch
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.training.optim import make_optimizer

CFG = ModelConfig(
    family="qwen3",
    num_layers=4,
    width=32,
    mlp_width=48,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    vocab_size=64,
    max_position=64,
    norm_eps=1e-6,
    tied=True,
    windows=(None,) * 4,
    qk_norm=True,
)
KEEP = (0, 2, 3)
STUDENT = CFG.take_layers(KEEP)
STEPS = 6
T = 16


def recipe(**changes) -> config.Distill:
    # eps: Adam would turn the rounding of a tiny gradient into a step of lr.
    fast = config.Optimizer(lr=1e-2, warmup=0.3, weight_decay=0.1, eps=1e-5)
    fields = {"steps": STEPS, "batch": 8, "optimizer": fast, "chunk": 32, "weight": "teacher"}
    return config.Distill(**fields | {"hidden": 0.0} | changes)


def random_batch(step: int, rows: int = 8) -> decoder.Batch:
    """numpy windows of several documents and padding; rows differ widely in their loss tokens."""
    rng = np.random.default_rng(step)
    ends = rng.integers(2, T + 1, (rows, 2))
    segments = 1 + (np.arange(T) >= ends.min(1)[:, None]).astype(np.int32)
    segments = np.where(np.arange(T) < ends.max(1)[:, None], segments, 0).astype(np.int32)
    windows = Windows(
        tokens=rng.integers(0, CFG.vocab_size, (rows, T)).astype(np.int32),
        segments=segments,
        loss=np.ones((rows, T), bool),
        meta={},
        fingerprint="",
    )
    return to_batch(gather(windows, np.arange(rows)), windows)


def dense_params(cfg: ModelConfig = CFG) -> decoder.Params:
    """Random weights large enough that layers matter and predictions are not uniform."""
    params = decoder.init_params(jax.random.key(0), cfg)
    named = jax.tree_util.tree_map_with_path
    return named(lambda path, w: w if "norm" in str(path[-1]) else w * 10.0, params)


def make_student(spec: config.Distill | None = None):
    """(fresh state, step, teacher params): the student of KEEP under the mesh that is set."""
    step, init, teacher = _student(spec or recipe(), jax.sharding.get_mesh())
    return init(), step, teacher


@functools.cache
def _student(spec: config.Distill, _: jax.sharding.Mesh):
    """Built once for a recipe and a mesh: compiling is most of what these tests cost."""
    optimizer = make_optimizer(spec.optimizer, spec.steps)
    teacher = dense_params()
    student = decoder.take_layers(teacher, CFG, KEEP)
    step = distill.make_train_step(
        STUDENT, spec, optimizer, teacher_cfg=CFG, keep=KEEP, dtype=jnp.float32, remat="none"
    )
    return step, lambda: distill.init_state(student, optimizer, 2.0), teacher


def run_steps(state, step, teacher, first: int, last: int):
    """Steps [first, last) on random batches: the state, and each step's metrics as floats."""
    record = []
    for number in range(first, last):
        state, out = step(state, teacher, mesh.shard_batch(random_batch(number)), None)
        record.append({k: float(v) for k, v in out.items()})
    return state, record


def written_out(params, dense, cfg, keep, batch, teacher=None):
    """KL and the layers' term of layers `keep` of cfg, the student's parameters being `params`, a
    loss token on average: over the whole vocabulary and all layers of both models. teacher: in
    place of the dense parameters, for all but the head."""
    see = lambda before, after: (before, after)
    teacher = dense if teacher is None else teacher
    h, (before, after) = decoder.hidden(teacher, batch, cfg, dtype=jnp.float32, observe=see)
    logp = jax.nn.log_softmax(decoder.logits(dense, h, cfg))
    student = cfg.take_layers(keep)
    h, (_, found) = decoder.hidden(params, batch, student, dtype=jnp.float32, observe=see)
    logq = jax.nn.log_softmax(decoder.logits(params, h, student))
    aims = jnp.stack([*(before[layer] for layer in keep[1:]), after[-1]])
    gaps = jnp.mean(jnp.sum((found - aims) ** 2, -1) / jnp.sum(aims**2, -1), 0)
    kl = jnp.sum(jnp.exp(logp) * (logp - logq), -1)
    tokens = jnp.sum(batch.mask)
    return tuple(jnp.sum(jnp.where(batch.mask, x, 0)) / tokens for x in (kl, gaps))


def set_mesh(replica: int = 1, data: int = 1, model: int = 1):
    """Context manager: a mesh of the first devices."""
    devices = jax.devices()[: replica * data * model]
    return jax.set_mesh(mesh.make_mesh(replica, data, model, devices=devices))


def abstract(state):
    """ShapeDtypeStructs of a state's arrays, with their shardings."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_bitwise(a, b) -> None:
    """Two trees of arrays are the same to the last bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)


def assert_close(a, b, *, atol: float) -> None:
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=atol, err_msg=name)
