"""What a run will do and cost, from the configuration and config.json alone: no device, no data."""

import dataclasses
import math

from e3jax import config
from e3jax.data.teacher import estimate_bytes
from e3jax.models.config import ModelConfig
from e3jax.models.decoder import count_params
from e3jax.search.search import fixed_layers, resolve_keep
from e3jax.target import BYTES


@dataclasses.dataclass(frozen=True)
class Budget:
    """Upper bounds: windows count as full. Tokens are those that a masked or student model sees."""

    layers: int
    keep: int
    params_before: int
    params_after: int
    importance_tokens: int
    search_tokens: int
    scoring_tokens: int
    adapt_tokens: int
    candidate_tokens: int
    distill_tokens: int
    teacher_cache_bytes: int
    checkpoint_bytes: int
    checkpoints: int  # that there may be at a time: latest, best and the one being written
    export_bytes: int

    @property
    def tokens(self) -> int:
        return (
            self.importance_tokens
            + self.search_tokens
            + self.scoring_tokens
            + self.adapt_tokens
            + self.candidate_tokens
            + self.distill_tokens
        )


def make_budget(run: config.Run, cfg: ModelConfig, source_dtype: str) -> Budget:
    """The budget of `run` for a model; with a given mask nothing is searched.

    Raises UserError where search.keep, protect and force disagree.
    """
    keep = resolve_keep(run.search.keep, cfg.num_layers)
    fixed_layers(run.search, cfg.num_layers)
    search, distill, window = run.search, run.distill, run.data.window
    searched = distill.mask is None
    init_passes = {"kl": cfg.num_layers, "shortgpt": 1}.get(search.init, 0) * (search.start is None)
    after = count_params(cfg.take_layers(range(keep)))
    scores = math.ceil(search.steps / search.score_every) + 1
    scored = (scores + search.refine) * search.score_windows
    scored += bool(search.refine) * max(1, search.candidates) * search.refine_windows
    adapted = 0
    if search.adapt_steps:  # its answer is scored before the first step and after the last
        adapted = search.adapt_steps * distill.batch + 2 * search.score_windows
    tried = 0
    if search.candidates > 1:  # each is scored before its first step and after its last
        steps = search.candidate_steps * distill.batch
        tried = search.candidates * (steps + 2 * search.refine_windows)
    stepped = distill.steps * distill.batch * window
    dtype = source_dtype if run.export.dtype == "source" else run.export.dtype
    return Budget(
        layers=cfg.num_layers,
        keep=keep,
        params_before=count_params(cfg),
        params_after=after,
        importance_tokens=searched * init_passes * search.init_windows * window,
        search_tokens=searched * (search.steps * search.batch * search.masks_per_window * window),
        scoring_tokens=searched * scored * window,
        adapt_tokens=searched * adapted * window,
        candidate_tokens=searched * tried * window,
        distill_tokens=stepped + distill.fit * window,
        teacher_cache_bytes=estimate_bytes(stepped, distill.top_k)
        if distill.teacher == "cache"
        else 0,
        checkpoint_bytes=12 * after,  # parameters and two moments, float32
        checkpoints=(run.keep_checkpoints + 2) * (1 + len(run.evaluate.baselines)),
        export_bytes=BYTES[dtype] * after * (1 + run.export.raw),
    )


def describe(counted: Budget) -> str:
    """The budget in words, a line a fact."""
    ratio = counted.layers / counted.keep
    saved = 1 - counted.params_after / counted.params_before
    lines = [
        ("layers", f"{counted.layers} -> {counted.keep} (ideal speed-up {ratio:.2f}x)"),
        (
            "parameters",
            f"{_si(counted.params_before)} -> {_si(counted.params_after)} ({saved:.0%} fewer)",
        ),
        ("importance", f"<= {_si(counted.importance_tokens)} tokens"),
        ("search", f"<= {_si(counted.search_tokens)} tokens"),
        ("held-out scores", f"<= {_si(counted.scoring_tokens)} tokens"),
        ("adaptation", f"<= {_si(counted.adapt_tokens)} tokens, all layers trained for a while"),
        ("candidates", f"<= {_si(counted.candidate_tokens)} tokens, recovered for a while"),
        ("distillation", f"<= {_si(counted.distill_tokens)} tokens"),
        ("in all", f"<= {_si(counted.tokens)} tokens through masked or student models"),
        ("teacher cache", f"{_si(counted.teacher_cache_bytes)}B before compression"),
        (
            "checkpoints",
            f"{_si(counted.checkpoint_bytes)}B each, up to {counted.checkpoints} at a time, "
            "baselines' included",
        ),
        ("export", f"{_si(counted.export_bytes)}B"),
    ]
    return "\n".join(f"  {name:<16} {text}" for name, text in lines)


def _si(number: float) -> str:
    """1234567 -> '1.23 M'."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000 or unit == "T":
            return f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError
