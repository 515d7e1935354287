"""export --from-mask: a mask file applied to a checkpoint's folder, without jax or a model."""

import dataclasses
import json
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
from e3jax.mask import read_mask, warn_of_other

log = logging.getLogger(__name__)


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
    if mask.merges:
        raise UserError(
            f"{mask_path}: {mask.selector} merges layers, which copying cannot; use export with "
            "--config and distill.mask"
        )
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
    warn_of_other(mask, identity)
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
        folder=out.name,
        base_model=hub.shown(run.model.path),
        license_keys=cards.read_license(source),
        config=json.loads(plan.files["config.json"]),
        chat=cards.has_chat_template(source),
        keep=mask.keep,
        num_layers=mask.num_layers,
        recovered=False,
        chosen_by=mask.chosen_by,
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
