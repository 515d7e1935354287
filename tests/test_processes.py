"""Real processes on loopback, CPU collectives: one run, the same answer as a single process."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from e3jax import notice, processes
from e3jax.errors import UserError
from e3jax.hf.export import export_new
from e3jax.training.metrics import read_metrics
from training_tiny import CFG, dense_params

ROOT = pathlib.Path(__file__).parent.parent
TOKENIZER = ROOT / "e3jax" / "demo" / "model"
DEMO = ROOT / "e3jax" / "demo"
STEPS = 8
CACHE = ("distill.teacher=cache", "distill.top_k=8")
RECORD = """
import os, sys

file = os.open(os.environ["TOUCHED"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

def record(event, arguments):
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        os.write(file, f"{arguments[0]}\\n".encode())

sys.addaudithook(record)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a random model of four layers and a configuration of the whole job."""
    folder = tmp_path_factory.mktemp("processes")
    cfg = dataclasses.replace(CFG, vocab_size=72, max_position=128)
    export_new(dense_params(cfg), cfg, TOKENIZER, folder / "model", card="", eos=2, pad=0)
    tree = {
        "out": str(folder / "out"),
        "model": {"path": str(folder / "model"), "dtype": "float32", "remat": "none"},
        "data": {
            "train": [{"path": str(DEMO / "train.jsonl.gz"), "rows": ["0:150"]}],
            "held_out": [{"path": str(DEMO / "train.jsonl.gz"), "rows": ["150:170"]}],
            "test": [{"path": str(DEMO / "test.jsonl"), "rows": ["0:6"]}],
            "measure": [{"path": str(DEMO / "train.jsonl.gz"), "rows": ["170:190"]}],
            "window": 64,
            "decontaminate": [],
            "cache": str(folder / "tokens"),
        },
        "search": {
            "keep": 3, "steps": STEPS, "batch": 8, "init_windows": 8,
            "score_windows": 8, "score_every": 4, "checkpoint_every": 3, "refine": 2,
        },
        "distill": {
            "steps": STEPS, "batch": 8, "microbatch": 4, "evaluate_every": 5, "checkpoint_every": 3,
            "optimizer": {"eps": 1e-5},  # or Adam makes steps of a tiny gradient's rounding
        },
        "evaluate": {
            "batch": 4, "max_new_tokens": 8, "baselines": [], "loss_curve": False,
            "temperature": 1.0, "samples": 2,
        },
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    (folder / "record").mkdir()
    (folder / "record" / "sitecustomize.py").write_text(RECORD)
    return folder


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(place, count, *arguments, devices=1, each=None, program=("run.py",)):
    """`count` processes of the program on loopback, with so many devices each.

    each: process number -> an argument of that process alone. What Python opens, makes, renames or
    removes is recorded in touched-<number>.txt.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(place / "record"), str(ROOT)]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiling is all that a tiny model costs
    }
    command = [sys.executable, *program, *arguments]
    if count > 1:
        command += ["--coordinator", f"localhost:{free_port()}", "--processes", str(count)]
    started = []
    for number in range(count):
        which = ["--process", str(number)] if count > 1 else []
        which += [each(number)] if each else []
        log = open(place / f"log-{number}.txt", "w")  # noqa: SIM115  a full pipe would block
        own = {**environment, "TOUCHED": str(place / f"touched-{number}.txt")}
        started.append(
            subprocess.Popen([*command, *which], cwd=ROOT, env=own, stdout=log, stderr=log)
        )
    return started


def said(place, number=0):
    return (place / f"log-{number}.txt").read_text()


