"""Search and distillation steps on one GPU, ours and the best of PyTorch's in one run.

    python benchmarks/steps.py distil --shapes 1.7b --tokens 32768
    python benchmarks/steps.py search --shapes 1.7b --tokens 16384

The models have Qwen3's shapes and random weights, the rows 4096 random tokens, the student three
quarters of the layers. Each arm runs in a process of its own without preallocation; its memory is
the greatest that its allocator had in use. An arm's KL is compared with one in float32 before it is
timed. Share: of a bfloat16 product of 8192 x 8192 matrices in the same run, with the operations a
model needs, none that is repeated: one forward pass is 1, causal attention a half of the square; a
distillation is the teacher's pass and three of the student's, a search three of the dense model's,
of which one is shared by M rows where M masks are drawn for a window (`masksM`); it is counted
whole, though ours runs only from the first layer that a mask removes (`firstL`: none before L). Of
a distillation that leaves what comes before the first layer removed as it is (`freeze`), what is
left out is not counted; with the dense model's products in float8 (`float8`) they count as many.
On a mesh of several GPUs (`dataN`, `modelN`) the share is of as many, and GiB are of the GPU that
has most. PyTorch arms need torch and transformers, those with Liger liger-kernel; ours need JAX for
CUDA.
"""

import argparse
import re
import statistics
import sys

from arms import ROW, SHAPES, kept, model_config, run_arm, timed

from e3jax.bench.timing import give, middle


def main() -> None:
    options = parse()
    if options.arm is not None:  # in its own process
        return give(measure(options))
    arguments = sys.argv[1:]
    rate = run_arm(__file__, arguments, "matmul")["rate"]
    print(f"bfloat16 8192^3: {rate / 1e12:.0f} TFLOP/s", flush=True)
    heads = f"{'arm':<44}{'tokens/s':>10}{'spread':>9}{'share':>8}{'GiB':>7}{'first s':>9}"
    print(f"{heads}{'KL':>9}{'waited':>8}")
    for arm in options.arms or ARMS[options.step]:
        found = run_arm(__file__, arguments, arm)
        if "error" in found:
            print(f"{arm:<44}  {found['error']}", flush=True)
            continue
        median, spread = middle(found["seconds"])
        share = options.tokens * flops_per_token(options, arm) / median / rate / gpus(arm)
        print(
            f"{arm:<44}{options.tokens / median:>10,.0f}{spread:>9.1%}{share:>8.3f}"
            f"{found['peak'] / 2**30:>7.1f}{found['first']:>9.0f}{found['kl']:>9.4f}"
            f"{found.get('waited', 0):>8.1%}",
            flush=True,
        )
        print(found.get("profile", ""), end="", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("step", choices=("distil", "search"))
    parser.add_argument("--shapes", choices=SHAPES, default="1.7b")
    parser.add_argument("--layers", type=int, help="of the dense model, instead of its own")
    parser.add_argument("--tokens", type=int, default=32_768, help="a step")
    parser.add_argument(
        "--arms",
        nargs="+",
        help="ours: e3jax:MICROBATCH:REMAT[:masksM][:firstL][:hidden][:freeze][:float8][:cache]"
        "[:dataN][:modelN]",
    )
    parser.add_argument("--documents", type=int, default=1, help="in each of our rows")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens whose logits exist")
    parser.add_argument("--profile", action="store_true", help="ours: where a step's time goes")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for arm in options.arms or ():
        if options.tokens % (ROW * number(arm, "masks")):
            parser.error(f"--tokens: {arm} needs a multiple of {ROW * number(arm, 'masks')}")
    return options


def measure(options: argparse.Namespace) -> dict:
    """The outcome of one arm, in this process."""
    name, _, details = options.arm.partition(":")
    if name == "matmul":
        return {"rate": matmul_rate()}
    if name == "torch":
        from peer import peer

        return peer(options, *details.split(":"), masks=number(details, "masks"))
    from ours import ours, read_arm

    return ours(options, read_arm(details))


def number(arm: str, word: str) -> int:
    """N where an arm's name says wordN, else 1."""
    found = re.search(rf":{word}(\d+)", arm)
    return int(found[1]) if found else 1


def gpus(arm: str) -> int:
    return number(arm, "data") * number(arm, "model")


def flops_per_token(options: argparse.Namespace, arm: str) -> float:
    from e3jax.distill.freezing import frozen_layers
    from e3jax.planning import cost

    def forward(cfg):
        return cost.body_flops(cfg, ROW) + cost.head_flops(cfg)

    dense = model_config(options.shapes, options.layers)
    if options.step == "search":
        return (2 + 1 / number(arm, "masks")) * forward(dense)
    keep = kept(dense.num_layers, number(arm, "first") if ":first" in arm else 0)
    frozen = frozen_layers(keep) if ":freeze" in arm else 0
    trained = 3 * forward(dense.take_layers(keep[frozen:]))
    if frozen and dense.tied:  # the head has no gradient
        trained -= cost.head_flops(dense)
    return trained + (0 if ":cache" in arm else forward(dense))


def matmul_rate() -> float:
    """FLOP/s of a bfloat16 product of random 8192 x 8192 matrices."""
    import jax
    import jax.numpy as jnp

    a, b = jax.random.normal(jax.random.key(0), (2, 8192, 8192), jnp.bfloat16)

    @jax.jit
    def product(a, b):  # ten of them, so that starting one is nothing
        return jax.lax.fori_loop(0, 10, lambda _, x: (x @ b * 0.01).astype(x.dtype), a)

    _, seconds = timed(lambda: product(a, b).block_until_ready(), lambda: None)
    return 10 * 2 * 8192**3 / statistics.median(seconds)


ARMS = {
    "distil": (
        "e3jax:8:elementwise",
        "e3jax:8:elementwise:float8",
        "e3jax:8:elementwise:first8:freeze",
        "e3jax:4:elementwise",
        "e3jax:4:selective",
        "torch:liger:fused",
        "torch:liger:fused:micro4",
        "torch:compile:fused",
        "torch:liger:checkpoint:fused",
    ),
    "search": (
        "e3jax:4:elementwise",
        "e3jax:4:elementwise:first8",
        "e3jax:2:elementwise",
        "torch:liger:fused",
        "torch:liger:checkpoint:fused",
        "e3jax:1:elementwise:masks4",
        "torch:liger:fused:masks4",
    ),
}

if __name__ == "__main__":
    main()
