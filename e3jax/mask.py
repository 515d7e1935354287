"""mask.json: which layers stay, and how that was found. Without jax."""

import dataclasses
import json
import logging
import pathlib

import pydantic

from e3jax.errors import UserError
from e3jax.files import fingerprint
from e3jax.hf.families import read_json

log = logging.getLogger(__name__)

SELECTORS = {
    "given": "a mask of unknown origin",
    "e3": "E3-Pruner's differentiable mask search",
    "shortgpt": "ShortGPT's block influence",
    "shortgpt_released": "ShortGPT's block influence as its code has it",
    "minitron": "Minitron's block influence",
    "ppl": "Shortened LLaMA's perplexity",
    "kl": "the KL divergence without each layer",
    "sleb": "SLEB",
    "greedy_kl": "greedy removal by KL divergence",
    "taylor": "Shortened LLaMA's Taylor score",
    "taylor_plus": "Shortened LLaMA's Taylor+ score",
    "magnitude": "the magnitude of the weights",
    "streamline": "LLM-Streamline",
    "angular": "the angular distance across a block",
    "angular_released": "the angular distance across a block as PruneMe has it",
    "tail": "their place, the last ones",
    "deepest": "their place, the deepest but the last",
    "laco": "LaCo, which merges layers",
    "laco_released": "LaCo as its code has it, which merges layers",
    "evopress": "EvoPress",
    "evopress_full": "EvoPress with its full budget",
    "random": "chance",
}


@dataclasses.dataclass(frozen=True)
class Mask:
    """The answer of a selector, or of the user, who need not tell more than the first two."""

    num_layers: int  # of the dense model
    keep: tuple[int, ...]  # ascending, counted from 0
    selector: str = "given"
    order: tuple[int, ...] = ()  # removed layers, the least wanted first
    theta: tuple[float, ...] = ()  # per layer, the search's logits: those kept are the largest
    scores: tuple[float, ...] = ()  # per layer, what the selector or the search's start went by
    kl: float | None = None  # held-out KL to the dense model, nats a token, not recovered
    tokens: int = 0  # that it cost, through masked models
    seed: int | None = None
    checkpoint: str | None = None  # hash of the dense checkpoint
    config: str | None = None  # hash of the stage's inputs
    teacher_tokens: int = 0  # what it cost through the dense model alone
    # (kept layer, layers whose difference from it is added to its weights): LaCo's.
    merges: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def chosen_by(self) -> str:
        """The selector in words."""
        return SELECTORS.get(self.selector, f"the selector {self.selector}")

    @property
    def place(self) -> str:
        """A file name for the layers removed and what is merged."""
        gone = "-".join(map(str, sorted(self.order)))
        if len(gone) > 120:  # a file's name has at most 255 bytes, with what is put around this
            gone = f"{len(self.order)}-layers-{fingerprint(sorted(self.order))}"
        merged = f"-merged-{fingerprint(self.merges)[:8]}" if self.merges else ""
        return f"without-{gone}{merged}"


KNOWN = {field.name for field in dataclasses.fields(Mask)}
FORM = pydantic.TypeAdapter(Mask)


def read_mask(path: pathlib.Path, num_layers: int) -> Mask:
    """A JSON object with `keep` and `num_layers`, and what else `Mask` has; more is passed over.

    Raises UserError when it is missing, broken or of a model of another depth than `num_layers`.
    """
    fields = {k: v for k, v in read_json(path).items() if k in KNOWN and v is not None}
    try:
        mask = FORM.validate_json(json.dumps(fields), strict=True)
    except pydantic.ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(
            f"{path}: not a mask file ({wrong}); expected keep, a list of layer numbers, and "
            "num_layers"
        ) from error
    return checked(mask, num_layers, str(path))


def checked(mask: Mask, num_layers: int, where: str) -> Mask:
    """The mask, with an order of the layers removed where it has none.

    Raises UserError, beginning with `where`, when it is not one of a model of `num_layers`.
    """
    keep, depth = list(mask.keep), mask.num_layers
    if depth != num_layers:
        raise UserError(f"{where}: a mask of {depth} layers, and the model has {num_layers}")
    if not keep or sorted(set(keep)) != keep or not 0 <= keep[0] <= keep[-1] < depth:
        raise UserError(
            f"{where}: keep is {keep}; expected ascending numbers from 0 to {depth - 1}"
        )
    removed = [layer for layer in range(depth) if layer not in keep]
    order = list(mask.order) or removed
    if sorted(order) != removed:
        raise UserError(f"{where}: order is {order}; expected the removed layers, {removed}")
    return dataclasses.replace(mask, order=tuple(order))


def warn_of_other(mask: Mask, identity: str) -> None:
    """A warning where a mask was found on another checkpoint than the one of this hash."""
    if mask.checkpoint not in (None, identity):
        log.warning(
            "the mask was found on another checkpoint (%s) than this one (%s); its layers may not "
            "be the ones that this model can do without",
            mask.checkpoint,
            identity,
        )
