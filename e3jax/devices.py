"""What computes: the devices of the mesh that is set, or those that they stand for in plans."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_STOOD_FOR: contextvars.ContextVar[str | None] = contextvars.ContextVar("stood_for", default=None)


@contextlib.contextmanager
def standing_for(name: str) -> Iterator[None]:
    """Within, the mesh's devices stand for those of another platform, in plans: what is traced is
    to need its memory, not to compute."""
    token = _STOOD_FOR.set(name)
    try:
        yield
    finally:
        _STOOD_FOR.reset(token)


def is_stood_for() -> bool:
    """Whether the mesh's devices stand for others (`standing_for`)."""
    return _STOOD_FOR.get() is not None


def platform() -> str | None:
    """What the mesh that is set is made of, such as "tpu"; None where no mesh or device says it.

    Compiled ahead of time for a TPU this is "tpu", while jax.default_backend() is the host's own.
    """
    if is_stood_for():
        return _STOOD_FOR.get()
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.platform


def is_hopper() -> bool:
    """Whether the mesh that is set is made of NVIDIA GPUs of Hopper's kind, that are there."""
    return _capability() == "9.0"


def has_float8() -> bool:
    """Whether it is made of NVIDIA GPUs that multiply in float8: Ada, Hopper and later ones."""
    number = _capability()
    return number.replace(".", "").isdigit() and float(number) >= 8.9  # AMD's are words


def _capability() -> str:
    """The number of the GPUs' kind, such as "9.0"; empty where there are none."""
    there = platform() == "gpu" and not is_stood_for()
    return jax.devices()[0].compute_capability if there else ""
