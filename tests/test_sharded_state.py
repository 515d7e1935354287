"""State on a mesh: what is written, read, restored and drawn is what one device has; and what the
devices send each other."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

from e3jax import mesh
from e3jax.distill import distill
from e3jax.hf import export, load
from e3jax.models import decoder
from e3jax.training.checkpoint import open_checkpoints
from e3jax.training.optim import make_optimizer
from sharded_tiny import MESHES, MODELS, close, everywhere, numbers, placed
from training_tiny import CFG, abstract, assert_bitwise, random_batch, recipe, set_mesh


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An export from one device, of several shards."""
    folder = tmp_path_factory.mktemp("one")
    with set_mesh():
        return write(folder)


def write(folder):
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return export.export_new(
        placed("odd"),
        MODELS["odd"],
        folder / "tokenizer",
        folder / "out",
        card="",
        shard_bytes=30_000,
    )


@everywhere
def test_export_and_load(written, tmp_path, sizes):
    with set_mesh(*sizes):
        found = write(tmp_path)
        params = load.load_params(written)
        specs = decoder.param_specs(MODELS["odd"])
        assert jax.tree.map(lambda w: w.sharding.spec, params) == specs
    files = {path.name: path.read_bytes() for path in written.iterdir()}
    assert {path.name: path.read_bytes() for path in found.iterdir()} == files and len(files) > 4
    assert_bitwise(params, numbers("odd"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of the state of stage 2 from the mesh 4x2."""
    folder = tmp_path_factory.mktemp("saved")
    with set_mesh(1, 4, 2):
        state = start()
        with open_checkpoints(folder, {}) as checkpoints:
            checkpoints.save(3, state)
        return folder, jax.device_get(state)


OPTIMIZER = make_optimizer(recipe().optimizer, 6)


def start():
    return distill.init_state(placed("odd"), OPTIMIZER, 2.0)


@pytest.mark.cases(2)
@pytest.mark.parametrize("sizes", [*MESHES, (1, 1, 1)], ids=str)
def test_restore_onto_another_mesh(saved, sizes):
    """By the abstract state, which is that of a fresh one: so the step compiles once for both."""
    folder, want = saved
    with set_mesh(*sizes):
        wanted = distill.abstract_state(MODELS["odd"], OPTIMIZER)
        jax.tree.map(_same, abstract(start()), wanted)
        with open_checkpoints(folder, {}) as checkpoints:
            step, state = checkpoints.restore(wanted)
        assert step == 3
        for x, like in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
            assert x.sharding == like.sharding
    assert_bitwise(jax.device_get(state), want)


def _same(x, y):
    assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)
    assert x.sharding.spec == y.sharding.spec


@everywhere
def test_init(sizes):
    """The same draws; XLA's erfinv differs in its last bit with the shape of a shard."""
    want = first_params()
    with set_mesh(*sizes):
        found = decoder.init_params(jax.random.key(3), MODELS["odd"])
    close(found, want, rtol=0, atol=1e-8)


@functools.cache
def first_params():
    with set_mesh():
        return jax.device_get(decoder.init_params(jax.random.key(3), MODELS["odd"]))


# ---------------------------------------------------------------- what is sent


def collectives(hlo):
    """(in a loop, operation, dtype, shape) of every array that the devices exchange."""
    inside = True
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            inside = not line.startswith("ENTRY")
        found = re.search(r"= (.*) (all-gather|all-reduce|reduce-scatter|all-to-all)\(", line)
        if found:
            for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", found[1]):
                yield inside, found[2], dtype, tuple(int(n) for n in sizes.split(",") if n)


def test_weights_are_gathered_a_layer_at_a_time_and_the_head_once():
    """FSDP on 4x2, read from the compiled step: two layers of a stack are never together, no loop
    over chunks gathers the head or reduces its gradient, logits go nowhere."""
    cfg = dataclasses.replace(CFG, mlp_width=2 * 23, vocab_size=2 * 89, tied=False, qk_norm=False)
    spec = recipe(batch=8)
    optimizer = make_optimizer(spec.optimizer, spec.steps)
    step = distill.make_train_step(
        cfg, spec, optimizer, teacher_cfg=cfg, dtype=jnp.float32, remat="layer"
    )
    with set_mesh(1, 4, 2):
        params = decoder.init_params(jax.random.key(0), cfg)
        state = distill.init_state(params, optimizer, 2.0)
        args = state, params, mesh.shard_batch(random_batch(0)), None
        sent = list(collectives(step.lower(*args).compile().as_text()))
    gathered = {True: [], False: []}
    for inside, operation, dtype, shape in sent:
        if operation == "all-gather" and dtype == "f32":
            gathered[inside].append(shape)
    size, head = cfg.width, (89, cfg.width)
    layers = {"q": (2, 2, 8, size), "k": (2, 8, size), "o": (size, 2, 2, 8)}
    layers |= {"up": (23, size), "down": (size, 23)}
    assert set(gathered[True]) == set(layers.values())
    assert gathered[False] == [head, head]  # the student's and the teacher's
    by_vocabulary = [(inside, op, shape) for inside, op, _, shape in sent if 89 in shape]
    assert by_vocabulary.count((False, "all-gather", head)) == 2
    rest = [entry for entry in by_vocabulary if entry[1] != "all-gather"]
    assert [entry[:2] for entry in rest] == [(False, "all-reduce")] and set(rest[0][2]) == set(head)


def test_what_the_mesh_does_not_divide_is_said():
    cfg = dataclasses.replace(MODELS["odd"], mlp_width=48)
    with set_mesh(1, 2, 4):
        assert decoder.param_specs(cfg)["layers"]["q"][1:3] == (None, "model")
        lines = decoder.replicated(cfg, "bfloat16")
    assert [line.split(" (")[0] for line in lines] == [
        "mesh.model=4 does not divide vocab=97; replicated over it: embed, head",
        "mesh.model=4 does not divide heads=2; replicated over it: k, k_bias, v, v_bias",
    ]
    held = 2 * 97 * cfg.width * 2 / 2 / 1e9  # two matrices, bfloat16, over data=2
    assert f"{held:.3g} GB a device instead of {held / 4:.3g}" in lines[0]
    three = dataclasses.replace(cfg, num_heads=6, vocab_size=96, qkv_bias=False)
    with set_mesh(1, 2, 4):
        lines = decoder.replicated(three, "bfloat16")
    assert [line.split(" (")[0] for line in lines] == [
        "mesh.model=4 does not divide heads=2; replicated over it: k, v",
        "mesh.model=4 does not divide heads=2, groups=3; replicated over it: o, q",
    ]
    for sizes in [(1, 4, 2), (1, 1, 1)]:
        with set_mesh(*sizes):
            assert not decoder.replicated(MODELS["even"], "float32")
    assert not decoder.replicated(cfg, "float32")
