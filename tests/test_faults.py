"""What a disk, a clock and other runs do to a run: it ends with a message, and goes on after."""

import json
import os
import signal
import subprocess
import time

import pytest

from e3jax import cli, config, job
from test_restart import configuration, count, start, stderr, stop  # noqa: F401  a fixture
from training_tiny import set_mesh

SMALL = "search.steps=12 distill.steps=12 search.checkpoint_every=2 distill.checkpoint_every=2"


def mount(*arguments):
    found = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"needs the right to mount a file system: {found.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Takes all room that is left."""
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass


def disturb(configuration, process, record, lines, what):  # noqa: F811
    """Does `what` when `record` has so many lines; returns the exit code."""
    end = time.monotonic() + 300
    while count(record) < lines:
        assert process.poll() is None, stderr(configuration)
        assert time.monotonic() < end
        time.sleep(0.002)
    what()
    return process.wait(300)


@pytest.mark.parametrize("stage", ["search", "distill"])
def test_a_disk_that_fills_up(configuration, small_disk, stage):  # noqa: F811
    out = small_disk / "run"
    arguments = ("distill", f"out={out}", *SMALL.split())
    process = start(configuration, *arguments)
    record = out / stage / "metrics.jsonl"
    assert disturb(configuration, process, record, 4, lambda: fill(small_disk)) == 2
    assert "No space left on device" in stderr(configuration)
    assert "Traceback" not in stderr(configuration)
    (small_disk / "filler").unlink()
    process = start(configuration, *arguments)
    assert process.wait(300) == 0, stderr(configuration)


def test_a_folder_made_read_only_midway(configuration, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    process = start(configuration, "search", f"out={out}", *SMALL.split())
    checkpoints = str(out / "search" / "checkpoints")

    def make_read_only():
        mount("--bind", checkpoints, checkpoints)
        mount("-o", "remount,bind,ro", checkpoints)

    try:
        code = disturb(configuration, process, out / "search" / "metrics.jsonl", 4, make_read_only)
    finally:
        process.kill()
        subprocess.run(["umount", "-l", checkpoints], capture_output=True)
    assert code == 2, stderr(configuration)
    assert "a checkpoint could not be saved" in stderr(configuration)
    assert "Traceback" not in stderr(configuration)
    process = start(configuration, "search", f"out={out}", *SMALL.split())
    assert process.wait(300) == 0, stderr(configuration)


def test_a_second_run_in_the_same_folder_is_refused(configuration, tmp_path, capsys):  # noqa: F811
    run = config.load_run(configuration, [f"out={tmp_path}/run"])
    arguments = ["search", "--config", str(configuration), f"out={tmp_path}/run"]
    with set_mesh(), job.claim_folder(run):
        assert cli.main(arguments) == 2
        told = capsys.readouterr().err
        assert "another run is at work there" in told and f"process {os.getpid()} of " in told
    with set_mesh(), job.claim_folder(run):
        pass  # it was let go of


def test_sigterm_in_an_export_leaves_nothing_half_written(configuration, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    process = start(configuration, "export", f"out={out}", *SMALL.split())
    end = time.monotonic() + 300
    while not list(out.glob(".export*")):
        assert process.poll() is None, stderr(configuration)
        assert time.monotonic() < end
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 128 + signal.SIGTERM, stderr(configuration)
    assert not list(out.glob("*export*")) and not list(out.glob(".export*"))
    assert "told to stop" in stderr(configuration)
    process = start(configuration, "export", f"out={out}", *SMALL.split())
    assert process.wait(300) == 0, stderr(configuration)
    assert json.loads((out / "export" / "config.json").read_text())["num_hidden_layers"] == 3
