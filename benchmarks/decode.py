"""Greedy decoding on one GPU, ours and transformers' with a static cache and torch.compile.

    python benchmarks/decode.py --shapes 1.7b --batch 1 64

Models have Qwen3's shapes and random bfloat16 weights, prompts are 128 random tokens, all answers
256 long. Each arm runs in a process of its own. Tokens/s: answers of all rows, reading the prompts
included. Floor: the milliseconds in which the bytes that a token needs, weights and half a cache,
are read at the speed of a copy in the same run. GiB: ours has the parameters twice, as in a run. A
forward pass in float32 over our own answers says that each token was the best, or within rounding
of it.
"""

import argparse
import sys

from arms import SHAPES, VOCAB, build_peer, depth, model_config, run_arm, timed

from e3jax.bench import steps
from e3jax.bench.timing import give, middle
from e3jax.bench.work import decode_bytes

PROMPT, ANSWER = 128, 256


def main() -> None:
    options = parse()
    if options.arm is not None:  # in its own process
        return give(ARMS[options.arm](options, options.batch[0]))
    copied = run_arm(__file__, [], "copy")["bytes_per_s"]
    print(f"copies: {copied / 1e12:.2f} TB/s")
    print(
        f"{'arm':<14}{'batch':>6}{'tokens/s':>10}{'ms/token':>10}{'spread':>8}{'floor':>7}{'GiB':>7}"
    )
    for batch in options.batch:
        cfg = model_config(options.shapes)
        floor = decode_bytes(cfg, batch, PROMPT + ANSWER / 2, 2) / copied * 1e3
        arguments = ["--shapes", options.shapes, "--batch", str(batch)]
        for arm in ("e3jax", "transformers"):
            found = run_arm(__file__, arguments, arm)
            if "error" in found:
                print(f"{arm:<14}{batch:>6}  {found['error']}", flush=True)
                continue
            median, spread = middle(found["seconds"])
            print(
                f"{arm:<14}{batch:>6}{batch * ANSWER / median:>10,.0f}"
                f"{median / ANSWER * 1e3:>10.2f}{spread:>8.1%}{floor:>7.2f}"
                f"{found['peak'] / 2**30:>7.1f}",
                flush=True,
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", choices=SHAPES, default="1.7b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    return parser.parse_args(sys.argv[1:])


def copy(options: argparse.Namespace, batch: int) -> dict:
    """Bytes a second, read and written, of a copy of 2 GiB."""
    import torch

    x = torch.empty(2**30, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)
    _, seconds = timed(lambda: y.copy_(x), torch.cuda.synchronize)
    return {"bytes_per_s": 2 * x.nbytes / middle(seconds)[0]}


def ours(options: argparse.Namespace, batch: int) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from e3jax import mesh
    from e3jax.models import decoder

    cfg = model_config(options.shapes)
    prompts = steps.random_prompts(VOCAB, batch, PROMPT, 0)
    with jax.set_mesh(mesh.make_mesh()):
        params = decoder.init_params(jax.random.key(0), cfg, jnp.bfloat16)
        made = steps.ours(params, cfg, prompts, jnp.bfloat16)
        found = answered(made)
        check(params, cfg, np.concatenate([prompts, made.answer(ANSWER)], axis=1)[:2])
    return found


def answered(made: steps.Steps) -> dict:
    """Seconds of whole answers, and the memory."""
    first, seconds = timed(lambda: made.answer(ANSWER), lambda: None)
    return {"first": first, "seconds": seconds, "peak": made.memory()}


def check(params, cfg, rows) -> None:
    """Each answer's token is the best by float32, or nearer to it than a twentieth of the way from
    the best to the average one, where bfloat16 cannot tell."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from e3jax import mesh
    from e3jax.distill.terms import at_ids
    from e3jax.models import decoder

    time = rows.shape[1]
    ones = np.ones_like(rows)
    positions = np.broadcast_to(np.arange(time, dtype=np.int32), rows.shape)
    batch = decoder.Batch(rows, positions, ones, rows, ones.astype(bool), documents=1)

    @jax.jit
    def gaps(params, batch):
        h = decoder.hidden(params, batch, cfg, dtype=jnp.float32, remat="none")
        z = decoder.logits(params, h[:, PROMPT - 1 : -1], cfg)
        best = jnp.max(z, -1)
        chosen = at_ids(z, batch.tokens[:, PROMPT:, None])[..., 0]
        return (best - chosen) / (best - jnp.mean(z, -1))

    whole = jax.tree.map(lambda x: jax.device_put(x, mesh.sharding((None, None))), batch)
    found = np.asarray(gaps(params, whole))
    assert found.max() < 0.05, f"a token of the answers is not the best by far: {found.max():.3f}"


def peer(options: argparse.Namespace, batch: int) -> dict:
    model = build_peer(options.shapes, depth(options.shapes, None), cache=True)
    return answered(steps.theirs(model, steps.random_prompts(VOCAB, batch, PROMPT, 0)))


ARMS = {"copy": copy, "e3jax": ours, "transformers": peer}

if __name__ == "__main__":
    main()
