"""Eight CPU devices for every test, and what several tests share."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pathlib

import jax
import pytest

from e3jax import mesh

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture
def one_device():
    """A mesh of a single device, set."""
    with jax.set_mesh(mesh.make_mesh(1, 1, 1, devices=jax.devices()[:1])) as found:
        yield found


@pytest.fixture
def shared() -> pathlib.Path:
    """The folder of larger checkpoints and data beside the project; skips where there is none."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared")
    return SHARED
