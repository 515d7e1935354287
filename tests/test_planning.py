"""Plans: chips and topologies, operations against XLA's count, memory, ranking, configurations."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from e3jax import cli, config, configure, devices, job, mesh
from e3jax.errors import UserError
from e3jax.hf import families, folders, hub
from e3jax.models import attention, decoder, rope
from e3jax.planning import chips, compile, cost, plan, ranking
from planning_tiny import MODEL, small_run
from training_tiny import CFG

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


# ---------------------------------------------------------------- chips


@pytest.mark.parametrize(
    ("text", "devices", "gib"),
    [
        ("v5p:4x4x2", 32, 95),
        ("V5E:4x4", 16, 16),
        ("v4:2x2x1", 4, 32),
        ("tpu7x:2x2x1", 8, 96),  # two devices a chip, and each has half of its memory
        ("2xv6e:4x8", 64, 32),
    ],
)
def test_topologies(text, devices, gib):
    found = chips.parse(text)
    assert (found.devices, found.memory) == (devices, gib * 2**30)
    assert found.is_tpu and found.slice_name == text.lower().removeprefix("2x")


def test_gpu_hosts():
    found = chips.parse("2xh200:8")
    assert not found.is_tpu
    assert (found.devices, found.slices, found.memory) == (16, 2, 141 * 10**9)


@pytest.mark.parametrize("text", ["v9:2x2", "v5p", "v5p:", "4x4x2", "v5p:4x4x2x"])
def test_unknown_topologies_list_the_known(text):
    with pytest.raises(UserError, match="known chips: v4, v5e, v5p, v6e, tpu7x, h100, h200, b200"):
        chips.parse(text)


@pytest.mark.parametrize("text", ["v5p:4x4", "h100:2x4", "v6e:4x4x4"])
def test_shapes_have_the_chips_dimensions(text):
    with pytest.raises(UserError, match="the shape of"):
        chips.parse(text)


@pytest.mark.parametrize("text", ["v5p:3x2x1", "v5e:1x1", "0xv5p:2x2x1", "h100:0"])
def test_shapes_that_are_no_slice(text):
    with pytest.raises(UserError, match="there is no such slice"):
        chips.parse(text)


def test_missing_libtpu_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install libtpu"):
        compile.open_mesh(chips.parse("v5p:2x2x1"), config.Mesh())


# ---------------------------------------------------------------- operations


def test_keys_seen():
    for time, window in [(10, None), (10, 4), (3, 8)]:
        seen = [min(t + 1, window or time) for t in range(time)]
        assert cost.keys_seen(time, window) == pytest.approx(sum(seen) / time)


def test_flops_by_hand():
    projections = 2 * 256 * (256 + 128 + 128 + 256)  # q, k, v, o
    attention_ = 2 * (2 * 8 * 32 * 32.5)  # scores and values over (64 + 1) / 2 keys
    layer = projections + attention_ + 2 * 3 * 256 * 768
    assert cost.body_flops(MODEL, 64) == pytest.approx(3 * layer)
    assert cost.head_flops(MODEL) == 2 * 256 * 1024
    run = small_run()
    student, head = 2 * layer, cost.head_flops(MODEL)
    none = dataclasses.replace(run, model=dataclasses.replace(run.model, remat="none"))
    # Forward and twice as much backward of the student, forward of the teacher.
    expected = 3 * (student + head) + 3 * layer + head
    assert cost.train_flops(none, MODEL) == pytest.approx(expected)
    down = 2 * 2 * 256 * 768  # whose result backward does not ask for
    assert cost.train_flops(run, MODEL) == pytest.approx(expected + student - down)
    cached = small_run(teacher="cache")
    assert cost.train_flops(cached, MODEL) == pytest.approx(4 * student - down + 3 * head)


def flops(lowered):
    return lowered.cost_analysis()["flops"]


def test_forward_flops_are_xlas():
    """Of the layers unrolled, since XLA counts the body of a scan once."""
    rows, time = 4, 64

    def forward(params, batch):
        h = decoder.embed(params, batch.tokens, jnp.float32)
        angles = rope.angles(batch.positions, MODEL.rope, MODEL.head_dim)
        attend = attention.by_mask(batch.segments, (None,))
        for i in range(MODEL.num_layers):
            w = jax.tree.map(lambda x: x[i], params["layers"])  # noqa: B023
            h = decoder.layer(w, h, angles, lambda *qkv: attend(jnp.int32(0), *qkv), MODEL)
        return decoder.logits(params, h, MODEL)

    inputs = decoder.abstract_params(MODEL), decoder.abstract_batch(rows, time)
    expected = flops(jax.jit(forward).lower(*inputs)) / (rows * time)
    counted = cost.body_flops(MODEL, time, dense=True) + cost.head_flops(MODEL)
    assert counted == pytest.approx(expected, rel=0.03)  # norms, softmax, rope are not ours


@pytest.mark.parametrize("remat", ["none", "selective", "layer"])
def test_step_flops_are_xlas(remat):
    """One layer of each model and one chunk, so that every scan's body runs once. The layers'
    term is not counted, nor are norms."""
    run = small_run(batch=4, chunk=4 * 64, hidden=0.0)
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, remat=remat, dtype="float32"),
        search=dataclasses.replace(run.search, keep=1, batch=4),
    )
    two = MODEL.take_layers((0, 1))
    once = cost.body_flops(MODEL.take_layers((0,)), 64)
    step, arguments = compile.train_inputs(run, two, "float32")
    found = flops(step.lower(*arguments)) / (4 * 64)
    state = decoder.count_params(MODEL.take_layers((0,))) * 25 / (4 * 64)  # AdamW, a parameter
    assert cost.train_flops(run, two) - once == pytest.approx(found - state, rel=0.06)


def test_search_flops_are_xlas():
    run = small_run(chunk=4 * 64)
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, dtype="float32", remat="none"),
        search=dataclasses.replace(run.search, keep=1, batch=4),
    )
    two = MODEL.take_layers((0, 1))  # the first apart, so that a scan has one, as XLA counts it
    step, arguments = compile.search_inputs(run, two, "float32")
    found = flops(step.lower(*arguments)) / (4 * 64)
    assert cost.search_flops(run, two) == pytest.approx(found, rel=0.06)


# ---------------------------------------------------------------- memory


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["online", pytest.param("cache", marks=pytest.mark.slow)])
def test_parts_add_up_and_the_estimate_is_near(teacher):
    """h100:8 is stood for by the eight CPU devices of the tests."""
    topology, run = chips.parse("h100:8"), small_run(teacher=teacher, microbatch=8)
    found = plan.make_plan(run, MODEL, "float32", topology)
    memory, wide = found.distill_memory, 4 * decoder.count_params(MODEL.take_layers((0, 1)))
    parts = dataclasses.asdict(memory)
    names = ("parameters", "optimiser", "teacher", "activations", "temporaries")
    assert sum(parts[name] for name in names) == memory.peak
    assert wide / 8 <= memory.parameters <= wide / 8 * 1.01  # norms are whole everywhere
    assert 2 * memory.parameters <= memory.optimiser <= 2 * memory.parameters + 64
    dense = 4 * decoder.count_params(MODEL) / 8
    assert memory.teacher == 0 if teacher == "cache" else memory.teacher >= dense
    assert memory.fits and found.fits
    sizes = cost.Mesh(1, 8, 1)
    estimated = ranking.estimate(run, MODEL, "float32", topology, sizes)
    assert 1 / 1.5 < estimated / memory.peak < 1.5
    assert found.search_memory.parameters == found.search_memory.optimiser == 0
    text = plan.describe(found)
    assert "distillation fits" in text and text.endswith("fits: yes")
    tree = json.loads(json.dumps(plan.as_json(found)))
    assert tree["fits"] and tree["distill_memory"]["peak"] == memory.peak
    assert tree["chip_hours"] == pytest.approx(8 * tree["roofline_hours"] / plan.SHARE)


def test_the_adaptation_holds_all_layers(tmp_path):
    """And the dense model, though the recovery has its outcomes from a cache. h100:8 is stood for
    by the eight CPU devices of the tests."""
    topology, run = chips.parse("h100:8"), small_run(microbatch=8, teacher="cache")
    run = dataclasses.replace(run, search=dataclasses.replace(run.search, adapt_steps=3, refine=2))
    with jax.set_mesh(compile.open_mesh(topology, run.mesh)):
        memory = compile.adapt_step(run, MODEL, "float32", topology)
    wide = 4 * decoder.count_params(MODEL) / 8
    assert wide <= memory.parameters <= 1.01 * wide  # norms are whole everywhere
    assert 2 * memory.parameters <= memory.optimiser <= 2 * memory.parameters + 64
    assert memory.teacher == memory.parameters and memory.fits
    assert ranking.estimate(run, MODEL, "float32", topology, cost.Mesh(1, 8, 1)) > 4 * wide
    other = compile.Memory(0, 0, 0, 0, 0, capacity=80 << 30, compiled=True, seconds=0.0)
    measured = (other, other, memory)
    found = plan.make_plan(run, MODEL, "float32", topology, measured=measured)
    assert found.fits and "adaptation fits" in plan.describe(found)
    assert plan.as_json(found)["adapt_memory"]["peak"] == memory.peak
    small = dataclasses.replace(memory, capacity=memory.peak)
    text = plan.describe(dataclasses.replace(found, adapt_memory=small))
    assert "adaptation does not fit" in text and "search.adapt_steps=0, or a lower" in text
    assert text.endswith("fits: NO")
    mask = tmp_path / "mask.json"
    mask.write_text(json.dumps({"num_layers": 3, "keep": [0, 2], "order": [1]}))
    given = dataclasses.replace(run, distill=dataclasses.replace(run.distill, mask=str(mask)))
    assert compile.adapt_step in compile.steps(run)
    assert compile.adapt_step not in compile.steps(given)  # nothing is searched


def test_steps_do_not_grow_with_depth():
    """So neither does the time it takes to compile them: a model's layers are one scan's body."""
    run, lines = small_run(microbatch=8), set()
    with jax.set_mesh(compile.open_mesh(chips.parse("h100:8"), run.mesh)):
        for layers in (4, 16):
            deep = dataclasses.replace(MODEL, num_layers=layers, windows=(None,) * layers)
            texts = []
            for inputs in (compile.search_inputs, compile.train_inputs):
                step, arguments = inputs(run, deep, "float32")
                texts.append(step.trace(*arguments).lower().as_text())
            lines.add(tuple(len(text.splitlines()) for text in texts))
    assert len(lines) == 1, lines


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gpu_steps_are_those_with_the_kernel(dtype):
    """In bfloat16 nothing of [T, T] is there, as cuDNN's kernel needs none; float32 has masks."""
    run = small_run(microbatch=8)
    data, model = dataclasses.replace(run.data, window=320), run.model
    run = dataclasses.replace(run, data=data, model=dataclasses.replace(model, dtype=dtype))
    with jax.set_mesh(compile.open_mesh(chips.parse("h100:8"), run.mesh)):
        for inputs in (compile.search_inputs, compile.train_inputs):
            step, arguments = inputs(run, MODEL, "float32")
            with devices.standing_for("gpu"):
                text = str(step.trace(*arguments).jaxpr)
            assert ("320,320" in text) == (dtype == "float32")
            assert devices.platform() == "cpu"


