"""Accelerators as their makers describe them, and topologies as they are rented.

`v5p:4x4x2` is a slice of TPUs by its shape in chips, `h100:8` a host of GPUs by their number, and
`2xv5p:4x4x2` or `4xh200:8` several of them over the data-center network.
"""

import dataclasses
import math
import re

from e3jax.errors import UserError

GB, GIB = 10**9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, in bytes, FLOP/s and bytes/s. Interconnects one way: what a chip can receive.

    `devices`: how many JAX devices it is; each has its share of everything.
    """

    memory: int
    flops: float  # bfloat16, dense
    memory_bandwidth: float
    interconnect: float  # ICI within a slice (all links together), NVLink within a host
    network: float  # between slices or hosts
    shape: int = 0  # dimensions of a TPU slice; 0 = not a TPU
    platform_name: str = ""  # what libtpu calls it
    devices: int = 1
    host: tuple[int, ...] = ()  # chips of a host, by dimension: a slice is made of whole hosts


def _tpu(name: str, gib: int, tflops: float, hbm: float, ici: float, dcn: float, **more) -> Chip:
    """GiB, TFLOP/s, GB/s, GB/s both ways, Gbit/s."""
    return Chip(
        gib * GIB,
        tflops * 1e12,
        hbm * GB,
        ici / 2 * GB,
        dcn / 8 * GB,
        platform_name=name,
        **more,
    )


# TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, "System architecture"; where a page
# gives the network of a host, it is shared by its chips. v4's network is not published: v5p's.
# GPU: data sheets of H100 SXM, H200 SXM and HGX B200, without sparsity; NVLink one way; one
# 400 Gbit/s adapter a GPU, as in DGX and the clouds' eight-GPU hosts.
THREE, TWO = {"shape": 3, "host": (2, 2, 1)}, {"shape": 2, "host": (2, 2)}
CHIPS = {
    "v4": _tpu("v4", 32, 275, 1228, 600, 50, **THREE),
    "v5e": _tpu("v5e", 16, 197, 819, 400, 25, **TWO),
    "v5p": _tpu("v5p", 95, 459, 2765, 1200, 50, **THREE),
    "v6e": _tpu("v6e", 32, 918, 1638, 800, 100, **TWO),
    "tpu7x": _tpu("tpu7x", 192, 2307, 7380, 1200, 100, devices=2, **THREE),
    "h100": Chip(80 * GB, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Chip(141 * GB, 989e12, 4.8e12, 450e9, 50e9),
    "b200": Chip(180 * GB, 2250e12, 7.7e12, 900e9, 50e9),
}
FORM = re.compile(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)")


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` equal slices (or hosts) of `shape` chips each."""

    text: str
    name: str
    slices: int
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name]

    @property
    def is_tpu(self) -> bool:
        return bool(self.chip.shape)

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def slice_name(self) -> str:
        """What libtpu calls one slice."""
        return f"{self.chip.platform_name}:{'x'.join(map(str, self.shape))}"

    @property
    def memory(self) -> int:
        """Bytes a device."""
        return self.chip.memory // self.chip.devices


def parse(text: str) -> Topology:
    """`v5p:4x4x2`, `h100:8`, `2xv6e:4x8`. Raises UserError that lists what is known."""
    found = FORM.fullmatch(text.lower())
    if found is None or found[2] not in CHIPS:
        raise UserError(
            f"--topology {text}: expected a chip and a shape, such as v5p:4x4x2, v6e:4x8 or h100:8 "
            f"(2xv5p:4x4x2 for two slices); known chips: {', '.join(CHIPS)}"
        )
    slices, name = int(found[1] or 1), found[2]
    shape = tuple(map(int, found[3].split("x")))
    chip = CHIPS[name]
    if len(shape) != (chip.shape or 1):
        example = {3: "4x4x2", 2: "4x8", 0: "8"}[chip.shape]
        raise UserError(f"--topology {text}: the shape of {name} is told as in {name}:{example}")
    if not slices or not all(shape) or any(n % m for n, m in zip(shape, chip.host)):
        hosts = "x".join(map(str, chip.host))
        whole = f"; a slice is made of whole hosts of {hosts} chips" if chip.host else ""
        raise UserError(f"--topology {text}: there is no such slice{whole}")
    return Topology(text.lower(), name, slices, shape)
