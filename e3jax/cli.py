"""The command line, and the one place for environment variables and jax.config."""

import argparse
import contextlib
import errno
import logging
import os
import pathlib
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterator, Sequence

from e3jax import __version__, config, configure
from e3jax.errors import Diverged, UserError
from e3jax.planning import chips
from e3jax.progress import Terminal

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
        """Perplexity, KL to the dense model, top-1 agreement and exact match by greedy decoding.
        Stages before it run if they are unfinished, the baselines' recoveries included.""",
        ("evaluate", "data"),
    ),
    "compare": (
        "selectors against each other, raw and after the same recovery, over seeds",
        """Each of compare.selectors chooses as many layers, at equal cost in tokens through masked
        models, for each of compare.seeds; each choice is measured as it is, and recovered by the
        recipe of `distill`. Prints means, spread, differences in the same windows with their
        standard error, and cost. Given again, it goes on.""",
        ("compare", "search", "distill", "evaluate"),
    ),
    "plan": (
        "memory, time and chip-hours on a topology that need not be there",
        """Compiles the search and distillation steps ahead of time on this machine's CPU, for TPUs
        with libtpu (pip install libtpu), and reads only the model's config.json. Prints memory a
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

# libtpu where there is no TPU: it asks nobody where it is, shares, and is quiet about the rest.
AHEAD_OF_TIME = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_STDERR_LOG_LEVEL": "4",
    "TPU_MIN_LOG_LEVEL": "4",
}
# What the user can put right.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def _keys(sections: Sequence[str]) -> str:
    lines = [
        f"  {key:<30} {text}"
        for key, text in configure.known_keys().items()
        if key.split(".")[0] in sections
    ]
    return "keys of the configuration, each settable as key=value:\n" + "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    """The argument parser; help text of the keys comes from config.py."""
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
        "runs", nargs="+", metavar="RUN", help="run folders; differences: from the 1st"
    )
    sub.add_argument(
        "--out",
        metavar="FILE",
        help="also out=FILE; else report.html in the run folder, or here where there are several",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 for bad input, 1 for a run that diverged or a
    plan that does not fit.

    One of several processes that fails ends at once, so that the others notice.
    """
    options = _parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[Terminal()])
    logging.getLogger("e3jax").setLevel(logging.INFO)
    if options.command == "inspect":
        return _inspect(options.path)
    if options.command == "report":
        return _report(options.runs, options.out)
    several, code = _several(options), 0
    with contextlib.ExitStack() as stack:
        try:
            run = configure.load_run(options.config, options.overrides)
            if options.from_mask is not None:
                from e3jax import from_mask  # which does without jax

                stack.enter_context(_terminable())
                from_mask.export(run, options.from_mask, dry_run=options.dry_run)
                return 0
            planned = chips.parse(options.topology) if options.command == "plan" else None
            _prepare_jax(run, planned)
            if several:
                stack.enter_context(_joined(options))
            from e3jax import notice, pipeline  # after the environment is set: they import jax

            if not options.dry_run:  # which touches no device
                stack.enter_context(notice.listen())
            if planned is None or options.dry_run:
                pipeline.execute(options.command, run, dry_run=options.dry_run)
            elif not pipeline.plan(run, planned, search_mesh=options.search_mesh):
                code = 1
        except (UserError, Diverged) as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2 if isinstance(error, UserError) else 1
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
            code = 130
        except SystemExit as error:
            if not several:
                raise
            code = error.code if isinstance(error.code, int) else 1
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK:
                where = f"{error.filename or run.out}: {error.strerror}"
                print(
                    f"error: {where}; once it can be written, give the same command",
                    file=sys.stderr,
                )
                code = 2
            elif several:
                traceback.print_exc()
                code = 1
            else:
                raise
        if several and code:
            from e3jax import notice, processes

            if notice.told():
                notice.leave()  # what failed, failed because another process left
            processes.leave(code)
    return code


def _inspect(path: str) -> int:
    """Exit code 1 for a model that cannot be searched and recovered."""
    from e3jax import inspection  # which does without jax

    try:
        lines, supported = inspection.inspect(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0 if supported else 1


def _report(runs: Sequence[str], out: str | None) -> int:
    from e3jax.report import page  # which does without jax

    given = [run.removeprefix("out=") for run in runs if run.startswith("out=")]
    folders = [pathlib.Path(run).expanduser() for run in runs if not run.startswith("out=")]
    try:
        if len(given) + (out is not None) > 1:
            raise UserError(f"out={given[-1]}: the page's place is given twice; expected it once")
        if not folders:
            raise UserError("report: no run was named; expected one or more run folders")
        beside = folders[0] if len(folders) == 1 else pathlib.Path()
        place = pathlib.Path(out or "".join(given) or beside).expanduser()
        place = place / page.REPORT if place.is_dir() else place
        page.write(folders, place)
        print(f"report: {place}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends what is open in an orderly way; notice.py, which does more, needs jax."""
    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield
        return
    old = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def _several(options: argparse.Namespace) -> bool:
    """Whether this is one process of several; exits with code 2 where that is half said."""
    explicit = [options.coordinator, options.processes, options.process]
    given = sum(value is not None for value in explicit)
    if (options.distributed and given) or given not in (0, 3):
        make_parser().error(
            "give --distributed alone, or all of --coordinator, --processes and --process"
        )
    if options.from_mask is not None and (options.distributed or given):
        make_parser().error("--from-mask is the work of one process")
    if not options.distributed and not given and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        log = logging.getLogger("e3jax")
        log.warning("Slurm started several tasks: without --distributed each works alone")
    return options.distributed or given == 3


@contextlib.contextmanager
def _joined(options: argparse.Namespace) -> Iterator[None]:
    """This process as one of several; process 0 speaks for all."""
    from e3jax import processes

    processes.start(options.coordinator, options.processes, options.process)
    if processes.is_first():
        yield
        return
    logging.getLogger("e3jax").setLevel(logging.WARNING)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
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


def _prepare_jax(run: config.Run, planned: chips.Topology | None = None) -> None:
    """Process-wide settings, before anything touches a device, or for a plan instead of any."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    flags = []
    if run.deterministic:
        flags.append("--xla_gpu_deterministic_ops=true")
    if planned is not None:
        os.environ["JAX_PLATFORMS"] = "cpu"
        if planned.is_tpu:
            os.environ.update(AHEAD_OF_TIME)
        else:
            flags.append(f"--xla_force_host_platform_device_count={planned.devices}")
    if flags:
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
    import jax

    jax.config.update("jax_threefry_partitionable", True)