def with_problems(run, **evaluate):
    """The run with test problems, and so much decoding."""
    data = dataclasses.replace(run.data, test=(config.Source(path="problems.jsonl"),))
    return dataclasses.replace(run, data=data, evaluate=config.Evaluate(**evaluate))


@pytest.mark.slow
def test_drawn_answers_take_more_memory_and_time():
    """Logits are sorted to draw by top-p; and each problem is answered so many times."""
    other = compile.Memory(0, 0, 0, 0, 0, capacity=1, compiled=True, seconds=0.0)
    peaks, hours = [], []
    for drawn in ({}, {"temperature": 0.6, "top_p": 0.95, "samples": 4}):
        run = with_problems(small_run(), batch=8, max_new_tokens=16, rows=80, **drawn)
        found = plan.make_plan(run, MODEL, "float32", chips.parse("h100:8"), (other, other))
        peaks.append(found.decode_memory.peak)
        hours += [stage.hours for stage in found.stages if stage.name.startswith("decoding")]
    assert peaks[1] > peaks[0] and hours[1] == pytest.approx(4 * hours[0])


@pytest.mark.parametrize("topology", ["h100:8", "h100:1"])
def test_decoding_counts_what_its_weights_are_made_of(topology):
    """A dense model stored in float32 lies there beside its bfloat16 weights; on one GPU the layers
    of a bfloat16 one too, which decoding has apart."""
    run = with_problems(small_run(), batch=8, max_new_tokens=16384)
    chips_ = chips.parse(topology)
    with jax.set_mesh(compile.open_mesh(chips_, run.mesh)):
        peaks = {
            stored: compile.decode_step(run, MODEL, stored, chips_).peak
            for stored in ("float32", "bfloat16")
        }
        params = decoder.abstract_params(MODEL, jnp.bfloat16)
        dense, layers = compile.local_bytes(params), compile.local_bytes(params["layers"])
    norms = 2 * 4 * decoder.count_params(MODEL) // 100  # stored in float32 they stay so
    beside = 2 * dense - (layers if topology == "h100:1" else 0)
    assert peaks["float32"] - peaks["bfloat16"] == pytest.approx(beside, abs=norms)


