"""What happens around a run: damaged disks, other users of the files, slow ends."""

import errno
import logging
import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e3jax import files, mesh, progress
from e3jax.training import checkpoint
from e3jax.training.checkpoint import checksum, open_checkpoints
from e3jax.training.metrics import Metrics, read_metrics
from training_tiny import abstract, assert_bitwise, set_mesh


def numbers(step):
    """Random bits, which no compression shortens: most bytes on disk are theirs."""
    values = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    return {"x": jnp.asarray(values) * step, "n": {"count": jnp.int32(step)}}


def restore(folder):
    with open_checkpoints(folder, {}) as checkpoints:
        return checkpoints.restore(abstract(numbers(0)))


@pytest.fixture
def saved(tmp_path, one_device):
    with open_checkpoints(tmp_path / "c", {}) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, numbers(step))
    return tmp_path / "c"


def flip(data, place):
    data[place] ^= 0x10


def blank(data, place):
    data[place : place + 4096] = bytes(4096)


@pytest.mark.parametrize("damage", [flip, blank])
def test_damage_inside_the_arrays_is_noticed(saved, caplog, damage):
    """Orbax itself reads a file with a flipped bit without complaint."""
    path = max((p for p in saved.glob("steps/2/**/*") if p.is_file()), key=os.path.getsize)
    data = bytearray(path.read_bytes())
    damage(data, len(data) // 2)
    path.write_bytes(data)
    step, state = restore(saved)
    assert step == 1
    assert_bitwise(state, numbers(1))
    assert "step 2 cannot be read: " in caplog.text
    if damage is flip:
        assert "ValueError: the arrays are not those that were saved" in caplog.text


SAVE = """
import pathlib, re, sys

import numpy as np

from e3jax import mesh
from e3jax.training import checkpoint

def most():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])

checkpoint.HOST_BYTES = int(sys.argv[2])
checkpoint.checksum = lambda _: zero  # which on a CPU takes as much as the state
rng, zero = np.random.default_rng(0), mesh.replicate(np.uint32(0))
with checkpoint.open_checkpoints(pathlib.Path(sys.argv[1]), {}) as checkpoints:
    checkpoints.save(1, {"x": mesh.replicate(rng.random(1000, np.float32))})
state = {f"x{i}": mesh.replicate(rng.random((16, 2**18), np.float32)) for i in range(16)}
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the most so far is what is there now
before = most()
with checkpoint.open_checkpoints(pathlib.Path(sys.argv[1]), {}) as checkpoints:
    checkpoints.save(2, state)
print((most() - before) / 1024)
"""


@pytest.mark.slow
def test_a_save_holds_a_bounded_part_of_the_host(tmp_path):
    """MiB beside a state of 256 MiB: it used to be another 256. An array above the bound is saved
    too."""

    def beside(bound):
        command = [sys.executable, "-c", SAVE, str(tmp_path / str(bound)), str(bound)]
        given_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # at once, what is freed
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=given_back)
        return float(done.stdout)

    assert beside(1000) < 100 < 180 < beside(10**9)


def test_what_is_larger_than_the_bound_is_read(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "HOST_BYTES", 1000)
    step, state = restore(saved)
    assert step == 2
    assert_bitwise(state, numbers(2))


def test_checksum_is_of_every_bit_and_of_no_mesh():
    rng = np.random.default_rng(0)
    tree = {
        "a": rng.normal(size=(8, 6)).astype(np.float32),
        "b": np.zeros((4, 4), jnp.bfloat16),
        "step": np.array(7, np.int32),
    }
    found = set()
    for shape in ((1, 1, 1), (1, 8, 1), (2, 2, 2)):
        with set_mesh(*shape):
            a = jax.device_put(tree["a"], mesh.sharding(("embed", "mlp"), tree["a"].shape))
            found.add(int(checksum({**mesh.replicate(tree), "a": a})))
    assert found == {int(checksum(tree))}

    for name in tree:
        changed = {**tree, name: tree[name].copy()}
        changed[name].reshape(-1).view(np.uint8)[0] ^= 1
        found.add(int(checksum(changed)))
    found.add(int(checksum({**tree, "b": -tree["b"]})))  # the sign of zero
    found.add(int(checksum({**tree, "a": np.full_like(tree["a"], np.nan)})))
    assert len(found) == 6


def test_a_slow_last_evaluation_is_no_further_step(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(progress, "TELL_EVERY_S", -1.0)
    record = Metrics(tmp_path, "toy", start=0, steps=2)
    with caplog.at_level(logging.INFO):
        for step in range(2):
            record.log(step, {"loss": 1.0, "tokens": 8.0})
        record.log(2, {"held_out_kl": 0.5})
    record.close()
    told = [line.getMessage().split()[1] for line in caplog.records]
    assert told == ["1/2", "2/2", "2:"]  # the figures are of the state after two steps
    assert read_metrics(tmp_path)[-1] == {"step": 2, "held_out_kl": 0.5}


def test_files_are_as_readable_as_the_user_has_it(tmp_path):
    old = os.umask(0o027)
    try:
        files.write_json(tmp_path / "mask.json", 1)
    finally:
        os.umask(old)
    assert (tmp_path / "mask.json").stat().st_mode & 0o777 == 0o640


def test_a_disk_that_is_full_for_tensorboard_alone(tmp_path, monkeypatch):
    """Its thread ends, and nobody takes from its queue any more: an error, and no waiting."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    record = Metrics(tmp_path, "toy", start=0, steps=1000)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.write_event", full)
    with pytest.raises(OSError, match="TensorBoard's file cannot be written") as found:
        for step in range(1000):
            record.log(step, {"loss": 1.0})
            time.sleep(0.01)
    assert found.value.errno == errno.ENOSPC
    record.close()
