"""The command line, and the one place for environment variables and jax.config."""

import argparse
import contextlib
import errno
import logging
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence

from e3jax import commands, config, configure
from e3jax.errors import Diverged, UserError
from e3jax.planning import chips
from e3jax.progress import Terminal

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 for bad input, 1 for a run that diverged or a
    plan that does not fit.

    One of several processes that fails ends at once, so that the others notice.
    """
    options = commands.parse(arguments)
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
            if options.command == "bench":
                prepare_jax(run, on_host=True)  # the devices are for the processes it starts
                from e3jax.bench import bench

                stack.enter_context(_terminable())
                bench.execute(run, dry_run=options.dry_run)
                return 0
            planned = chips.parse(options.topology) if options.command == "plan" else None
            prepare_jax(run, planned)
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
        commands.make_parser().error(
            "give --distributed alone, or all of --coordinator, --processes and --process"
        )
    alone = "--from-mask" if options.from_mask is not None else options.command
    if alone in ("--from-mask", "bench") and (options.distributed or given):
        commands.make_parser().error(f"{alone} is the work of one process")
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


def prepare_jax(
    run: config.Run, planned: chips.Topology | None = None, *, on_host: bool = False
) -> None:
    """Process-wide settings, before anything touches a device, or for a plan instead of any; with
    on_host this process alone has none."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    flags = []
    if run.deterministic:
        flags.append("--xla_gpu_deterministic_ops=true")
    if run.model.dtype == "float32" and "triton_gemm" not in os.environ.get("XLA_FLAGS", ""):
        # Products of float32 are cuBLAS's on GPUs. To try Triton's beside them XLA takes 45 s a
        # program (18.9 M parameters, H200), for steps of 15.6 ms where cuBLAS takes 18.9.
        flags.append("--xla_gpu_enable_triton_gemm=false")
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
    if on_host:
        jax.config.update("jax_platforms", "cpu")
