"""The commands, their options and what `--help` says of them."""

import argparse
import textwrap
from collections.abc import Sequence

from e3jax import __version__, configure
from e3jax.planning import chips

COMMANDS = {
    "run": (
        "the whole job: search, distill, export, evaluate",
        """Runs every stage in order into the folder `out`. A stage whose finished output is there
        with the same inputs is skipped; a stage that was killed goes on from its last checkpoint.
        So the same command finishes whatever is unfinished.""",
        ("out", "seed", "deterministic", "keep_checkpoints", "wandb", "model", "mesh", "data"),
    ),
    "search": (
        "stage 1: which layers to keep (writes search/mask.json)",
        """Gumbel-TopK search of the layer mask with frozen weights, scored on held-out windows.""",
        ("search", "data", "model"),
    ),
    "distill": (
        "stage 2: recover the pruned model from the dense one",
        """Distils the layers of search/mask.json, or of the file distill.mask, from the dense
        model: online over the full vocabulary, or from a stored top-k of the teacher.""",
        ("distill", "data", "model"),
    ),
    "export": (
        "write the surviving layers as a Hugging Face folder, verified",
        """Writes safetensors, config.json, tokenizer and model card; reads them back and compares
        logits before the folder gets its name. Stages before it run if they are unfinished.
        With --from-mask nothing is run or recovered: the layers of the checkpoint model.path that
        a mask file keeps are copied to the folder `out`, for any family, quantised or not, on any
        machine: python run.py export --from-mask MASK.json model.path=FOLDER out=FOLDER""",
        ("export",),
    ),
    "evaluate": (
        "dense, pruned, recovered and baseline figures in one table",
        """Perplexity, KL to the dense model, top-1 agreement and exact match by greedy decoding,
        or pass@1 of sampled answers (evaluate.samples, evaluate.temperature); graded by their text,
        or as mathematics (evaluate.grader=math_verify). Answers are kept one by one.
        Stages before it run if they are unfinished, the baselines' recoveries included.""",
        ("evaluate", "data"),
    ),
    "compare": (
        "selectors against each other, raw and after the same recovery, over seeds",
        """Each of compare.selectors chooses as many layers, at equal cost in tokens through masked
        models, for each of compare.seeds; each choice is measured as it is, and recovered by the
        recipe of `distill`. Prints means, spread, differences in the same windows with their
        standard error, and cost; writes them as compare.json and in report.html. Given again, it
        goes on.""",
        ("compare", "search", "distill", "evaluate"),
    ),
    "bench": (
        "measured speed of the export beside the dense model, in jax and in transformers",
        """Prefill, decoding and end-to-end throughput and memory of both models on one device:
        random prompts, greedy answers, all of one length. Each is measured in a process of its own,
        and in transformers (where torch is installed) only if its logits are ours. Prints how much
        faster the export is beside what its layers, and its work, promise; writes bench/ and the
        report in the run folder, which holds a finished run of the same configuration.""",
        ("bench", "model"),
    ),
    "sweep": (
        "the whole job for several numbers of layers: quality against speed and size",
        """Runs the job for each of sweep.keep, the most layers first, in out/keep-K: search,
        distill, evaluate, export. The dense model is measured once, and each search begins where
        the one before ended. Prints quality beside measured speed, and draws it. Given again, it
        goes on.""",
        ("sweep", "search", "distill", "evaluate"),
    ),
    "plan": (
        "memory, time and chip-hours on a topology that need not be there",
        """Compiles the steps of both stages ahead of time on this machine's CPU, for TPUs with
        libtpu (pip install libtpu), and reads only the model's config.json. Prints memory a
        device by part, whether it fits, the roofline time of a step and the hours of every stage,
        and saves them as plan-TOPOLOGY.json and .txt in the run folder. GPUs are stood for by CPU
        devices: their memory is an estimate. Exit code 0 = fits, 1 = does not fit.""",
        ("model", "mesh", "search", "distill"),
    ),
    "train": (
        "next-token training, from scratch or from a checkpoint",
        """Plain cross-entropy through the same loop: how the bundled model was made, and the
        SFT arm of the KD-versus-SFT ablation. Writes a Hugging Face folder.""",
        ("train", "data"),
    ),
}


def _keys(sections: Sequence[str]) -> str:
    lines = [
        f"  {key:<30} {text}"
        for key, text in configure.known_keys().items()
        if key.split(".")[0] in sections
    ]
    return "keys of the configuration, each settable as key=value:\n" + "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """The argument parser; help text of the keys comes from config."""
    parser = argparse.ArgumentParser(
        prog="e3jax",
        description="Layer pruning for large language models in JAX (E3-Pruner, arXiv 2511.17205).",
        epilog="example: python run.py run --config configs/demo.yaml search.keep=11 out=runs/k11",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (line, text, sections) in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=line,
            description=textwrap.dedent(" ".join(text.split())),
            epilog=_keys(sections),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument(
            "--config", required=name != "export", metavar="FILE", help="a YAML configuration"
        )
        if name == "export":
            sub.add_argument(
                "--from-mask",
                metavar="FILE",
                help="a mask.json, or {keep: [layers], num_layers: n}; --config is then optional",
            )
        sub.add_argument(
            "--dry-run",
            action="store_true",
            help="print the resolved plan and stop: no device, no data",
        )
        if name == "plan":
            sub.add_argument(
                "--topology",
                required=True,
                metavar="CHIP:SHAPE",
                help=f"such as v5p:4x4x2, v6e:4x8, h100:8, 2xv5p:4x4x2 (two slices); chips: "
                f"{', '.join(chips.CHIPS)}",
            )
            sub.add_argument(
                "--search-mesh",
                action="store_true",
                help="rank meshes, micro-batches and recomputation, compile the best three and plan"
                " with the fastest that fits; it is printed as overrides",
            )
        several = sub.add_argument_group("several processes, each started with the same command")
        several.add_argument(
            "--distributed",
            action="store_true",
            help="the TPU pod, Slurm or Kubernetes tells who the others are",
        )
        several.add_argument("--coordinator", metavar="HOST:PORT", help="else: of process 0")
        several.add_argument("--processes", type=int, metavar="N", help="how many there are")
        several.add_argument("--process", type=int, metavar="I", help="this one's number, from 0")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    line = "how a checkpoint or a config.json is understood, and what a 25 % cut of it saves"
    sub = commands.add_parser("inspect", help=line.replace("%", "%%"), description=line)
    sub.add_argument("path", help="a folder, a config.json, `demo` or a hub id")
    line = "one self-contained HTML page about a run, or several side by side"
    sub = commands.add_parser("report", help=line, description=line)
    sub.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folders of runs, or of trainings; differences: from the 1st; or that of a comparison",
    )
    sub.add_argument(
        "--out",
        metavar="FILE",
        help="also out=FILE; else report.html in the run folder, or here where there are several",
    )
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses options and overrides in any order."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments, argparse.Namespace(from_mask=None))
    if options.command in ("inspect", "report"):
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return options
    options.overrides = [*options.overrides, *rest]
    if unknown := [a for a in options.overrides if a.startswith("-") or "=" not in a]:
        parser.error(f"neither an option nor key=value: {' '.join(unknown)}")
    if options.config is None and options.from_mask is None:
        parser.error("export needs --config FILE, or --from-mask FILE")
    return options
