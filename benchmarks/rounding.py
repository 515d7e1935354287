"""What float8 rounds, by the kernels of e3jax/hopper/rows.py and by XLA alone, on one Hopper.

    python benchmarks/rounding.py --shapes 4b --tokens 16384        # --forward: the whole model

Norms, attention's results and silu(gate) up of random numbers, several arrays in a program, of more
bytes than the cache. What a kernel gives is compared with XLA's before it is timed. TB/s: of what
it must read and write. --forward: the dense model's forward pass, by kernel (--profile: where its
time goes), in float8 by XLA alone, and in bfloat16.
"""

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from arms import ROW, SHAPES, model_config, timed
from ours import profile, random_windows, whole_batch

from e3jax import devices, mesh
from e3jax.hopper import rows
from e3jax.models import decoder, float8
from e3jax.models.norm import rms_norm

COPIES = 8
EPS = 1e-6


def main() -> None:
    options = parse()
    if options.forward:
        with jax.set_mesh(mesh.make_mesh(devices=jax.devices()[:1])):
            return forward(options)
    print(f"{'':<24}{'programs':>9}{'stages':>7}{'ms':>8}{'TB/s':>7}{'XLA ms':>8}")
    for name in CASES:
        time_kernel(name, options)


def time_kernel(name: str, options: argparse.Namespace) -> None:
    kernel, alone, width_of, arrays = CASES[name]
    count, width = options.tokens, width_of(*SHAPES[options.shapes])
    numbers = jax.random.normal(jax.random.key(0), (COPIES, arrays, count, width), jnp.bfloat16)
    scales = jax.random.uniform(jax.random.key(1), (arrays, count))
    weight = 1 + 0.1 * jax.random.normal(jax.random.key(2), (width,))
    copies = [list(each) for each in numbers]
    moved = count * width * (2 * arrays + 1)
    by_xla = several(alone, copies, scales, weight)
    for rows.PROGRAMS, rows.STAGES in itertools.product(options.programs, options.stages):
        check(kernel, alone, copies[0], scales, weight)
        spent = several(kernel, copies, scales, weight)
        print(
            f"{f'{name} {count} x {width}':<24}{rows.PROGRAMS:>9}{rows.STAGES:>7}{spent:>8.4f}"
            f"{moved / spent / 1e9:>7.2f}{by_xla:>8.4f}",
            flush=True,
        )


def by_xla(of: Callable[..., jax.Array]) -> Callable[..., Any]:
    return lambda *given: float8.rounded(of(*given), 1)[:2]


def silu(x: list[jax.Array], scales: jax.Array, weight: jax.Array) -> jax.Array:
    gate, up = (y.astype(jnp.float32) * s[:, None] for y, s in zip(x, scales, strict=True))
    return jax.nn.silu(gate) * up


# By kernel, by XLA, the width of a row by SHAPES, arrays that it is made of.
CASES = {
    "norm": (
        lambda x, scales, weight: rows.rounded_norm(x[0], weight, EPS),
        by_xla(lambda x, scales, weight: rms_norm(x[0], weight, EPS)),
        lambda layers, width, mlp, heads, *_: width,
        1,
    ),
    "rows": (
        lambda x, scales, weight: rows.rounded_rows(x[0]),
        by_xla(lambda x, scales, weight: x[0]),
        lambda layers, width, mlp, heads, *_: heads * 128,
        1,
    ),
    "silu": (
        lambda x, scales, weight: rows.rounded_silu(x[0], scales[0], x[1], scales[1]),
        by_xla(silu),
        lambda layers, width, mlp, heads, *_: mlp,
        2,
    ),
}


def finished(program: Callable[..., Any], *given: Any) -> Any:
    return jax.block_until_ready(program(*given))


def milliseconds(call: Callable[[], Any]) -> float:
    _, seconds = timed(call, lambda: None)
    return 1e3 * statistics.median(seconds)


def several(fn: Callable[..., Any], copies: list, *more: jax.Array) -> float:
    """Milliseconds of one call, of as many in a program as there are copies."""
    program = jax.jit(lambda copies, *more: [fn(x, *more) for x in copies])
    return milliseconds(functools.partial(finished, program, copies, *more)) / len(copies)


def check(kernel: Callable[..., Any], alone: Callable[..., Any], *given: Any) -> None:
    """The same numbers, but for some that are as near to one as to another."""
    found, wanted = (jax.jit(functools.partial(fn))(*given) for fn in (kernel, alone))
    numbers, scale = (np.asarray(x, np.float32) for x in found)
    others, other_scale = (np.asarray(x, np.float32) for x in wanted)
    np.testing.assert_allclose(scale, other_scale, rtol=0.01)
    assert (np.abs(numbers - others) <= np.abs(others) / 6 + 2**-9).all()
    assert (numbers != others).mean() < 0.05


def forward(options: argparse.Namespace) -> None:
    cfg = model_config(options.shapes)
    params = decoder.init_params(jax.random.key(0), cfg, jnp.bfloat16)
    count = options.tokens // ROW
    batch = whole_batch(random_windows(count, 1), count)
    for name in ("float8, by kernel", "float8, by XLA", "bfloat16"):

        def run(params, batch, name=name):
            params = params if name == "bfloat16" else float8.marked(params, cfg)
            return decoder.hidden(params, batch, cfg, dtype=jnp.bfloat16, remat="none")

        is_hopper = devices.is_hopper
        if name == "float8, by XLA":
            devices.is_hopper = lambda: False
        program = jax.jit(run).lower(params, batch).compile()
        devices.is_hopper = is_hopper
        call = functools.partial(finished, program, params, batch)
        print(f"{options.shapes} {count} rows, {name:<20}{milliseconds(call):>8.2f} ms", flush=True)
        if options.profile and name == "float8, by kernel":
            print(profile(call, lambda: None), end="")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", choices=SHAPES, default="4b")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--programs", type=int, nargs="+", default=[rows.PROGRAMS])
    parser.add_argument("--stages", type=int, nargs="+", default=[rows.STAGES])
    parser.add_argument("--forward", action="store_true")
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