@pytest.mark.parametrize(("longest", "layers"), [(16, 2), (16384, 3)], ids=["student", "dense"])
def test_memory_of_decoding(longest, layers):
    """Keys and values of the longest prompt and answer that there may be, in float32, over eight
    devices: by the student beside the dense model, or by the dense one where that takes more."""
    run = with_problems(small_run(), batch=8, max_new_tokens=longest)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, dtype="float32"))
    other = compile.Memory(0, 0, 0, 0, 0, capacity=1, compiled=True, seconds=0.0)
    topology = chips.parse("h100:8")
    found = plan.make_plan(run, MODEL, "float32", topology, measured=(other, other))
    columns = 512 + min(longest, MODEL.max_position - 512)
    memory, two = found.decode_memory, 4 * decoder.count_params(MODEL.take_layers((0, 1)))
    assert memory.activations == 2 * 4 * layers * 8 * columns * 4 * 32 / 8
    assert (
        (two / 8 <= memory.parameters <= two / 8 * 1.01) if layers == 2 else not memory.parameters
    )
    assert memory.teacher >= 4 * decoder.count_params(MODEL) / 8
    assert f"all answers {columns - 512} tokens long" in plan.describe(found)
    (stage,) = [stage for stage in found.stages if stage.name.startswith("decoding")]
    # 500 problems, eight at a time, by the dense model and two cut ones, raw and recovered.
    hours = 5 * 63 * (columns - 512) * found.decode_step.seconds / 3600
    assert stage.hours == pytest.approx(hours) and found.hours > hours
    small = dataclasses.replace(memory, capacity=memory.peak)
    assert not dataclasses.replace(found, decode_memory=small).fits
    shown = plan.describe(dataclasses.replace(found, decode_memory=small))
    assert "decoding does not fit" in shown and "a lower evaluate.batch" in shown


