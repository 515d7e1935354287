"""A model's work, from the shapes: of a pruned one the head and the embedding do not shrink."""

from e3jax.models.config import ModelConfig
from e3jax.models.params import active_params, count_params
from e3jax.planning.cost import body_flops, head_flops


def prefill_flops(cfg: ModelConfig, time: int) -> float:
    """Operations of a prompt of `time` tokens; logits are made for its last one alone."""
    return time * body_flops(cfg, time) + head_flops(cfg)


def decode_bytes(cfg: ModelConfig, batch: int, seen: float, size: int) -> float:
    """Bytes read for one more token in each of `batch` rows that have `seen`: the weights, and keys
    and values, of `size` bytes a number each.

    Of an embedding apart from the head a row is read; of experts those that a token is sent to, on
    average if each were as likely.
    """
    weights = count_params(cfg) - (0 if cfg.tied else cfg.vocab_size * cfg.width)
    if cfg.experts is not None and cfg.experts.per_token < cfg.experts.count:
        taken = cfg.experts.per_token / cfg.experts.count
        idle = (count_params(cfg) - active_params(cfg)) / (1 - taken)  # all experts' weights
        weights -= idle * (1 - taken) ** batch
    cached = sum(cfg.cached_width * min(window or seen, seen) for window in cfg.windows)
    return size * (weights + batch * cached)
