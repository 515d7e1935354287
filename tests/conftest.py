"""Eight CPU devices for every test, and what several tests share."""

import atexit
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Most of the tests' time is compilation: workers, and the processes that tests start, share it.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="e3jax-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

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


@pytest.fixture(scope="module")
def compiled_fast():
    """For modules whose time is compilation: what XLA does to an operation after it is placed takes
    half of it."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def shared() -> pathlib.Path:
    """The folder of larger checkpoints and data beside the project; skips where there is none."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared")
    return SHARED
