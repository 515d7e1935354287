"""export --from-mask: a mask file applied to a checkpoint's folder, without jax or a model."""

import dataclasses
import logging
import pathlib
import time
from typing import Any

from e3jax import config, files
from e3jax.errors import UserError
from e3jax.hf import aside, copying, hub
from e3jax.hf import card as cards
from e3jax.hf.cut import depth_of
from e3jax.hf.families import read_json

log = logging.getLogger(__name__)

SELECTORS = {
    "e3": "E3-Pruner's differentiable mask search",
    "shortgpt": "ShortGPT's block influence",
}


@dataclasses.dataclass(frozen=True)
class Mask:
    """What a mask file must say; other fields are not needed here."""

    keep: tuple[int, ...]  # ascending, counted from 0
    num_layers: int  # of the dense model
    checkpoint: str | None  # hash of the dense checkpoint that it was found on; None = not told
    selector: str  # what chose the layers, in words


def read_mask(path: pathlib.Path, num_layers: int) -> Mask:
    """A mask.json, or any JSON object with `keep` and `num_layers`. Raises UserError."""
    fields = read_json(path)
    keep, depth, found_on = (fields.get(key) for key in ("keep", "num_layers", "checkpoint"))
    if (
        not isinstance(keep, list)
        or not all(type(i) is int for i in keep)
        or type(depth) is not int
    ):
        raise UserError(
            f"{path}: not a mask file: expected keep, a list of layer numbers, and num_layers"
        )
    if depth != num_layers:
        raise UserError(f"{path}: a mask of {depth} layers, and the model has {num_layers}")
    if not keep or sorted(set(keep)) != keep or not 0 <= keep[0] <= keep[-1] < depth:
        raise UserError(f"{path}: keep is {keep}; expected ascending numbers from 0 to {depth - 1}")
    name = str(fields.get("selector") or "")
    selector = SELECTORS.get(name, f"the selector {name}" if name else "a mask of unknown origin")
    return Mask(tuple(keep), depth, found_on if isinstance(found_on, str) else None, selector)


def export(run: config.Run, mask_path: str, *, dry_run: bool = False) -> None:
    """Writes the layers of `model.path` that the mask keeps to the folder `out`.

    Raises UserError for anything the user can put right, leaving nothing.
    """
    if run.export.dtype != "source":
        raise UserError("export.dtype: --from-mask copies weights as they are stored: leave it out")
    source = hub.resolve(run.model.path, run.model.revision)
    out = pathlib.Path(run.out).expanduser()
    dense: dict[str, Any] = read_json(source / "config.json")
    mask = read_mask(pathlib.Path(mask_path).expanduser(), depth_of(dense))
    plan = copying.make_plan(source, mask.keep)
    text = (
        f"{source} -> {out}: layers {list(mask.keep)} of {mask.num_layers}, "
        f"{len(plan.tensors)} tensors, {plan.nbytes:,} bytes"
    )
    if dry_run:
        print(text)
        return
    log.info("export: %s", text)
    identity = files.checkpoint_hash(source)
    if mask.checkpoint not in (None, identity):
        log.warning(
            "export: the mask was found on another checkpoint (%s) than this one (%s); its layers "
            "may not be the ones that this model can do without",
            mask.checkpoint,
            identity,
        )
    if left := sorted(path.name for path in source.glob("*.py")):
        log.warning("export: the checkpoint's own code is not carried: %s", ", ".join(left))
    if "auto_map" in dense:
        log.warning(
            "export: auto_map is left out of config.json: the model loads where %s is known without"
            " the checkpoint's own code",
            dense.get("model_type"),
        )
    card = cards.model_card(
        name=out.name,
        base_model=run.model.path,
        license_keys=cards.read_license(source),
        keep=mask.keep,
        num_layers=mask.num_layers,
        recovered=False,
        chosen_by=mask.selector,
    )
    record = {"model": identity, "keep": mask.keep, "num_layers": mask.num_layers}
    record |= {"mask_found_on": mask.checkpoint, "recovered": None}
    more = {"README.md": card.encode(), aside.RECORD: aside.to_json(record)}
    plan = dataclasses.replace(plan, files={**plan.files, **more})
    begun = time.monotonic()
    copying.write(plan, out, int(run.export.shard_gb * 1e9))
    spent = time.monotonic() - begun
    log.info("export: read back and verified, %.1f GB in %.0f s", plan.nbytes / 1e9, spent)
    print(f"pruned, not recovered: {out}")
