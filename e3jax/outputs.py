"""What a run leaves for others: exported checkpoints, read back and compared before they count."""

import logging
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers.utils.import_utils import is_torch_available

from e3jax import config, files, job, mesh, processes
from e3jax.data import text
from e3jax.data.windows import Windows
from e3jax.errors import UserError
from e3jax.evaluate.table import Row
from e3jax.hf import aside, families, folders, hub, load
from e3jax.hf import card as cards
from e3jax.hf import export as hf_export
from e3jax.job import Job
from e3jax.mask import Mask
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Params
from e3jax.models.generate import make_generator
from e3jax.models.serve import generate

log = logging.getLogger(__name__)

TOLERANCE = 1e-4  # greatest difference of float32 logits, relative to the greatest logit
PROBES = 4  # windows, and prompts, that are compared
PROBE_TOKENS = 256  # of each window: logits of whole ones would be gigabytes


def export(
    job_: Job,
    mask: Mask,
    params: Params,
    out: pathlib.Path,
    *,
    recovered: bool,
    rows: Sequence[Row] = (),
    transformers: bool = True,
) -> None:
    """Writes the pruned model as a Hugging Face folder; skipped when it is there from the same.

    As `write`. Raises UserError where the export of another model is there.
    """
    spec = job_.run.export
    training = job_.out / "distill" / "checkpoints" / "inputs.json" if recovered else None
    inputs = job_.inputs(
        keep=mask.keep,
        dtype_out=spec.dtype,
        shard_gb=spec.shard_gb,
        recovered=files.read_json(training) if training else None,
    )
    if not _is_there(out, inputs):
        write(
            job_,
            mask,
            params,
            out,
            inputs=inputs,
            recovered=recovered,
            rows=rows,
            transformers=transformers,
        )


def write(
    job_: Job,
    mask: Mask,
    params: Params,
    out: pathlib.Path,
    *,
    inputs: dict[str, Any],
    recovered: bool,
    rows: Sequence[Row] = (),
    transformers: bool = True,
) -> None:
    """The same without a look at what is there. inputs: what it is made from, to be kept in it.

    Before it gets its name it is read back: our own logits must agree, and where torch is installed
    those of transformers and its greedy answers as well. Raises UserError, leaving nothing.
    """
    spec, cfg = job_.run.export, job_.cfg.take_layers(mask.keep)
    dtype = folders.source_dtype(job_.source) if spec.dtype == "source" else spec.dtype
    stored = jax.tree.map(lambda w: w.astype(dtype), params)
    card = cards.model_card(
        name=job_.out.name,
        folder=out.name,
        base_model=hub.shown(job_.run.model.path),
        license_keys=cards.read_license(job_.source),
        config=hf_export.pruned_config(job_.source, mask.keep),
        chat=cards.has_chat_template(job_.source),
        keep=mask.keep,
        num_layers=job_.cfg.num_layers,
        rows=[row.shown() for row in rows],
        recovered=recovered,
        chosen_by=mask.chosen_by,
    )

    prompts = None
    if job_.run.data.test:
        prompts = [list(problem.prompt_ids) for problem in job_.problems[:PROBES]]
    hf_export.export(
        stored,
        mask.keep,
        cfg,
        job_.source,
        out,
        card=card,
        dtype=dtype,
        shard_bytes=int(spec.shard_gb * 1e9),
        verify=lambda folder: _verify(
            folder, out, stored, cfg, inputs, job_.train, prompts, job_.eos, transformers
        ),
    )
    log.info("export: %s, read back and verified", out)


def _is_there(out: pathlib.Path, inputs: dict[str, Any]) -> bool:
    """Whether the export is there, made from the same; UserError where it is made from other."""
    if not processes.from_first((out / aside.RECORD).exists):
        return False
    if changed := files.differences(files.read_json(out / aside.RECORD), inputs):
        listed = "\n  ".join(changed)
        raise UserError(f"{out}: holds the export of another model:\n  {listed}\nremove it first")
    log.info("export: %s is there already, from the same model", out)
    return True


def export_trained(
    run: config.Run,
    cfg: ModelConfig,
    params: Params,
    source: pathlib.Path,
    out: pathlib.Path,
    windows: Windows,
) -> None:
    """Writes a model made by `train`, with the tokenizer of the folder `source`; verified on
    `windows` as an export is.

    One that went on from a checkpoint keeps that checkpoint's config.json and licence; one from
    scratch gets a new config.json.
    """
    spec, trained = run.export, out.parent / "train" / "checkpoints" / "inputs.json"
    inputs = files.plain_tree(
        {"trained": files.read_json(trained), "dtype_out": spec.dtype, "shard_gb": spec.shard_gb}
    )
    if _is_there(out, inputs):
        return
    tokenizer = text.load_tokenizer(source)
    eos = tokenizer.eos_token_id
    dtype = "float32" if spec.dtype == "source" else spec.dtype
    stored = jax.tree.map(lambda w: w.astype(dtype), params)
    write: dict[str, Any] = {
        "dtype": dtype,
        "shard_bytes": int(spec.shard_gb * 1e9),
        "verify": lambda folder: _verify(
            folder, out, stored, cfg, inputs, windows, None, () if eos is None else (eos,), True
        ),
    }
    if run.train.config is None:
        card = cards.trained_card(out.parent.name, run.model.path, cards.read_license(source))
        layers = range(cfg.num_layers)
        hf_export.export(stored, layers, cfg, source, out, card=card, **write)
        return
    hf_export.export_new(
        stored,
        cfg,
        source,
        out,
        card=cards.trained_card(out.parent.name),
        bos=tokenizer.bos_token_id,
        eos=eos,
        pad=tokenizer.pad_token_id,
        **write,
    )