def test_time_of_decoding():
    """On one device it is bound by its memory: the weights, and the keys and values seen."""
    run = with_problems(small_run(), batch=4, max_new_tokens=1000)
    found = cost.decode_roofline(run, MODEL, chips.parse("h100:1"), cost.Mesh(1, 1, 1))
    weights = 2 * decoder.count_params(MODEL)
    seen = 4 * (512 + 500) * 2 * 2 * 3 * 4 * 32
    stream = 16 * 4 * 256 * 3  # the residual stream is small beside them
    assert found.bound == "memory"
    assert found.memory == pytest.approx((weights + seen + stream) / 3.35e12)


def test_out_of_memory_is_read():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    )
    assert compile.needed(message) == int(20.5 * 2**30)
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (137.39G) exceeds available HBM (95.74G)."
    )
    assert compile.needed(message, arguments=5) == int(137.39 * 2**30) + 5
    assert compile.needed("INTERNAL: something else") is None


# ---------------------------------------------------------------- configurations


def architecture(run, request):
    facts = ROOT / "configs" / "models" / f"{run.model.path.replace('/', '--')}.json"
    if facts.is_file():
        return families.read_config(facts)
    if run.model.path == "demo":
        return families.read_config(hub.resolve_config("demo"))
    if run.model.path == "runs/second-train/export":
        return families.read_config(ROOT / "configs" / "second-model.json")
    return families.read_config(request.getfixturevalue("shared") / "models" / run.model.path)


