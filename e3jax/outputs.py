"""What a run leaves for others: exported checkpoints, read back and compared before they count."""

import importlib.util
import json
import logging
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from e3jax import config, files, job, mesh
from e3jax.errors import UserError
from e3jax.evaluate.table import Row
from e3jax.hf import card as cards
from e3jax.hf import export as hf_export
from e3jax.hf import families, load
from e3jax.job import Job
from e3jax.models import decoder
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import Params
from e3jax.models.generate import generate, make_greedy
from e3jax.stages import Mask

log = logging.getLogger(__name__)

TOLERANCE = 1e-4  # greatest difference of float32 logits, relative to the greatest logit
PROBES = 4  # windows, and prompts, that are compared


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

    Before it gets its name it is read back: our own logits must agree, and where torch is installed
    those of transformers and its greedy answers as well. Raises UserError, leaving nothing.
    """
    spec = job_.run.export
    inputs = job_.inputs(
        keep=mask.keep, dtype_out=spec.dtype, shard_gb=spec.shard_gb, weights=_digest(params)
    )
    record = out.with_name(out.name + ".json")
    if out.exists() and record.exists():
        if not (changed := files.differences(files.read_json(record), inputs)):
            log.info("export: %s is there already, from the same model", out)
            return
        listed = "\n  ".join(changed)
        raise UserError(f"{out}: holds the export of another model:\n  {listed}\nremove it first")
    cfg = job_.cfg.take_layers(mask.keep)
    dtype = load.source_dtype(job_.source) if spec.dtype == "source" else spec.dtype
    stored = jax.tree.map(lambda w: w.astype(dtype), params)
    text = cards.model_card(
        name=job_.out.name,
        base_model=job_.run.model.path,
        license_keys=cards.read_license(job_.source),
        keep=mask.keep,
        num_layers=job_.cfg.num_layers,
        rows=[row.shown() for row in rows],
        recovered=recovered,
    )

    def verify(folder: pathlib.Path) -> None:
        prompts = [p.prompt_ids for p in job_.problems[:PROBES]] if job_.run.data.test else []
        _check_logits(folder, stored, cfg, job_, prompts, transformers)

    hf_export.export(
        stored,
        mask.keep,
        cfg,
        job_.source,
        out,
        card=text,
        dtype=dtype,
        shard_bytes=int(spec.shard_gb * 1e9),
        verify=verify,
    )
    if jax.process_index() == 0:
        files.write_json(record, inputs)
    log.info("export: %s, read back and verified", out)


def export_trained(
    run: config.Run, cfg: ModelConfig, params: Params, tokenizer: pathlib.Path, out: pathlib.Path
) -> None:
    """Writes a model made by `train`; it has no source checkpoint, so config.json is made new."""
    if out.exists():
        log.info("export: %s is there already", out)
        return
    dtype = "float32" if run.export.dtype == "source" else run.export.dtype
    ids = json.loads((tokenizer / "tokenizer_config.json").read_text())
    vocab = job.text.load_tokenizer(tokenizer)
    special = {
        name: vocab.convert_tokens_to_ids(ids[f"{name}_token"])
        if ids.get(f"{name}_token")
        else None
        for name in ("bos", "eos", "pad")
    }
    hf_export.export_new(
        jax.tree.map(lambda w: w.astype(dtype), params),
        cfg,
        tokenizer,
        out,
        card=f"# {out.parent.name}\n\nTrained from random initialisation with e3jax.\n",
        dtype=dtype,
        shard_bytes=int(run.export.shard_gb * 1e9),
        **special,
    )


def _digest(params: Params) -> list[float]:
    """Two moments of all weights: enough to tell one training from another."""
    total = jax.tree.map(
        lambda w: jnp.stack(
            [jnp.sum(w, dtype=jnp.float32), jnp.sum(jnp.square(w.astype(jnp.float32)))]
        ),
        params,
    )
    return np.sum([np.asarray(x, np.float64) for x in jax.tree.leaves(total)], axis=0).tolist()


def _check_logits(
    folder: pathlib.Path,
    params: Params,
    cfg: ModelConfig,
    job_: Job,
    prompts: Sequence[Sequence[int]],
    transformers: bool,
) -> None:
    """Raises UserError unless the folder's model gives the logits of `params`, in float32."""
    read = load.load_params(folder, families.read_config(folder))
    batch = next(job.ordered(job_.train, PROBES, PROBES))

    @jax.jit
    def logits(params: Params, batch: decoder.Batch) -> jax.Array:
        h = decoder.hidden(params, batch, cfg, dtype=jnp.float32, remat="none")
        return decoder.logits(params, h, cfg)

    ours = np.asarray(logits(params, mesh.shard_batch(batch)))
    _compare("its own read-back", folder, ours, np.asarray(logits(read, mesh.shard_batch(batch))))
    if not transformers:
        return
    if importlib.util.find_spec("torch") is None:
        log.info(
            "export: torch is not installed, so the check through transformers was skipped; "
            "`pip install torch` and run again into a new folder to have it"
        )
        return
    _check_transformers(folder, params, cfg, job_, prompts, logits)


def _compare(what: str, folder: pathlib.Path, ours: np.ndarray, theirs: np.ndarray) -> None:
    error = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(ours)))
    log.info("export: logits against %s: relative difference %.1e", what, error)
    if not error <= TOLERANCE:
        raise UserError(
            f"{folder}: logits differ from {what} by {error:.1e} relative, more than {TOLERANCE}; "
            "nothing was exported"
        )


def _check_transformers(
    folder: pathlib.Path,
    params: Params,
    cfg: ModelConfig,
    job_: Job,
    prompts: Sequence[Sequence[int]],
    logits: Callable[[Params, decoder.Batch], jax.Array],
) -> None:
    """The export as its users load it: same float32 logits and, token for token, greedy answers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    ids = list(prompts) or [job_.train.tokens[0][:32].tolist()]
    width = max(map(len, ids))
    rows = job.rows_per_batch(len(ids))
    tokens = np.zeros((rows, width), np.int32)
    for row, prompt in zip(tokens, ids, strict=False):
        row[: len(prompt)] = prompt
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    ones = np.ones_like(tokens)
    batch = decoder.Batch(tokens, positions, ones, tokens, ones.astype(bool))
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens).long()).logits.numpy()
    _compare("transformers", folder, np.asarray(logits(params, mesh.shard_batch(batch))), theirs)

    count = min(64, cfg.max_position - width)
    greedy = make_greedy(cfg, dtype=jnp.float32, max_new_tokens=count, eos=job_.eos)
    answers = generate(greedy, params, ids, rows)
    for prompt, answer in zip(ids, answers, strict=True):
        with torch.no_grad():
            out = model.generate(
                torch.tensor([list(prompt)]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=count,
                do_sample=False,
                num_beams=1,
                eos_token_id=list(job_.eos) or None,
                pad_token_id=0,
            )
        theirs = out[0, len(prompt) :].tolist()
        if theirs != answer:
            raise UserError(
                f"{folder}: a greedy answer of transformers differs from ours: {theirs} and "
                f"{answer}; nothing was exported"
            )
    log.info("export: %d greedy answers equal those of transformers", len(ids))
