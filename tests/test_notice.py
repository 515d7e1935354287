"""A notice to stop, in every phase: what is saved, what is left, and how soon it ends."""

import os
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest
from jax._src import distributed
from jax.experimental import multihost_utils

from e3jax import notice
from e3jax.training.checkpoint import open_checkpoints
from test_training import lines, toy_fit, toy_score
from training_tiny import assert_bitwise

SPINS = """
import sys
import jax, jax.numpy as jnp
from e3jax import notice
notice.GRACE_S = 2.0
with notice.listen():
    print("listening", flush=True)
    jax.jit(lambda: jax.lax.while_loop(lambda n: n >= 0, lambda n: (n + 1) % 7, 0))().item()
"""


def tell():
    """SIGTERM to this process, whose handler has run when it returns or raised."""
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):
        time.sleep(0.001)


def stopped(folder, **changes):
    with pytest.raises(SystemExit) as found, notice.listen():
        toy_fit(folder, **changes)
    assert found.value.code == 143 and not notice.told()


def steps_saved(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints" / "steps").glob("[0-9]*"))


def score_and(at):
    """The toy's evaluation, in the midst of which the notice comes at a step."""
    come = []

    def evaluate(step, state):
        if step == at and not come:
            come.append(step)
            tell()
        return toy_score(step, state)

    return evaluate


@pytest.mark.parametrize("at", [4, 8, 12])
def test_in_an_evaluation(tmp_path, one_device, at):
    """It is broken off, the state before it saved; the next run makes it, and ends the same."""
    whole = toy_fit(tmp_path / "whole")
    stopped(tmp_path / "cut", evaluate=score_and(at))
    assert steps_saved(tmp_path / "cut")[-1] == at
    assert_bitwise(toy_fit(tmp_path / "cut"), whole)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    before = steps_saved(tmp_path / "cut")
    assert_bitwise(toy_fit(tmp_path / "cut", last=0), whole)  # nothing is due any more
    assert steps_saved(tmp_path / "cut") == before


def test_before_the_first_step(tmp_path, one_device):
    """There is nothing to save."""
    stopped(tmp_path, evaluate=score_and(0))
    assert steps_saved(tmp_path) == []


def test_between_steps(tmp_path, one_device, monkeypatch):
    """At the next step, wherever checkpoints are due."""
    whole, vote, seen = toy_fit(tmp_path / "whole", evaluate_every=5), notice.vote, []

    def told_at_the_sixth(step):
        seen.append(1)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return vote(step)

    monkeypatch.setattr(notice, "vote", told_at_the_sixth)
    stopped(tmp_path / "cut", evaluate_every=5)
    assert steps_saved(tmp_path / "cut")[-1] in (7, 8)
    monkeypatch.undo()
    assert_bitwise(toy_fit(tmp_path / "cut", evaluate_every=5), whole)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_the_notice_of_the_platform(tmp_path, one_device, monkeypatch):
    """jax's preemption service names a step at which all processes save."""
    monkeypatch.setattr(distributed.global_state, "preemption_sync_manager", object())
    asked = []
    monkeypatch.setattr(
        multihost_utils,
        "reached_preemption_sync_point",
        lambda step: asked.append(step) or step == 6,
    )
    with pytest.raises(SystemExit) as found:
        toy_fit(tmp_path, evaluate_every=20)
    assert found.value.code == 143
    # Its thread has ended, though what was raised still holds the loop's frame.
    assert not [x for x in threading.enumerate() if x.name.startswith("prefetch")]
    assert sorted(set(asked)) == list(range(1, 8))  # Orbax asks as well, at the steps it saves
    assert steps_saved(tmp_path)[-1] == 7  # the one under way when the answer was there


def test_in_compiled_code_that_does_not_come_back(tmp_path):
    """As a compilation of many minutes: the process ends all the same, and soon."""
    process = subprocess.Popen([sys.executable, "-c", SPINS], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"listening\n"
    time.sleep(1)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert time.monotonic() - begun < 10


def test_a_slow_save_is_not_cut_short(tmp_path, one_device, monkeypatch):
    """The patience with compiled code does not count while a checkpoint is written."""
    monkeypatch.setattr(notice, "GRACE_S", 0.2)
    monkeypatch.setattr(notice, "LOOK_S", 0.05)
    left = []
    monkeypatch.setattr(notice.processes, "leave", lambda code, _: left.append(code))
    with pytest.raises(SystemExit), notice.listen(), notice.held():
        tell()
        with open_checkpoints(tmp_path, {}) as checkpoints:
            checkpoints.save(1, {"x": jax.numpy.ones(3)})
            time.sleep(1)
    assert left == []


def test_a_program_that_catches_the_exit_is_ended(monkeypatch):
    monkeypatch.setattr(notice, "GRACE_S", 0.2)
    monkeypatch.setattr(notice, "LOOK_S", 0.05)
    left = []
    monkeypatch.setattr(notice.processes, "leave", lambda code, _: left.append(code))
    with notice.listen():
        with pytest.raises(SystemExit):
            tell()
        time.sleep(1)
    assert left == [143]


class Told:
    """A notice comes while this is thrown away; what a destructor raises is swallowed."""

    def __del__(self):
        tell()


def test_an_exit_that_is_swallowed_is_raised_again(monkeypatch):
    monkeypatch.setattr(notice, "LOOK_S", 0.05)
    passed = []
    with pytest.raises(SystemExit), notice.listen():
        Told()
        passed.append("swallowed")
        time.sleep(5)
        passed.append("went on")
    assert passed == ["swallowed"]
