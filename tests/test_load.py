"""How tokens are spread over experts, against transformers' routers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from e3jax.evaluate import load
from e3jax.hf.families import read_config
from e3jax.hf.load import load_params
from hf_tiny import random_tokens, save_tiny
from sharded_tiny import MODELS, placed
from test_families import CASES, batch_of
from training_tiny import random_batch, set_mesh


@pytest.mark.parametrize("name", ["qwen3_moe-dense-inside", "deepseek_v3", "gpt_oss"])
def test_counts_are_those_of_transformers(tmp_path, name):
    family, changes = CASES[name]
    folder = save_tiny(tmp_path, family, **changes)
    cfg, tokens = read_config(folder), random_tokens(96, 24)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    sent = {}
    for number, layer in enumerate(model.model.layers):
        router = getattr(layer.mlp, "router", getattr(layer.mlp, "gate", None))
        if cfg.is_sparse(number):
            keep = lambda _, __, out, number=number: sent.__setitem__(number, out[-1])
            router.register_forward_hook(keep)
    with torch.no_grad():
        model(torch.as_tensor(tokens))
    batch = batch_of(tokens)
    real = np.arange(24) < 20  # what is padded comes last, and nobody before sees it
    batch = batch.replace(segments=jnp.asarray(np.tile(real, (2, 1)), jnp.int32))
    found = load.make_loads(cfg, dtype=jnp.float32)(load_params(folder, cfg), [batch, batch])
    assert list(found) == sorted(sent)
    for number, chosen in sent.items():
        chosen = chosen.reshape(2, 24, -1)[:, :20].numpy()
        want = 2 * np.bincount(chosen.reshape(-1), minlength=cfg.experts.count)
        np.testing.assert_array_equal(found[number], want)


@pytest.mark.slow
def test_eight_devices_count_what_one_does():
    def counted(sizes):
        with set_mesh(*sizes):
            count = load.make_loads(MODELS["sparse"], dtype=jnp.float32)
            return count(placed("sparse"), [random_batch(0)])

    assert counted((1, 2, 4)) == counted((1, 1, 1))


def test_summary():
    found = load.summary({0: [4, 0, 0, 0], 3: [1, 1, 1, 1]})
    assert found == {"busiest, mean": "2.50x", "greatest": "4.00x", "sent nothing": "3 of 8"}
