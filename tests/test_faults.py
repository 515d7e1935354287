"""What a disk, a clock and other runs do to a run: it ends with a message, and goes on after."""

import json
import os
import random
import re
import signal
import subprocess
import time

import pytest

from e3jax import cli, configure, files, job
from test_restart import ROOT, configuration, count, start, stderr  # noqa: F401  a fixture
from test_training import lines, toy_fit
from training_tiny import assert_bitwise, set_mesh

CACHE = "distill.teacher=cache distill.top_k=8 distill.microbatch=1"
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


def disturb(configuration, process, there, what):  # noqa: F811
    """Does `what` when it is `there`; returns the exit code."""
    end = time.monotonic() + 300
    while not there():
        assert process.poll() is None, stderr(configuration)
        assert time.monotonic() < end
        time.sleep(0.002)
    what()
    return process.wait(300)


@pytest.fixture(autouse=True)
def _compile_fast(monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


@pytest.mark.slow
def test_a_disk_that_fills_up_in_every_stage(configuration, small_disk):  # noqa: F811
    """In the search, the teacher cache, distillation and the export: a message, and on it goes."""
    out = small_disk / "run"
    overrides = (f"out={out}", *SMALL.split(), *CACHE.split())
    search, distil = out / "search" / "metrics.jsonl", out / "distill" / "metrics.jsonl"
    for there in (
        lambda: count(search) >= 4,
        lambda: "teacher cache: " in stderr(configuration),
        lambda: count(distil) >= 4,
    ):
        process = start(configuration, "distill", *overrides)
        assert disturb(configuration, process, there, lambda: fill(small_disk)) == 2
        assert re.search(r"\nerror: .*No space left on device", stderr(configuration))
        assert 'e3jax/cli.py", line' not in stderr(configuration)  # Orbax's threads log theirs
        (small_disk / "filler").unlink()
    process = start(configuration, "distill", *overrides)
    assert process.wait(300) == 0, stderr(configuration)

    fill(small_disk)
    os.truncate(small_disk / "filler", os.path.getsize(small_disk / "filler") - 60_000)
    process = start(configuration, "export", *overrides)
    assert process.wait(300) == 2
    assert re.search(r"error: .*export: needs [\d,]+ bytes", stderr(configuration))
    assert not list(out.glob(".export*")) + list(out.glob("export*"))
    (small_disk / "filler").unlink()
    process = start(configuration, "export", *overrides)
    assert process.wait(300) == 0, stderr(configuration)


@pytest.mark.slow
def test_a_folder_made_read_only_midway(configuration, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    process = start(configuration, "search", f"out={out}", *SMALL.split())
    checkpoints = str(out / "search" / "checkpoints")

    def make_read_only():
        mount("--bind", checkpoints, checkpoints)
        for _ in range(500):  # it is refused while a save has a file open
            again = ["mount", "-o", "remount,bind,ro", checkpoints]
            if not subprocess.run(again, capture_output=True).returncode:
                return
            time.sleep(0.01)
        mount("-o", "remount,bind,ro", checkpoints)

    try:
        record = out / "search" / "metrics.jsonl"
        code = disturb(configuration, process, lambda: count(record) >= 4, make_read_only)
    finally:
        process.kill()
        subprocess.run(["umount", "-l", checkpoints], capture_output=True)
    assert code == 2, stderr(configuration)
    assert "\nerror: " in stderr(configuration) and "could not be saved" in stderr(configuration)
    assert 'e3jax/cli.py", line' not in stderr(configuration)
    process = start(configuration, "search", f"out={out}", *SMALL.split())
    assert process.wait(300) == 0, stderr(configuration)


def test_a_second_run_in_the_same_folder_is_refused(configuration, tmp_path, capsys):  # noqa: F811
    run = configure.load_run(configuration, [f"out={tmp_path}/run"])
    arguments = ["search", "--config", str(configuration), f"out={tmp_path}/run"]
    with set_mesh(), job.claim_folder(run):
        assert cli.main(arguments) == 2
        told = capsys.readouterr().err
        assert "another run is at work there" in told and f"process {os.getpid()} of " in told
    with set_mesh(), job.claim_folder(run):
        pass  # it was let go of


@pytest.mark.slow
def test_a_second_run_in_the_same_teacher_cache_is_refused(configuration, tmp_path, capsys):  # noqa: F811
    """While the first one writes; one that reads what is finished asks nobody."""
    mask = {"selector": "given", "num_layers": 4, "keep": [0, 2, 3]}
    (tmp_path / "mask.json").write_text(json.dumps(mask))
    cache = tmp_path / "cache"
    overrides = [f"distill.mask={tmp_path}/mask.json", f"distill.cache={cache}", *CACHE.split()]
    overrides.append("distill.steps=24")  # all windows, and little training
    second = ["distill", "--config", str(configuration), f"out={tmp_path}/second", *overrides]
    second += ["distill.microbatch=8"]  # for the eight devices here
    process = start(configuration, "distill", f"out={tmp_path}/first", *overrides)

    def refused():
        process.send_signal(signal.SIGSTOP)
        assert not (cache / "finished.json").exists()
        assert cli.main(second) == 2
        told = capsys.readouterr().err
        assert f"error: distill.cache={cache}: another run is at work there" in told
        assert f"(process {process.pid} of " in told
        process.send_signal(signal.SIGCONT)

    try:
        assert disturb(configuration, process, (cache / "ids" / "c").exists, refused) == 0
    finally:
        process.kill()
    assert not (cache / ".lock").exists()
    with files.locked(cache / ".lock", "somebody else"):
        assert cli.main(second) == 0


@pytest.mark.slow
def test_signals_in_every_stage(configuration, tmp_path):  # noqa: F811
    """SIGTERM and SIGKILL in the search, the teacher cache and the export (distillation:
    test_restart.py, which compares the bits; so does kill_twenty.py for all of them)."""
    out = tmp_path / "run"
    # A cache of all 168 windows: a hundred are left when the first file of it is there.
    overrides = (f"out={out}", *SMALL.split(), *CACHE.split(), "distill.steps=24")

    def send(code, there):
        process = start(configuration, "export", *overrides)
        ended = disturb(configuration, process, there, lambda: process.send_signal(code))
        assert ended == (-code if code == signal.SIGKILL else 128 + code), stderr(configuration)
        if code == signal.SIGTERM:
            assert "told to stop" in stderr(configuration)
        assert "Traceback" not in stderr(configuration)

    def exporting():
        return bool(list(out.glob(".export.partial*")))

    send(signal.SIGTERM, lambda: count(out / "search" / "metrics.jsonl") >= 5)
    send(signal.SIGKILL, lambda: (out / "teacher" / "ids" / "c").exists())
    send(signal.SIGTERM, lambda: "teacher cache: " in stderr(configuration))
    assert not (out / "teacher" / "finished.json").exists()
    send(signal.SIGKILL, exporting)
    assert exporting() and not (out / "export").exists()
    for left in out.glob(".export.partial*"):
        left.rename(tmp_path / left.name)  # so that the next one's beginning is seen
    send(signal.SIGTERM, exporting)
    assert not (out / "export").exists()
    process = start(configuration, "export", *overrides)
    assert process.wait(300) == 0, stderr(configuration)
    assert not exporting()  # whatever the others left
    assert json.loads((out / "export" / "config.json").read_text())["num_hidden_layers"] == 3


def test_a_clock_that_jumps(tmp_path, one_device, monkeypatch):
    """Ten hours ahead or back, at every look: same state, same record, no save given up."""
    whole = toy_fit(tmp_path / "whole")
    true, rng = time.time, random.Random(0)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: true() + rng.uniform(-36000, 36000))
        with pytest.raises(KeyboardInterrupt):
            toy_fit(tmp_path / "cut", 7)
        assert_bitwise(toy_fit(tmp_path / "cut"), whole)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    for source in (ROOT / "e3jax").rglob("*.py"):
        assert "time.time(" not in source.read_text(), f"{source}: use time.monotonic"
