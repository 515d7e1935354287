"""Real processes on loopback, CPU collectives: one run, the same answer as a single process."""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from e3jax import processes
from e3jax.hf.export import export_new
from training_tiny import CFG, dense_params

ROOT = pathlib.Path(__file__).parent.parent
TOKENIZER = ROOT / "e3jax" / "demo" / "model"
DEMO = ROOT / "e3jax" / "demo"
STEPS = 8


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
            "score_windows": 8, "score_every": 4, "checkpoint_every": 3, "swaps": 2,
        },
        "distill": {
            "steps": STEPS, "batch": 8, "microbatch": 4, "evaluate_every": 5, "checkpoint_every": 3,
        },
        "evaluate": {"batch": 4, "max_new_tokens": 8, "baselines": [], "loss_curve": False},
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return folder


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start(place, count, *arguments, devices=1, each=None):
    """`count` processes of the program on loopback, with so many devices each.

    each: process number -> an argument of that process alone.
    """
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(place / f"compiled-{count}-{devices}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "run.py", *arguments]
    if count > 1:
        command += ["--coordinator", f"localhost:{free_port()}", "--processes", str(count)]
    started = []
    for number in range(count):
        which = ["--process", str(number)] if count > 1 else []
        which += [each(number)] if each else []
        log = open(place / f"log-{number}.txt", "w")  # noqa: SIM115  a full pipe would block
        started.append(
            subprocess.Popen([*command, *which], cwd=ROOT, env=environment, stdout=log, stderr=log)
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


def same_results(ours, theirs):
    """Masks, weights and figures of two run folders, to float32 rounding."""
    masks = [read_json(out / "search" / "mask.json") for out in (ours, theirs)]
    assert masks[0]["keep"] == masks[1]["keep"] and masks[0]["tokens"] == masks[1]["tokens"]
    np.testing.assert_allclose(masks[0]["scores"], masks[1]["scores"], atol=1e-4)
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


@pytest.mark.parametrize(("count", "command", "model"), [(2, "run", 1), (4, "export", 2)])
def test_several_processes_do_the_job_of_one(place, single, count, command, model):
    out = place / f"several-{count}"
    run(place, count, command, f"out={out}", f"mesh.model={model}")
    same_results(out, single)
    assert "read back and verified" in said(place, 0)
    for number in range(1, count):  # process 0 speaks for all
        assert all(line.startswith("[Gloo]") for line in said(place, number).split("\n") if line)


def wait_for(place, started, record, lines):
    """Returns when a record has so many lines."""
    end = time.monotonic() + 200
    while not record.exists() or len(record.read_bytes().splitlines()) < lines:
        assert all(process.poll() is None for process in started), said(place)
        assert time.monotonic() < end, said(place)
        time.sleep(0.01)


def test_a_process_that_dies_or_is_told_to_stop(place, single):
    """SIGKILL of one ends the other, SIGTERM of one stops both at the same step; then one process
    alone, of as many devices, goes on from their checkpoints to the same result."""
    out = place / "disturbed"
    again = ("run", "--config", str(place / "tiny.yaml"), f"out={out}")

    started = start(place, 2, *again)
    wait_for(place, started, out / "search" / "metrics.jsonl", 6)
    started[1].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    codes = finish(place, started)
    assert codes[0] not in (0, 2) and codes[1] == -signal.SIGKILL
    assert time.monotonic() - begun < 2 * processes.HEARTBEAT_S

    started = start(place, 2, *again)
    wait_for(place, started, out / "distill" / "metrics.jsonl", 3)
    started[1].send_signal(signal.SIGTERM)
    assert finish(place, started) == [128 + signal.SIGTERM] * 2, said(place)
    assert "told to stop: saving step" in said(place)

    run(place, 1, "run", f"out={out}", devices=2)
    assert "distill: going on from the checkpoint of step" in said(place)
    same_results(out, single)


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
