"""Layer scores against transformers with the layer deleted, and against published figures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from e3jax import config, job
from e3jax.data.text import tokenize
from e3jax.hf.families import read_config
from e3jax.hf.load import load_params
from e3jax.models.decoder import Batch
from e3jax.search import selectors
from hf_tiny import random_tokens, save_tiny
from training_tiny import set_mesh

# KL to the dense model without each layer of chain-math-24l, 24 training rows: PyTorch, float32.
LEAVE_ONE_OUT = (
    "6.4506 0.7557 0.4530 0.5122 1.0366 0.0032 0.0033 0.0164 0.0557 0.0050 0.0020 0.0017 "
    "0.0024 0.0014 0.0013 0.0020 0.0024 0.0014 0.0130 0.0051 0.0058 0.0043 0.1409 0.0798"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(transformers' model, our parameters, configuration) of four random layers."""
    folder = save_tiny(tmp_path_factory.mktemp("tiny"), "llama", num_hidden_layers=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
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


def torch_log_probs(model, tokens):
    with torch.no_grad():
        return torch.log_softmax(
            model(torch.as_tensor(tokens), use_cache=False).logits.double(), -1
        )


def torch_leave_one_out(model, tokens) -> np.ndarray:
    """KL(dense || without l) over the predictions of tokens 1.. of each row, float64 [L]."""
    whole, dense = model.model.layers, torch_log_probs(model, tokens)[:, :-1]
    scores = []
    for removed in range(len(whole)):
        model.model.layers = torch.nn.ModuleList(x for i, x in enumerate(whole) if i != removed)
        pruned = torch_log_probs(model, tokens)[:, :-1]
        scores.append(float((dense.exp() * (dense - pruned)).sum(-1).mean()))
    model.model.layers = whole
    return np.array(scores)


def torch_block_influence(model, tokens) -> np.ndarray:
    cosines = []

    def hook(_, args, output):
        out = output[0] if isinstance(output, tuple) else output
        cosines.append(float(torch.cosine_similarity(args[0].double(), out.double(), -1).mean()))

    handles = [x.register_forward_hook(hook) for x in model.model.layers]
    torch_log_probs(model, tokens)
    for handle in handles:
        handle.remove()
    return 1 - np.array(cosines)


@pytest.mark.parametrize("form", ["rows", "packed", "two batches"])
def test_scores_are_those_of_transformers(tiny, form):
    """However the tokens come: padding, empty rows and neighbours in the window change nothing."""
    model, params, cfg = tiny
    tokens = random_tokens(cfg.vocab_size, 12)
    batches = {
        "rows": [as_batch([[row] for row in tokens], 12)],
        "packed": [as_batch([list(tokens), []], 27)],
        "two batches": [as_batch([[row]], 12) for row in tokens],
    }[form]
    kl, tokens_kl = selectors.leave_one_out_kl(params, cfg, batches, dtype=jnp.float32, chunk=10)
    bi, tokens_bi = selectors.block_influence(params, cfg, batches, dtype=jnp.float32)
    want = torch_leave_one_out(model, tokens)
    np.testing.assert_allclose(kl, want, rtol=2e-4)
    np.testing.assert_allclose(bi, torch_block_influence(model, tokens), atol=2e-6)
    assert (tokens_kl, tokens_bi) == (4 * 24, 24)
    assert np.ptp(want) > 0.1 * want.max()


def test_eight_devices_give_the_scores_of_one(tiny):
    _, params, cfg = tiny
    params = jax.tree.map(np.asarray, params)  # of no device, so good for either mesh
    batch = as_batch([[row] for row in random_tokens(cfg.vocab_size, 12, rows=8)], 12)
    one = selectors.leave_one_out_kl(params, cfg, [batch], dtype=jnp.float32, chunk=16)
    flat = selectors.block_influence(params, cfg, [batch], dtype=jnp.float32)
    with set_mesh(2, 4, 1):
        eight = selectors.leave_one_out_kl(params, cfg, [batch], dtype=jnp.float32, chunk=16)
        flat_eight = selectors.block_influence(params, cfg, [batch], dtype=jnp.float32)
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-4)
    np.testing.assert_allclose(flat_eight[0], flat[0], atol=1e-6)
    assert (eight[1], flat_eight[1]) == (one[1], flat[1])


def test_least_important():
    scores = np.array([0.5, 0.1, 0.3, 0.2, 0.1])
    choose = lambda keep, **fixed: selectors.least_important("x", scores, keep, 7, **fixed)
    assert choose(3).keep == (0, 2, 3)
    assert choose(3).order == (1, 4)  # of the tie, the lower layer first
    assert choose(2, protect=(1,)).order == (4, 3, 2)
    assert choose(3, force=(0,)).order == (0, 1)
    assert choose(3, protect=(1, -1), force=(-5,)).order == (0, 3)  # negative: from the end
    assert choose(3).scores == tuple(scores) and choose(3).tokens == 7


@pytest.mark.slow
def test_published_figures(shared, tmp_path, one_device):
    """Leave-one-out KL of a real model, and the six layers that ShortGPT removes."""
    folder = shared / "models" / "chain-math-24l"
    train = shared / "data" / "chain-math" / "train.jsonl.gz"
    source = config.Source(path=str(train), rows=("0:24",))
    data = config.Data(train=(source,), window=512, cache=str(tmp_path), decontaminate=())
    windows = tokenize(data.train, data, folder)
    assert windows.meta["documents"] == 24
    cfg = read_config(folder)
    params = load_params(folder, cfg, jnp.float32)
    batches = list(job.ordered(windows, 8))
    scores, _ = selectors.leave_one_out_kl(params, cfg, batches, dtype=jnp.float32, chunk=4096)
    want = np.array(LEAVE_ONE_OUT.split(), float)
    np.testing.assert_allclose(scores, want, rtol=2e-4, atol=5.1e-5)  # four digits are published
    influence, spent = selectors.block_influence(params, cfg, batches, dtype=jnp.float32)
    chosen = selectors.least_important("shortgpt", influence, 18, spent)
    assert sorted(chosen.order) == [10, 11, 13, 14, 15, 17]
    chosen = selectors.least_important("kl", scores, 18, spent)
    assert sorted(chosen.order) == [10, 11, 13, 14, 15, 17]
