"""Tiny models and windows of documents that the selectors' tests share."""

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from e3jax.hf.families import read_config
from e3jax.hf.load import load_params
from e3jax.models.decoder import Batch
from hf_tiny import save_tiny


def make_tiny(folder, family: str, **changes):
    """(transformers' model in float64, our parameters, configuration) of random layers."""
    folder = save_tiny(folder, family, **changes)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    cfg = read_config(folder)
    return model, load_params(folder, cfg, jnp.float32), cfg


def as_batch(rows: list[list[np.ndarray]], time: int) -> Batch:
    """Rows of documents -> windows of `time` tokens, padded."""
    shape = (len(rows), time)
    tokens, positions, segments, targets = (np.zeros(shape, np.int32) for _ in range(4))
    mask = np.zeros(shape, bool)
    for b, documents in enumerate(rows):
        start = 0
        for number, ids in enumerate(documents, 1):
            here = slice(start, start + len(ids))
            tokens[b, here], segments[b, here] = ids, number
            positions[b, here] = np.arange(len(ids))
            targets[b, here] = np.roll(ids, -1)
            mask[b, start : start + len(ids) - 1] = True
            start += len(ids)
    return Batch(tokens, positions, segments, targets, mask)
