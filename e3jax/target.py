"""search.target: how many layers may stay so that the model is small or fast enough."""

import dataclasses
import decimal
import logging
import re
from collections.abc import Callable

from e3jax import config
from e3jax.errors import UserError
from e3jax.models.config import ModelConfig
from e3jax.models.params import count_params

log = logging.getLogger(__name__)

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
COUNTS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
SIZES = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def resolve(run: config.Run, cfg: ModelConfig, source_dtype: Callable[[], str]) -> config.Run:
    """The run with search.keep in place of search.target, and the arithmetic in the log.

    The most layers that meet the target are kept, whichever those are: where layers differ, as if
    the largest were. source_dtype: of the checkpoint; asked for where the bytes written need it.
    Raises UserError where it cannot be met, is met by the whole model, or is not all that says K.
    """
    asked = {k: v for k, v in dataclasses.asdict(run.search.target).items() if v is not None}
    if not asked:
        keep = config.KEEP if run.search.keep is None else run.search.keep
        return _keeping(run, keep)
    (name, wanted), *others = asked.items()
    said = f"search.target.{name}={wanted}"
    rivals = [f"search.target.{other}" for other, _ in others]
    rivals += ["search.keep"] if run.search.keep is not None else []
    rivals += ["distill.mask"] if run.distill.mask is not None else []
    if rivals:
        raise UserError(
            f"{said}: {' and '.join(rivals)} says too how many layers stay; give one of them (of a "
            "file's keys, search.keep=null takes one back)"
        )
    layers = cfg.num_layers
    if name == "speedup":
        keep = int(layers / wanted + 1e-9)
        reason = f"{layers} layers / {wanted:g} = {layers / wanted:.2f}"
    else:
        size, unit = 1, "parameters"
        if name == "memory":
            dtype = run.export.dtype if run.export.dtype != "source" else source_dtype()
            size, unit = BYTES[dtype], f"bytes in {dtype}"
        limit = _number(said, wanted, COUNTS if name == "params" else SIZES)
        whole = count_params(cfg)
        every = list(range(layers))
        sizes = sorted(
            (whole - count_params(cfg.take_layers(every[:i] + every[i + 1 :])) for i in every),
            reverse=True,
        )
        rest = whole - sum(sizes)
        keep = 0
        while keep < layers and size * (rest + sum(sizes[: keep + 1])) <= limit:
            keep += 1
        count = max(keep, 1)
        largest = "" if sizes[0] == sizes[-1] else "the largest "
        within = sum(sizes[:count])
        reason = (
            f"{size * rest:,} outside the layers + {size * within:,} in {largest}{count} = "
            f"{size * (rest + within):,}, of at most {limit:,} {unit}"
        )
    if keep >= layers:
        raise UserError(f"{said}: the whole model meets it ({reason}): there is nothing to remove")
    if keep < 1:
        raise UserError(f"{said}: not met by a single layer ({reason}); expected less of it")
    log.info("%s: %d of %d layers stay: %s", said, keep, layers, reason)
    return _keeping(run, keep)


def _keeping(run: config.Run, keep: float) -> config.Run:
    spec = dataclasses.replace(run.search, keep=keep, target=config.Target())
    return dataclasses.replace(run, search=spec)


def _number(said: str, text: str | float, units: dict[str, int]) -> int:
    """`6B`, `1.5 GiB`, `6000000000` -> a whole number. Raises UserError."""
    scales = {"": 1} | {unit.lower(): scale for unit, scale in units.items()}
    found = re.fullmatch(r"(\d+(?:\.\d*)?)(?:e\+?(\d+))?\s*([a-z]*)", str(text).strip().lower())
    if found is None or found[3] not in scales:
        raise UserError(f"{said}: expected a number, alone or with one of {', '.join(units)}")
    return int(decimal.Decimal(f"{found[1]}e{found[2] or 0}") * scales[found[3]])
