"""How much faster an exported model is in transformers than the dense one, on one GPU.

    python benchmarks/served.py --shapes 4b --folder /tmp/served        # 14 GB there, removed again

A checkpoint of Qwen3's shapes with random bfloat16 weights is written, and a quarter of its layers
removed by `run.py export --from-mask`; both folders are loaded by transformers (bfloat16, sdpa,
torch.compile, decoding with a static cache). Prefill: the logits after 1024 tokens a row. Decode: a
token more for each row, after 128. Ideal: layers before / layers after; the head, which is not
removed, keeps a model from it. Dense and exported take turns in one process, one for each line, so
that the clock and the heat of the GPU are the same; before it, the exported model's layers are
compared with those they were.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys

from arms import ROOT, SHAPES, VOCAB, build_peer, depth, kept, run_arm

from e3jax.bench import steps
from e3jax.bench.timing import give, middle, seconds

DEVICE = "cuda"
PROMPT, TOKENS = 1024, 128
WARM, TURNS = 3, 16
FOLDERS, WHAT = ("dense", "exported"), ("prefill", "decode")


def main() -> None:
    options = parse()
    if options.arm is not None:  # in its own process
        return give(measure(options, *options.arm.split(":")))
    options.folder.mkdir(parents=True)
    try:
        arguments = ["--shapes", options.shapes, "--folder", str(options.folder)]
        made = run_arm(__file__, arguments, "make")
        if "error" in made:
            raise SystemExit(made["error"])
        layers = depth(options.shapes, None)
        ideal = layers / len(kept(layers))
        print(f"{layers} layers, {len(kept(layers))} kept: ideal {ideal:.3f}")
        print(
            f"{'':<10}{'batch':>6}{'dense ms':>10}{'exported':>10}{'faster':>8}"
            f"{'spread':>8}{'of ideal':>10}"
        )
        for what in options.what:
            for batch in options.batch:
                found = run_arm(__file__, arguments, f"{what}:{batch}")
                if "error" in found:
                    print(f"{what:<10}{batch:>6}  {found['error']}", flush=True)
                    continue
                dense, exported = (middle(found[name])[0] * 1e3 for name in FOLDERS)
                faster, spread = middle([x / y for x, y in zip(*(found[n] for n in FOLDERS))])
                print(
                    f"{what:<10}{batch:>6}{dense:>10.2f}{exported:>10.2f}{faster:>8.3f}"
                    f"{spread:>8.1%}{faster / ideal:>10.1%}",
                    flush=True,
                )
    finally:
        shutil.rmtree(options.folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", choices=SHAPES, default="4b")
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="made, and removed")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    return parser.parse_args(sys.argv[1:])


def measure(options: argparse.Namespace, what: str, *details: str) -> dict:
    """Seconds of each turn, by folder; of a prefill, or a token."""
    if what == "make":
        return make(options)
    (batch,) = map(int, details)
    prompts = steps.random_prompts(VOCAB, batch, PROMPT if what == "prefill" else 128, 0)
    made = [steps.theirs(load(options.folder / name), prompts) for name in FOLDERS]
    turns = [[spent(one, what) for one in made] for _ in range(WARM + TURNS)]
    return dict(zip(FOLDERS, zip(*turns[WARM:])))


def spent(one: steps.Steps, what: str) -> float:
    """Seconds of a prefill, or of a token: an answer of TOKENS + 1 less one of a single token."""
    if what == "prefill":
        return seconds(one.prefill)
    return (seconds(lambda: one.answer(TOKENS + 1)) - seconds(lambda: one.answer(1))) / TOKENS


def load(folder: pathlib.Path):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    return model.eval().requires_grad_(False).to(DEVICE)


def make(options: argparse.Namespace) -> dict:
    """The dense checkpoint, and what our export makes of it."""
    import torch

    layers = depth(options.shapes, None)
    keep = kept(layers)
    torch.manual_seed(0)
    model = build_peer(options.shapes, layers, cache=True)
    dense, exported = options.folder / "dense", options.folder / "exported"
    model.save_pretrained(dense)
    mask = options.folder / "mask.json"
    mask.write_text(json.dumps({"num_layers": layers, "keep": keep}))
    command = [sys.executable, str(ROOT / "run.py"), "export", "--from-mask", str(mask)]
    subprocess.run([*command, f"model.path={dense}", f"out={exported}"], check=True)
    cut = load(exported)
    for number, layer in zip(keep, cut.model.layers, strict=True):
        for name, weight in model.model.layers[number].state_dict().items():
            torch.testing.assert_close(layer.state_dict()[name], weight, rtol=0, atol=0)
    return {"layers": len(keep)}


if __name__ == "__main__":
    main()
