"""The command `train`: next-token training, from scratch or from a checkpoint."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax

from e3jax import config, files, job, ledger, mesh, outputs, processes, recovery, rehearsal
from e3jax.data import text
from e3jax.errors import UserError
from e3jax.hf import families, hub
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Params
from e3jax.report import page, pictures


def train(run: config.Run, out: pathlib.Path) -> None:
    """Next-token training, from scratch (train.config) or from a checkpoint (model.path)."""
    spec, recipe = run.train, run.train.recipe
    if recipe.teacher != "none":
        raise UserError(
            f"train.recipe.teacher={recipe.teacher}: plain training has none; use distill"
        )
    if spec.config is None:
        job_ = job.open_job(run)
        cfg, tokenizer_folder = job_.cfg, job_.source
        start: dict[str, Any] = {"model": job_.identity}

        def make_params(cfg: ModelConfig) -> Params:
            whole = job_.params
            job_.release()  # kept by nobody else: they are trained in their place
            return whole if cfg == job_.cfg else decoder.take_layers(whole, job_.cfg, rehearsal.TWO)

    else:
        if spec.tokenizer is None:
            raise UserError("train.tokenizer: required with train.config: a tokenizer's folder")
        cfg = families.read_config(architecture(run))
        tokenizer_folder = files.bundled(spec.tokenizer)
        text.check_vocab(text.load_tokenizer(tokenizer_folder), cfg.vocab_size)
        job.tell_replicated(cfg, "float32")
        make_params = functools.partial(decoder.init_params, jax.random.key(run.seed))
        start = {"config": dataclasses.asdict(cfg)}
    job.check_window(run, cfg)
    mesh.check_shared("train.recipe.batch", recipe.batch)
    windows = job.tokenize(run, run.data.train, tokenizer_folder, run.data.decontaminate)
    held_out = job.tokenize(run, run.data.held_out, tokenizer_folder)
    job.record(run, out)

    def work(cfg: ModelConfig, run: config.Run, out: pathlib.Path) -> None:
        trained = recovery.train_student(
            "train",
            run,
            run.train.recipe,
            cfg=cfg,
            make_params=lambda: make_params(cfg),
            teacher=None,
            train=windows,
            held_out=held_out,
            inputs=start | {"seed": run.seed, "dtype": run.model.dtype},
            folder=out / "train",
        )
        outputs.export_trained(run, cfg, trained, tokenizer_folder, out / "export", windows)

    play = functools.partial(work, cfg.take_layers(rehearsal.TWO))
    rehearsal.before(run, out, tokens=tokens(run), layers=cfg.num_layers, play=play)
    with job.boards(run, out), ledger.stage(out, "train"):
        work(cfg, run, out)
    if processes.is_first():
        pictures.draw(out)
    print(f"trained: {out}/export   pictures: {out}/plots")
    if processes.is_first():
        page.write([out], out / page.REPORT)
        print(f"report: {out}/{page.REPORT}")


def architecture(run: config.Run) -> pathlib.Path:
    """The config.json of the model that is trained."""
    if run.train.config is not None:
        return files.bundled(run.train.config)
    return hub.resolve_config(run.model.path, run.model.revision)


def tokens(run: config.Run) -> int:
    """Upper bound: windows count as full."""
    return run.train.recipe.steps * run.train.recipe.batch * run.data.window
