"""What a step leaves: the terminal's line, TensorBoard's scalars, those of Weights & Biases."""

import logging
import sys
import types

import pytest

from e3jax import files
from e3jax.errors import UserError
from e3jax.training import metrics
from e3jax.training.metrics import Metrics


class Run:
    """What wandb.init returns, as far as it is used."""

    def __init__(self):
        self.logged, self.axes, self.ended = [], {}, None

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, values):
        self.logged.append(values)

    def finish(self, exit_code):
        self.ended = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package; `.run` is the run, `.asked` what it was opened with."""
    fake = types.ModuleType("wandb")
    fake.run, fake.asked, fake.Error = Run(), [], ConnectionError
    fake.Settings = lambda **options: options
    fake.init = lambda **options: fake.asked.append(options) or fake.run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def drawn(monkeypatch):
    """(name, value, step) of what TensorBoard is given."""
    found = []
    monkeypatch.setattr(
        "tensorboardX.SummaryWriter.add_scalar", lambda _, *scalar: found.append(scalar)
    )
    return found


def record(folder):
    record = Metrics(folder, "search", start=0, steps=2)
    record.log(0, {"held_out_kl": 0.5, "keep_probability": [1.0, 0.25]})
    record.log(0, {"loss": 0.25, "kept": 3.0, "tau": 4.0, "tokens": 100.0})
    record.close()


def test_terminal_and_tensorboard(tmp_path, drawn, caplog):
    with caplog.at_level(logging.INFO):
        record(tmp_path)
    assert "loss 0.2500  K 3  tau 4.00" in caplog.text and " tok/s" in caplog.text
    found = {name: (value, step) for name, value, step in drawn}
    assert found["keep_probability/001"] == (0.25, 0) and found["held_out_kl"] == (0.5, 0)
    assert found["tau"] == (4.0, 0) and found["tokens_per_second"][0] > 0
    # The record is the same however fast it was.
    assert "tokens_per_second" not in (tmp_path / "metrics.jsonl").read_text()


def test_weights_and_biases_gets_the_same(tmp_path, wandb, drawn):
    with metrics.weights_and_biases("prunes", "1234", tmp_path, {"seed": 7}):
        record(tmp_path)
    (asked,) = wandb.asked
    assert asked["project"] == "prunes" and asked["id"] == "1234" and asked["resume"] == "allow"
    assert asked["config"] == {"seed": 7}
    assert wandb.run.axes == {"search/*": "search/step"} and wandb.run.ended == 0
    theirs = {k: v for line in wandb.run.logged for k, v in line.items()}
    assert theirs == {"search/step": 0} | {f"search/{name}": value for name, value, _ in drawn}
    record(tmp_path / "later")
    assert len(wandb.run.logged) == 3  # closed


def test_weights_and_biases_is_told_of_failure(tmp_path, wandb):
    with (
        pytest.raises(ZeroDivisionError),
        metrics.weights_and_biases("prunes", "1", tmp_path, {}),
    ):
        raise ZeroDivisionError
    assert wandb.run.ended == 1 and metrics._wandb is None


def test_weights_and_biases_that_is_not_there(tmp_path, monkeypatch, wandb):
    def refuse(**_):
        raise ConnectionError("no API key")

    wandb.init = refuse
    with (
        pytest.raises(UserError, match=r"wandb=prunes: no API key; .*WANDB_MODE=offline"),
        metrics.weights_and_biases("prunes", "1", tmp_path, {}),
    ):
        pass
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(UserError, match=r"wandb=prunes: .*pip install wandb"),
        metrics.weights_and_biases("prunes", "1", tmp_path, {}),
    ):
        pass
    assert list(files.read_lines(tmp_path / "metrics.jsonl")) == []