@pytest.mark.cases(3)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_type_check_on_256_devices(path, request):
    run = configure.load_run(path)
    cfg = architecture(run, request)
    # demo's and chain-math's batches are too small for a pod's data axes.
    rows = min(32, run.search.batch, run.distill.batch, run.distill.microbatch or 32)
    pod = mesh.abstract_mesh(2, rows // 2, 256 // rows)
    with jax.sharding.use_abstract_mesh(pod):
        step, arguments = compile.search_inputs(run, cfg, "bfloat16")
        state, _ = step.eval_shape(*arguments)
        assert state.theta.shape == (cfg.num_layers,)
        step, arguments = compile.train_inputs(run, cfg, "bfloat16")
        state, metrics = step.eval_shape(*arguments)
    before = arguments[0].params
    assert jax.tree.map(lambda x: x.sharding.spec, state.params) == jax.tree.map(
        lambda x: x.sharding.spec, before
    )
    assert metrics["loss"].shape == ()


def test_documented_commands_share_their_batches():
    """The runs of docs/gpu.md and docs/tpu.md, in their order, on the devices each is for."""
    pages = [(ROOT / "docs" / name).read_text() for name in ("gpu.md", "tpu.md")]
    text = "\n".join(pages).replace("\\\n", " ")
    commands = re.findall(r"run\.py run ([^\n'>…]*)[\n'>]", text)
    for command, count in zip(commands, (8, 32, 32, 64), strict=True):
        words = command.split()
        overrides = [word for word in words if "=" in word]
        run = configure.load_run(ROOT / words[words.index("--config") + 1], overrides)
        size = run.mesh.replica * run.mesh.model
        with jax.sharding.use_abstract_mesh(
            mesh.abstract_mesh(run.mesh.replica, count // size, run.mesh.model)
        ):
            job.check_batches(run, search=True, distill=True)


PAPER = {
    "Qwen--Qwen3-32B": "Qwen--Qwen3-32B",
    "meta-llama--Llama-2-7b-hf": "meta-llama--Llama-2-7b-chat-hf",
}


@pytest.mark.parametrize(("ours", "theirs"), PAPER.items())
def test_bundled_facts_are_the_models(ours, theirs, shared):
    path = ROOT / "configs" / "models" / f"{ours}.json"
    assert families.read_config(path) == families.read_config(shared / "configs" / theirs)
    assert folders.planned_dtype(path) == folders.planned_dtype(
        shared / "configs" / theirs / "config.json"
    )


def test_bundled_facts_where_the_hub_is_out_of_reach(monkeypatch, caplog):
    import huggingface_hub

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with caplog.at_level("WARNING"):
        path = hub.resolve_config("Qwen/Qwen3-32B")
    assert families.read_config(path).num_layers == 64
    assert "hub could not be reached; using the bundled" in caplog.text
    with pytest.raises(UserError, match="could not be fetched"):
        hub.resolve_config("nobody/nothing")


def test_dtype_without_weights(tmp_path):
    path = tmp_path / "config.json"
    for facts, dtype in [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
    ]:
        path.write_text(json.dumps(facts))
        assert folders.planned_dtype(path) == dtype
    path.write_text(json.dumps({"dtype": "int4"}))
    with pytest.raises(UserError, match="int4"):
        folders.planned_dtype(path)
    assert folders.planned_dtype(hub.resolve_config("demo")) == folders.source_dtype(
        hub.resolve("demo")
    )


# ---------------------------------------------------------------- the command


def write_model(folder, cfg=CFG):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(families.to_hf(cfg, dtype="bfloat16")))
    return folder


@pytest.mark.slow
def test_command(tmp_path, capsys, monkeypatch):
    """A folder that holds only config.json, on eight GPUs; a run may use the same folder later."""
    monkeypatch.setattr(ranking, "COMPILED", 1)  # for time
    out, model = tmp_path / "out", write_model(tmp_path / "model")
    where = [f"out={out}", f"model.path={model}", "data.window=64", "search.keep=2"]
    command = ["plan", "--config", "demo", "--topology", "h100:8", *where, "distill.batch=16"]
    assert cli.main([*command, "--search-mesh"]) == 0
    printed = capsys.readouterr().out
    assert "the fastest that fits: mesh.replica=" in printed
    tree = json.loads((out / "plan-h100-8.json").read_text())
    assert tree["fits"] and tree["topology"]["chips"] == 8
    assert {s["name"] for s in tree["stages"]} >= {"search", "distillation", "importance"}
    assert (out / "plan-h100-8.txt").read_text() in printed
    assert (out / "run.json").is_file()


@pytest.mark.slow
def test_command_says_what_does_not_fit(tmp_path, capsys, monkeypatch):
    model = write_model(tmp_path / "model")
    where = [f"out={tmp_path}/out", f"model.path={model}", "data.window=64", "search.keep=2"]
    tiny = dataclasses.replace(chips.CHIPS["h100"], memory=2**17)
    monkeypatch.setitem(chips.CHIPS, "h100", tiny)
    command = ["plan", "--config", "demo", "--topology", "h100:8", *where, "distill.batch=16"]
    assert cli.main(command) == 1
    printed = capsys.readouterr().out
    assert "distillation does not fit: needs" in printed and "fits: NO" in printed


def test_command_refuses(tmp_path, capsys):
    where = ["--config", "demo", f"out={tmp_path}/out"]
    assert cli.main(["plan", *where, "--topology", "v7:2x2"]) == 2
    assert "known chips" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


PROGRAM = """
import json
import jax
from e3jax import cli, configure
from e3jax.hf import families, folders, hub
from e3jax.planning import chips, compile
run, topology = configure.load_run("llama2-7b"), chips.parse("v5p:2x2x1")
cli.prepare_jax(run, topology)
path = hub.resolve_config(run.model.path)
with jax.set_mesh(compile.open_mesh(topology, run.mesh)):
    facts = families.read_config(path), folders.planned_dtype(path)
    memory = compile.train_step(run, *facts, topology)
print(json.dumps([memory.peak, memory.compiled, memory.fits]))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_real_configuration_compiles_for_a_tpu():
    """LLaMA-2-7B's recovery on the slice that its configuration names, in a process of its own:
    the environment must be set before jax is imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak, compiled, fits = json.loads(done.stdout.splitlines()[-1])
    student = 4 * 2_690_748_416  # float32; by hand: 12 layers of 202.4 M, two embeddings, a norm
    assert compiled and fits and 3 * student / 4 < peak < 95 * 2**30


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "tpu7x:2x2x1", "2xv5p:2x2x1"])
def test_all_steps_compile_for_each_kind_of_tpu(topology, tmp_path):
    """The bundled model's search, recovery and decoding by the command; two of them are slices."""
    tree = planned(tmp_path, "demo", topology)
    assert tree["fits"] and not tree["topology"]["text"].startswith(("h", "b"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    "model, topology, keep",
    [("Qwen--Qwen3-30B-A3B", "v5p:2x2x4", 36), ("openai--gpt-oss-20b", "v5p:2x2x2", 18)],
)
def test_experts_of_published_models_compile_for_a_tpu(model, topology, keep, tmp_path, shared):
    """Every step at the published shapes, experts over `model`."""
    overrides = [f"model.path={shared / 'configs' / model}", f"search.keep={keep}", "mesh.model=4"]
    assert planned(tmp_path, "deepseek-r1", topology, *overrides)["fits"]


def planned(out, config, topology, *overrides):
    """The plan that the command saves; all steps were compiled, and told their memory."""
    command = ["plan", "--config", config, "--topology", topology, f"out={out}", *overrides]
    environment = {**os.environ, "XLA_FLAGS": "", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, "run.py", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (tree,) = (json.loads(path.read_text()) for path in out.glob("plan-*.json"))
    parts = [tree[f"{name}_memory"] for name in ("search", "distill", "decode")]
    assert all(part["compiled"] and part["fits"] and part["peak"] for part in parts)
    return tree