def finish(place, started, within=300):
    """Exit codes; a process that is still there after `within` seconds is a failure."""
    end = time.monotonic() + within
    try:
        return [process.wait(max(0.1, end - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()


def run(place, count, command, *arguments, devices=1):
    started = start(
        place, count, command, "--config", str(place / "tiny.yaml"), *arguments, devices=devices
    )
    codes = finish(place, started)
    assert codes == [0] * count, "\n".join(said(place, n) for n in range(count))


@pytest.fixture(scope="module")
def single(place):
    """The run of one process with two devices."""
    run(place, 1, "run", f"out={place}/single", devices=2)
    return place / "single"


def read_json(path):
    return json.loads(path.read_text())


def assert_same_teacher(ours, theirs):
    """What two run folders' teacher caches say of themselves."""
    stats = [read_json(out / "teacher" / "finished.json") for out in (ours, theirs)]
    assert stats[0]["needed"] == stats[1]["needed"]
    np.testing.assert_allclose(stats[0]["mean_entropy"], stats[1]["mean_entropy"], rtol=1e-5)


def same_results(ours, theirs):
    """Masks, weights and figures of two run folders, to float32 rounding."""
    masks = [read_json(out / "search" / "mask.json") for out in (ours, theirs)]
    assert masks[0]["keep"] == masks[1]["keep"] and masks[0]["tokens"] == masks[1]["tokens"]
    np.testing.assert_allclose(masks[0]["theta"], masks[1]["theta"], atol=1e-4)
    weights = [load_file(out / "export" / "model.safetensors") for out in (ours, theirs)]
    assert weights[0].keys() == weights[1].keys()
    for name, array in weights[0].items():
        np.testing.assert_allclose(array, weights[1][name], atol=1e-5, err_msg=name)
    if not (ours / "evaluate").exists():  # it ended with the export
        return
    rows = [read_json(out / "evaluate" / "results.json") for out in (ours, theirs)]
    for one, other in zip(*rows, strict=True):
        assert one["model"] == other["model"] and one["exact_match"] == other["exact_match"]
        np.testing.assert_allclose(one["kl"], other["kl"], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_two_processes_do_the_job_of_one(place, single):
    out = place / "two"
    run(place, 2, "run", f"out={out}")
    same_results(out, single)
    drawn = [(x / "evaluate" / "dense.answers.jsonl").read_text() for x in (out, single)]
    assert drawn[0] == drawn[1] and len(drawn[0].splitlines()) == 12
    for row in read_json(out / "evaluate" / "results.json"):
        right = row["exact_match"] * 12
        assert row["samples"] == 2 and row["interval"][0] <= right / 12 <= row["interval"][1]
    assert "pass@1" in (out / "evaluate" / "results.txt").read_text()
    assert "read back and verified" in said(place, 0)
    assert beside_gloo(said(place, 1)) == []  # process 0 speaks for all
    assert touched(place, 0, out) > {"search", "distill", "evaluate", ".export"}
    assert touched(place, 1, out) == set()


def beside_gloo(text):
    return [line for line in text.split("\n") if line and not line.startswith("[Gloo]")]


def touched(place, number, out):
    """Names in the run folder that a process wrote under, but for the shards of checkpoints."""
    paths = map(pathlib.Path, (place / f"touched-{number}.txt").read_text().splitlines())
    inside = [path.relative_to(out) for path in paths if out in path.parents]
    return {path.parts[0].split(".partial")[0] for path in inside if "steps" not in path.parts}


def wait_until(place, started, there):
    """Returns when it is `there`, while all processes are at work."""
    end = time.monotonic() + 200
    while not there():
        assert all(process.poll() is None for process in started), said(place)
        assert time.monotonic() < end, said(place)
        time.sleep(0.01)


def wait_for(place, started, record, lines):
    """Returns when a record has so many lines."""

    def there():
        return record.exists() and len(record.read_bytes().splitlines()) >= lines

    wait_until(place, started, there)


@pytest.mark.slow
def test_four_processes_stopped_and_started_again(place, single):
    """On a mesh of data 2 x model 2: told to stop in the search, they stop at the same step, and
    when they go on the mask, the teacher cache and what is learnt from it are one process's."""
    run(
        place,
        1,
        "export",
        f"out={place}/cached",
        f"distill.mask={single}/search/mask.json",
        *CACHE,
        devices=2,
    )
    ours, theirs = place / "four", place / "cached"
    arguments = ("export", "--config", str(place / "tiny.yaml"), f"out={ours}", *CACHE)
    started = start(place, 4, *arguments, "mesh.model=2")
    wait_for(place, started, ours / "search" / "metrics.jsonl", 4)
    started[3].send_signal(signal.SIGTERM)
    assert finish(place, started) == [128 + signal.SIGTERM] * 4, said(place)
    assert re.search(r"told to stop(: saving| while) step \d+", said(place))

    run(place, 4, "export", f"out={ours}", *CACHE, "mesh.model=2")
    assert "search: going on from the checkpoint of step" in said(place)
    masks = [read_json(out / "search" / "mask.json") for out in (ours, single)]
    assert masks[0]["keep"] == masks[1]["keep"]
    np.testing.assert_allclose(masks[0]["theta"], masks[1]["theta"], atol=1e-4)
    read = [load_file(out / "export" / "model.safetensors") for out in (ours, theirs)]
    for name, array in read[0].items():
        np.testing.assert_allclose(array, read[1][name], atol=1e-5, err_msg=name)
    assert_same_teacher(ours, theirs)
    assert re.search(r"teacher cache: 64 of \d+ windows, \d\d\.\d bytes a token", said(place))
    for number in (1, 2, 3):
        assert beside_gloo(said(place, number)) == []


@pytest.mark.slow
def test_on_one_process_and_two_and_one_again(place, single):
    """A single process is told to stop in the search; two of as many devices in all go on, are told
    to stop while they load, go on, and end when one of them dies in the distillation; a single one
    ends the job, with the result of one that nothing disturbed."""
    out = place / "disturbed"
    again = ("run", "--config", str(place / "tiny.yaml"), f"out={out}")

    started = start(place, 1, *again, devices=2)
    wait_for(place, started, out / "search" / "metrics.jsonl", 4)
    started[0].send_signal(signal.SIGTERM)
    assert finish(place, started) == [128 + signal.SIGTERM], said(place)

    started = start(place, 2, *again)
    wait_for(place, started, place / "log-0.txt", 2)  # the model's line
    started[1].send_signal(signal.SIGTERM)
    begun = time.monotonic()
    assert finish(place, started) == [128 + signal.SIGTERM] * 2, said(place) + said(place, 1)
    assert time.monotonic() - begun < 3 * notice.GRACE_S

    started = start(place, 2, *again)
    wait_for(place, started, out / "distill" / "metrics.jsonl", 5)
    assert "search: going on from the checkpoint of step" in said(place)
    started[1].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    codes = finish(place, started)
    assert codes[0] not in (0, 2) and codes[1] == -signal.SIGKILL
    assert time.monotonic() - begun < 2 * processes.HEARTBEAT_S

    run(place, 1, "run", f"out={out}", devices=2)
    assert "distill: going on from the checkpoint of step" in said(place)
    same_results(out, single)


@pytest.mark.slow
def test_told_to_stop_in_the_teacher_cache_and_in_the_export(place, single):
    """Two processes, then one, then two: what is in the cache stays, and the result is one's."""
    ours, theirs = place / "stopped", place / "undisturbed"
    given = (f"distill.mask={single}/search/mask.json", *CACHE, "distill.microbatch=2")
    run(place, 1, "export", f"out={theirs}", *given, devices=2)
    arguments = ("export", "--config", str(place / "tiny.yaml"), f"out={ours}", *given)

    def stopped(there):
        started = start(place, 2, *arguments)
        wait_until(place, started, there)
        started[1].send_signal(signal.SIGTERM)
        assert finish(place, started) == [128 + signal.SIGTERM] * 2, said(place) + said(place, 1)

    stopped((ours / "teacher" / "meta.json").exists)
    assert not (ours / "distill" / "checkpoints" / "steps").exists()
    run(place, 1, "distill", f"out={ours}", *given, devices=2)
    stopped(lambda: list(ours.glob(".export.partial*")))
    assert not (ours / "export").exists()
    run(place, 2, *arguments[:1], *arguments[3:])
    assert not list(ours.glob(".export.partial*"))
    assert_same_teacher(ours, theirs)
    read = [load_file(out / "export" / "model.safetensors") for out in (ours, theirs)]
    for name, array in read[0].items():
        np.testing.assert_allclose(array, read[1][name], atol=1e-5, err_msg=name)


ALONE = """
import sys, time
import jax
from e3jax import mesh, processes

processes.HEARTBEAT_S = 5
processes.start(sys.argv[3], 2, int(sys.argv[-1]))
jax.set_mesh(mesh.make_mesh())
print("joined", flush=True)
if sys.argv[1] == "alone":
    processes.from_first(lambda: time.sleep(600))
while True:
    bool(processes.vote(False))
"""


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    ("what", "code"),
    [("alone", signal.SIGKILL), ("alone", signal.SIGSTOP), ("together", signal.SIGSTOP)],
)
@pytest.mark.parametrize("dead", [0, 1])
def test_a_peer_that_dies_or_is_silent(place, dead, what, code):
    """While process 0 works alone, as in the check through transformers, and the other waits on the
    host; and in one collective after the other."""
    started = start(place, 2, what, program=("-c", ALONE))
    for number in (0, 1):
        wait_for(place, started, place / f"log-{number}.txt", 1)
    time.sleep(1)
    begun = time.monotonic()
    started[dead].send_signal(code)
    try:
        assert started[1 - dead].wait(60) not in (0, 2)
        assert time.monotonic() - begun < 2 * 5 + 10  # the heartbeat's time, twice, and some
    finally:
        for process in started:
            process.kill()


BYTES = """
import os, sys

import jax

from e3jax import mesh, processes
from e3jax.hf import reading
from e3jax.hf.load import load_params

reading.PAGE = 1  # all rows of a tiny model are shorter than a page
preadv, got = os.preadv, []

def counted(*arguments):
    got.append(preadv(*arguments))
    return got[-1]

processes.start(sys.argv[3], 2, int(sys.argv[-1]))
os.preadv = counted
with jax.set_mesh(mesh.make_mesh()):
    load_params(sys.argv[1])
print(sum(got))
"""


def test_each_process_reads_its_part_of_the_weights(place):
    """FSDP over both: half of the matrices, and the few norms that both have."""
    started = start(place, 2, str(place / "model"), program=("-c", BYTES))
    assert finish(place, started) == [0, 0], said(place) + said(place, 1)
    read = [int(said(place, number).splitlines()[-1]) for number in range(2)]
    size = sum(x.nbytes for x in load_file(place / "model" / "model.safetensors").values())
    assert read[0] + read[1] >= size
    assert max(read) < 0.52 * size, (read, size)


TORN = """
import pathlib, sys, time

import jax
import numpy as np
from orbax.checkpoint.experimental.v1._src.layout import registry

from e3jax import mesh, processes
from e3jax.training.checkpoint import open_checkpoints

folder, what = pathlib.Path(sys.argv[1]), sys.argv[2]
see = registry.get_checkpoint_layout

async def unseen(path, *rest):
    if what == "nothing" and path.name == "2" and jax.process_index() == 1:
        raise OSError("stale file handle")
    return await see(path, *rest)

registry.get_checkpoint_layout = unseen
processes.start(sys.argv[4], 2, int(sys.argv[-1]))
value = np.random.default_rng(0).normal(size=(2, 10000)).astype(np.float32)
with jax.set_mesh(mesh.make_mesh()):
    place = mesh.sharding(("embed", None))
    state = {"x": jax.make_array_from_callback(value.shape, place, lambda part: value[part])}
    like = {"x": jax.ShapeDtypeStruct(value.shape, np.float32, sharding=place)}
    with open_checkpoints(folder, {}) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state)
    if processes.is_first():
        for path in (folder / "steps" / "2").glob(what):
            path.write_bytes(path.read_bytes()[:100])
    processes.barrier("torn")
    begun = time.monotonic()
    with open_checkpoints(folder, {}) as checkpoints:
        step, found = checkpoints.restore(like)
        np.testing.assert_array_equal(processes.whole(found["x"]), value)
        checkpoints.save(3, found)
    with open_checkpoints(folder, {}) as checkpoints:
        print("read", step, checkpoints.restore(like)[0], time.monotonic() - begun)
"""


@pytest.mark.parametrize(
    "what", ["state/ocdbt.process_1/d/*", "nothing"], ids=["torn", "not seen there"]
)
def test_a_checkpoint_that_one_process_cannot_read(place, what):
    """All hear of it at once and use the one before, and the next one is saved and read."""
    started = start(place, 2, str(place / f"torn-{what[:5]}"), what, program=("-c", TORN))
    assert finish(place, started) == [0, 0], said(place) + said(place, 1)
    for number in (0, 1):
        assert "step 2 cannot be read by process 1: " in said(place, number)
        # JAX may have a last word, on how it parted.
        words = re.findall(r"^read (\d+) (\d+) (\S+)$", said(place, number), re.MULTILINE)
        [(newest, last, seconds)] = words
        assert (newest, last) == ("1", "3") and float(seconds) < 30
    assert (place / f"torn-{what[:5]}" / "torn" / "2").is_dir()  # perhaps it was whole


FULL = """
import pathlib, resource, sys
import jax, numpy as np
from e3jax import mesh, processes
from e3jax.errors import UserError
from e3jax.training.loop import fit

folder, whose, _, address, _, count, _, number = sys.argv[1:]
processes.start(address, int(count), int(number))
if number == whose:  # nothing that it writes becomes larger: as of a full disk or a quota
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with jax.set_mesh(mesh.make_mesh()):
    place = mesh.sharding(("embed", None), (2, 200_000))
    value = np.random.default_rng(0).normal(size=(2, 200_000)).astype(np.float32)
    state = {"x": jax.make_array_from_callback(value.shape, place, lambda p: value[p])}
    like = {"x": jax.ShapeDtypeStruct(value.shape, np.float32, sharding=place)}
    try:
        fit(
            "full",
            jax.jit(lambda state, batch: ({"x": state["x"] + 1}, {"loss": state["x"].sum()})),
            lambda: state,
            lambda step: {"tokens": np.zeros((1, 4), np.int32)},
            like=like, steps=100, folder=pathlib.Path(folder), inputs={}, checkpoint_every=10,
        )
    except UserError as error:
        print(f"error: {error}", flush=True)
        processes.leave(2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("whose", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_a_save_that_fails_in_one_process(place, whose):
    """That one says why, and no other waits for it: Orbax's threads would, for ever."""
    folder = place / f"full-{whose}"
    begun = time.monotonic()
    started = start(place, 2, str(folder), whose, program=("-c", FULL))
    codes = finish(place, started)
    assert time.monotonic() - begun < 50  # before a heartbeat could tell
    assert codes[int(whose)] == 2 and codes[1 - int(whose)] != 0, codes
    assert re.search(
        r"error: .*a checkpoint could not be saved: .*File too large", said(place, int(whose))
    )


def test_processes_that_share_a_gpu_are_told():
    one_each = [["a", "0", [0]], ["a", "1", [0]], ["b", "0", [0]], ["c", "", [0]], ["c", "", [1]]]
    processes._check_shared(one_each)
    with pytest.raises(UserError, match=r"processes 2 and 5 on b use the same GPUs.*DEVICES=2"):
        processes._check_shared([*one_each, ["b", "0", [0, 1]]])


SLURM = """
from e3jax import processes

processes.start()
print("all of", processes.gather(processes.is_first()), processes.from_first(lambda: "hello"))
"""


def test_slurm_tells_who_the_others_are(place):
    port = free_port() % 4096 + 61440  # jax takes it from the job's number
    job = {"SLURM_JOB_ID": str(port - 61440), "SLURM_STEP_NODELIST": "localhost"}
    started = []
    for number in range(3):
        task = {"SLURM_NTASKS": "3", "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", SLURM], cwd=ROOT, env=os.environ | job | task,
                stdout=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    try:
        for process in started:
            assert process.communicate(timeout=120)[0] == "all of [True, False, False] hello\n"
    finally:
        for process in started:
            process.kill()


POISON = """
import jax, numpy as np
from e3jax import cli
from e3jax.data.teacher import TeacherCache

read, calls = TeacherCache.read, []

def poisoned(self, index):
    rows = read(self, index)
    # It is finished, and read for the steps in their order.
    if self.stats is not None and not self.store.place.endswith("held_out"):
        calls.append(index)
        if len(calls) == 3 and jax.process_index() == 1:
            rows["logp"][0, :4] = np.nan
    return rows

TeacherCache.read = poisoned
raise SystemExit(cli.main())
"""


@pytest.mark.slow
def test_nan_in_the_batch_of_one_process(place, single):
    """All leave out the same step, and count it."""
    out = place / "nan"
    arguments = (f"out={out}", f"distill.mask={single}/search/mask.json", *CACHE)
    arguments = ("distill", "--config", str(place / "tiny.yaml"), *arguments)
    started = start(place, 2, *arguments, program=("-c", POISON))
    assert finish(place, started) == [0, 0], said(place) + said(place, 1)
    lines = [line for line in read_metrics(out / "distill") if "loss" in line]
    assert [line["step"] for line in lines if line["skipped"]] == [2] and len(lines) == STEPS
    assert all(np.isfinite(line["loss"]) for line in lines if line["step"] != 2)
    assert "1 steps were not finite and were left out" in said(place)
    assert "1 steps were not finite and were left out" in said(place, 1)


STRAY = """
import jax
import jax.numpy as jnp
from e3jax import cli, job
from e3jax.models import decoder

plain, embed, STRANGE = job.step_batches, decoder.embed, 10**6

def nan_if_strange(params, tokens, dtype):
    return jnp.where(tokens[..., None] == STRANGE, jnp.nan, embed(params, tokens, dtype))

def poisoned(windows, batch, seed):
    batches = plain(windows, batch, seed)

    def read(step):
        arrays = batches(step)
        if step == 2 and jax.process_index() == 1:
            arrays["tokens"][0] = STRANGE
        return arrays

    return read

decoder.embed, job.step_batches = nan_if_strange, poisoned
raise SystemExit(cli.main())
"""


@pytest.mark.slow
def test_nan_in_the_batch_of_one_process_in_the_search(place):
    out = place / "stray"
    arguments = ("search", "--config", str(place / "tiny.yaml"), f"out={out}")
    started = start(place, 2, *arguments, program=("-c", STRAY))
    assert finish(place, started) == [0, 0], said(place) + said(place, 1)
    lines = [line for line in read_metrics(out / "search") if "loss" in line]
    assert [line["step"] for line in lines if line["skipped"]] == [2] and len(lines) == STEPS
    assert all(np.isfinite(line["loss"]) for line in lines if line["step"] != 2)
    assert np.isfinite(read_json(out / "search" / "mask.json")["scores"]).all()


def test_processes_with_another_configuration_are_told(place):
    arguments = ("search", "--config", str(place / "tiny.yaml"), f"out={place}/differ")
    started = start(place, 2, *arguments, each=lambda number: f"seed={number}")
    assert all(finish(place, started))
    assert any("the configuration: process 1 has another one" in said(place, n) for n in range(2))


@pytest.mark.slow
def test_processes_that_do_not_share_the_folder_are_told(place):
    """What each process sees under `out` is another folder, as on hosts with disks of their own."""
    arguments = ("search", "--config", str(place / "tiny.yaml"))
    started = start(place, 2, *arguments, each=lambda number: f"out={place}/own-{number}")
    codes = finish(place, started)
    assert all(codes) and "storage that all of them share" in said(place, 1)


def test_an_error_of_process_0_is_one_of_all(place):
    started = start(place, 2, "search", "--config", str(place / "tiny.yaml"), f"out={ROOT}")
    assert all(finish(place, started))
    assert any("not empty, and not a run of e3jax" in said(place, n) for n in range(2))
