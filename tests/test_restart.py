"""The real program, killed while it runs: the same command ends with the same bits."""

import dataclasses
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml
from orbax.checkpoint import v1 as ocp

from e3jax import cli
from e3jax.distill import distill
from e3jax.files import LEDGER
from e3jax.hf.export import export_new
from training_tiny import CFG, assert_bitwise, dense_params

ROOT = pathlib.Path(__file__).parent.parent
TOKENIZER = ROOT / "e3jax" / "demo" / "model"
pytestmark = pytest.mark.slow
DEMO = str(ROOT / "e3jax" / "demo" / "train.jsonl.gz")
STEPS = 24  # of the search
RECOVERY = 90  # so many that a signal some steps after one that was seen never comes too late


@pytest.fixture(scope="module")
def configuration(tmp_path_factory):
    return write_configuration(tmp_path_factory.mktemp("restart"))


def write_configuration(folder):
    """A configuration file: a random model of four layers, little search and recovery."""
    cfg = dataclasses.replace(CFG, vocab_size=72, max_position=128)
    export_new(dense_params(cfg), cfg, TOKENIZER, folder / "model", card="", eos=2, pad=0)
    tree = {
        "out": str(folder / "whole"),
        "model": {"path": str(folder / "model"), "dtype": "float32", "remat": "none"},
        "data": {
            "train": [{"path": DEMO, "rows": ["0:150"]}],
            "held_out": [{"path": DEMO, "rows": ["150:170"]}],
            "window": 64,
            "decontaminate": [],
            "cache": str(folder / "tokens"),
        },
        "search": {
            "keep": 3, "steps": STEPS, "batch": 8, "init_windows": 8,
            "score_windows": 8, "score_every": 4, "checkpoint_every": 3,
        },
        "distill": {
            "steps": RECOVERY, "batch": 8, "microbatch": 4,
            "evaluate_every": 25, "checkpoint_every": 10,
            "optimizer": {"lr": 1.0e-2},
        },
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return folder / "tiny.yaml"


def start(configuration, command, *overrides):
    """The program on one CPU device; compilations are shared, and logged to stderr."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_LOG_COMPILES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(configuration.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    arguments = [sys.executable, "run.py", command, "--config", configuration, *overrides]
    log = open(configuration.parent / "stderr.txt", "w")  # noqa: SIM115  a full pipe would block
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=log, stderr=log)


def stderr(configuration):
    return (configuration.parent / "stderr.txt").read_text()


def stop(configuration, process, record, lines, code, after=""):
    """Sends a signal a random moment after `after` was told and `record` has so many lines."""
    end = time.monotonic() + 300
    while after not in stderr(configuration) or count(record) < lines:
        assert process.poll() is None, stderr(configuration)
        assert time.monotonic() < end
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(code)
    return process.wait(300)


def count(record):
    return len(record.read_bytes().splitlines()) if record.exists() else 0


@pytest.fixture(scope="module")
def whole(configuration):
    """The folder of a run that nothing disturbed, and what it logged."""
    process = start(configuration, "distill")
    assert process.wait(300) == 0, stderr(configuration)
    return configuration.parent / "whole", stderr(configuration)


def final_state(out):
    with ocp.training.Checkpointer(out / "distill" / "checkpoints" / "steps") as checkpoints:
        assert checkpoints.latest.step == RECOVERY
        return checkpoints.load()


def test_killed_again_and_again_it_ends_with_the_same_bits(configuration, whole):
    """Mask, weights, moments and records, after SIGKILL in either stage and SIGTERM."""
    out = configuration.parent / "killed"
    search, distil = out / "search" / "metrics.jsonl", out / "distill" / "metrics.jsonl"
    moments = [random.randint(1, STEPS // 2), random.randint(3, STEPS // 2), random.randint(0, 4)]
    print("stopped after lines", moments)

    process = start(configuration, "distill", f"out={out}")
    assert stop(configuration, process, search, moments[0], signal.SIGKILL) == -signal.SIGKILL

    process = start(configuration, "distill", f"out={out}")
    assert stop(configuration, process, distil, moments[1], signal.SIGTERM) == 128 + signal.SIGTERM
    step = int(re.search(r"told to stop(: saving| while) step (\d+)", stderr(configuration))[2])

    process = start(configuration, "distill", f"out={out}")
    again = f"distill: going on from the checkpoint of step {step}\n"
    lines = step + moments[2]
    assert stop(configuration, process, distil, lines, signal.SIGKILL, again) == -signal.SIGKILL

    process = start(configuration, "distill", f"out={out}")
    assert process.wait(300) == 0, stderr(configuration)

    want, _ = whole
    for name in ("search/mask.json", "search/metrics.jsonl", "distill/metrics.jsonl"):
        assert (out / name).read_text() == (want / name).read_text(), name
    assert_bitwise(final_state(out), final_state(want))


def test_nothing_compiles_twice(whole):
    """One `step` for each stage, one `sums` (held-out figures) for each stage and for the search's
    end, which scores fewer windows at a time."""
    compiled = re.findall(r"Finished XLA compilation of jit\((step|sums)\)", whole[1])
    assert sorted(compiled) == ["step", "step", "sums", "sums", "sums"]


def test_a_finished_stage_takes_no_step(configuration, whole, monkeypatch, capsys):
    out, _ = whole
    files = {path for path in out.rglob("*.json*") if path.name != LEDGER}  # that tells of time
    kept = {path: path.read_bytes() for path in files}

    def never(*_, **__):
        raise AssertionError("a step was built")

    monkeypatch.setattr(distill, "make_train_step", lambda *_, **__: never)
    monkeypatch.setattr("e3jax.search.search.make_search_step", never)
    monkeypatch.setattr("e3jax.models.decoder.take_layers", never)  # the state is read, not made
    monkeypatch.setattr("e3jax.choice.kl_importance", never)
    assert cli.main(["distill", "--config", str(configuration)]) == 0
    assert {path: path.read_bytes() for path in kept} == kept
    # Another mesh may need another micro-batch.
    assert cli.main(["distill", "--config", str(configuration), "distill.microbatch=2"]) == 0


def test_checkpoints_of_another_configuration(configuration, whole, capsys):
    code = cli.main(["distill", "--config", str(configuration), "distill.optimizer.lr=0.5"])
    assert code == 2
    assert "optimizer.lr: 0.01 -> 0.5" in capsys.readouterr().err


def test_a_run_that_diverges_exits_with_1_and_a_message(configuration, whole):
    out, _ = whole
    overrides = (f"distill.mask={out}/search/mask.json", f"out={out}-diverged")
    process = start(
        configuration, "distill", *overrides, "distill.optimizer.lr=1e38", "distill.patience=3"
    )
    assert process.wait(300) == 1, stderr(configuration)
    assert re.search(
        r"\nerror: 3 steps in a row .*: lower the learning rate", stderr(configuration)
    )
    assert "Traceback" not in stderr(configuration)
