"""Tiny random Hugging Face models, and their logits by transformers and by us in float32."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from e3jax.hf.families import read_config
from e3jax.hf.load import load_params
from e3jax.models import decoder
from e3jax.models.config import ModelConfig

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def tiny_model(family: str, **changes) -> transformers.PreTrainedModel:
    """A random model in which no weight is idle: norms are not one, biases not zero."""
    if family == "qwen3":
        changes = {"head_dim": 8, **changes}
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.2)
            if "norm" in name:
                weight.add_(1.0)
    return model.eval()


def save_tiny(folder, family: str, dtype=torch.float32, shard="5GB", **changes) -> pathlib.Path:
    tiny_model(family, **changes).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return pathlib.Path(folder)


def edit_json(path: pathlib.Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def rewrite(folder, change, metadata=None) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **(metadata or {})})


def random_tokens(vocab: int, length: int, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(1).integers(0, vocab, (rows, length))


def torch_logits(folder, tokens: np.ndarray) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits.numpy()


def model_logits(params, cfg: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    ones = np.ones_like(tokens)
    fields = [jnp.asarray(x, jnp.int32) for x in (tokens, positions, ones, tokens)]
    batch = decoder.Batch(*fields, jnp.asarray(ones, bool))
    h = decoder.hidden(params, batch, cfg, dtype=jnp.float32, remat="none")
    return np.asarray(decoder.logits(params, h, cfg))


def our_logits(folder, tokens: np.ndarray) -> np.ndarray:
    cfg = read_config(folder)
    return model_logits(load_params(folder, cfg, jnp.float32), cfg, tokens)


def assert_same_logits(ours: np.ndarray, theirs: np.ndarray) -> None:
    """To 1e-4 of the size of the logits, with logits that have one."""
    assert np.std(theirs) > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
