"""How much faster an exported model is in transformers than the dense one, on one GPU.

    python benchmarks/served.py --shapes 4b --folder /tmp/served        # 14 GB there, removed again

A checkpoint of Qwen3's shapes with random bfloat16 weights is written, and a quarter of its layers
removed by `run.py export --from-mask`; both folders are loaded by transformers (bfloat16, sdpa,
torch.compile, decoding with a static cache). Prefill: the logits after 1024 tokens a row. Decode: a
token more for each row, after 128. Ideal: layers before / layers after; the head, which is not
removed, keeps a model from it. Each measurement is in a process of its own; before it, the exported
model's layers are compared with those they were.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys

from arms import ROOT, SHAPES, VOCAB, build_peer, depth, give, kept, middle, run_arm, timed

DEVICE = "cuda"
PROMPT, TOKENS = 1024, 128


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
        print(f"{'':<10}{'batch':>6}{'dense ms':>10}{'exported':>10}{'faster':>8}{'of ideal':>10}")
        for what in ("prefill", "decode"):
            for batch in options.batch:
                found = [
                    run_arm(__file__, arguments, f"{what}:{name}:{batch}")
                    for name in ("dense", "exported")
                ]
                if errors := [x["error"] for x in found if "error" in x]:
                    print(f"{what:<10}{batch:>6}  {errors[0]}", flush=True)
                    continue
                dense, exported = (middle(x["seconds"])[0] * 1e3 for x in found)
                print(
                    f"{what:<10}{batch:>6}{dense:>10.2f}{exported:>10.2f}{dense / exported:>8.3f}"
                    f"{dense / exported / ideal:>10.1%}",
                    flush=True,
                )
    finally:
        shutil.rmtree(options.folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", choices=SHAPES, default="4b")
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="made, and removed")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    return parser.parse_args(sys.argv[1:])


def measure(options: argparse.Namespace, what: str, *details: str) -> dict:
    if what == "make":
        return make(options)
    name, batch = details
    model = load(options.folder / name)
    return {"prefill": prefill, "decode": decode}[what](model, int(batch))


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


def prefill(model, batch: int) -> dict:
    import torch

    tokens = torch.randint(0, VOCAB, (batch, PROMPT), device=DEVICE)
    forward = torch.compile(model.forward)

    def step():
        with torch.no_grad():
            return forward(tokens, use_cache=False, logits_to_keep=1).logits

    assert torch.isfinite(step()).all()
    first, seconds = timed(step, torch.cuda.synchronize)
    return {"first": first, "seconds": seconds}


def decode(model, batch: int) -> dict:
    """Seconds a token: an answer of TOKENS less one of a single token, so without the prompt."""
    import torch

    prompts = torch.randint(0, VOCAB, (batch, 128), device=DEVICE)

    def answer(count: int):
        def step():
            model.generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count,
                min_new_tokens=count, do_sample=False, cache_implementation="static",
                pad_token_id=0,
            )  # fmt: skip

        return step

    first, whole = timed(answer(TOKENS + 1), torch.cuda.synchronize)
    _, start = timed(answer(1), torch.cuda.synchronize)
    return {"first": first, "seconds": [(x - middle(start)[0]) / TOKENS for x in whole]}


if __name__ == "__main__":
    main()