# ---------------------------------------------------------------- verification


def _verify(
    folder: pathlib.Path,
    out: pathlib.Path,
    params: Params,
    cfg: ModelConfig,
    inputs: dict[str, Any],
    windows: Windows,
    prompts: Sequence[list[int]] | None,
    eos: Sequence[int],
    transformers: bool,
) -> None:
    """Raises UserError unless the folder's model gives the logits of `params`, in float32.

    Then `inputs` are kept in it, so that they appear with the folder. prompts None = the beginning
    of the first window.
    """
    read = load.load_params(folder, families.read_config(folder))
    probes = next(job.ordered(windows, PROBES, PROBES))
    batch = mesh.shard_batch(jax.tree.map(lambda x: x[:, :PROBE_TOKENS], probes))

    def logits(params: Params, batch: decoder.Batch) -> jax.Array:
        h = decoder.hidden(params, batch, cfg, dtype=jnp.float32, remat="none")
        return decoder.logits(params, h, cfg)

    @jax.jit
    def distance(batch: decoder.Batch, ours: Params, found: Params) -> tuple[jax.Array, jax.Array]:
        a, b = logits(ours, batch), logits(found, batch)
        return jnp.max(jnp.abs(a - b)), jnp.max(jnp.abs(a))

    _compare("its own read-back", out, *map(float, distance(batch, params, read)))
    del read
    if transformers and _can_check_transformers(out, cfg):
        prompts = prompts or [windows.tokens[0][:32].tolist()]
        _check_transformers(folder, out, params, cfg, prompts, eos, logits)
    if processes.is_first():
        files.write_json(folder / aside.RECORD, inputs)


def _can_check_transformers(out: pathlib.Path, cfg: ModelConfig) -> bool:
    """Whether torch and the memory for it are there; logs what is missing and how to have it."""
    again = f"remove {out} and give the same command again"
    # Process 0 runs it, and decides for all whether it can.
    if not processes.from_first(is_torch_available):  # missing, or older than transformers takes
        log.info(
            "export: torch is not installed, so the check through transformers was skipped; "
            "to have it, `pip install -U torch`, %s",
            again,
        )
        return False
    needed, memory = 3 * 4 * decoder.count_params(cfg), processes.from_first(_host_memory)
    if needed > memory:
        log.info(
            "export: the check through transformers was skipped: in float32 it needs %.0f GB of "
            "host memory and there are %.0f GB; to have it, on a larger host %s",
            needed / 1e9,
            memory / 1e9,
            again,
        )
        return False
    return True


def _host_memory() -> int:
    """Bytes that this process may use: the machine's, or its container's."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup 2, 1
        path = pathlib.Path("/sys/fs/cgroup") / name
        text = path.read_text().strip() if path.is_file() else "max"
        most = min(most, int(text)) if text.isdecimal() else most
    return most


def _compare(what: str, out: pathlib.Path, difference: float, greatest: float) -> None:
    error = difference / greatest if greatest else math.nan  # no model at all
    log.info("export: logits against %s: relative difference %.1e", what, error)
    if not error <= TOLERANCE:
        raise UserError(
            f"{out}: logits differ from {what} by {error:.1e} relative, more than {TOLERANCE}; "
            "nothing was exported"
        )


def _check_transformers(
    folder: pathlib.Path,
    out: pathlib.Path,
    params: Params,
    cfg: ModelConfig,
    prompts: Sequence[list[int]],
    eos: Sequence[int],
    logits: Callable[[Params, decoder.Batch], jax.Array],
) -> None:
    """The export as its users load it: same float32 logits and, token for token, greedy answers.

    All processes compute ours; process 0 loads the folder and compares.
    """
    width = max(map(len, prompts))
    rows = job.rows_per_batch(len(prompts))
    tokens = np.zeros((rows, width), np.int32)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt  # what follows it cannot change its logits
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    ones = np.ones_like(tokens)
    batch = decoder.Batch(tokens, positions, ones, tokens, ones.astype(bool))

    @jax.jit
    def answered(params: Params, batch: decoder.Batch) -> jax.Array:
        """The logits of the prompts alone: devices that fill a batch up may be hundreds."""
        found = logits(params, batch)
        chosen = jnp.eye(len(prompts), rows)
        place = mesh.out((None, None, "vocab"), (len(prompts), *found.shape[1:]))
        return jnp.einsum("nb,btv->ntv", chosen, found, precision="highest", out_sharding=place)

    ours = processes.whole(answered(params, mesh.share_batch(batch)))
    tokens = tokens[: len(prompts)]
    count = min(64, cfg.max_position - width)
    generator = make_generator(cfg, dtype=jnp.float32, eos=eos)
    answers = list(generate(generator, params, prompts, rows, count))

    def compare() -> None:
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
        model.generation_config = GenerationConfig()  # a repetition penalty of the folder's own
        with torch.no_grad():
            theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
        difference, greatest = np.max(np.abs(ours - theirs)), np.max(np.abs(ours))
        _compare("transformers", out, float(difference), float(greatest))
        for prompt, answer in zip(prompts, answers, strict=True):
            with torch.no_grad():
                found = model.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                    max_new_tokens=count,
                    do_sample=False,
                    num_beams=1,
                    eos_token_id=list(eos) or None,
                    pad_token_id=0,
                )
            theirs = found[0, len(prompt) :].tolist()
            if theirs != answer:
                raise UserError(
                    f"{out}: a greedy answer of transformers differs from ours: "
                    f"{theirs} and {answer}; nothing was exported"
                )

    processes.from_first(compare)
    log.info("export: %d greedy answers equal those of transformers", len(prompts))
