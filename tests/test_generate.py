"""Greedy decoding against transformers' own, token for token in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from e3jax import devices, mesh
from e3jax.hf.families import read_config
from e3jax.hf.load import load_params
from e3jax.models import decoder
from e3jax.models import generate as generate_module
from e3jax.models.generate import make_generator
from e3jax.models.serve import generate, left_pad
from hf_tiny import save_tiny
from training_tiny import set_mesh

NEW = 24
LENGTHS = (5, 19, 12, 1, 26)
CASES = {
    "llama": ("llama", {}),
    "llama3-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "qwen2": ("qwen2", {}),  # biases on queries, keys and values
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "windows": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def random_prompts(lengths=LENGTHS, vocab=96):
    rng = np.random.default_rng(0)
    return [rng.integers(3, vocab, length).tolist() for length in lengths]


def theirs(folder, prompts, new=NEW, eos=None):
    """transformers' greedy continuations, one prompt at a time.

    Each by a model of its own: a dynamic rope there remembers the longest row it ever saw.
    """
    answers = []
    for prompt in prompts:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=eos,
                pad_token_id=0,
            )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@functools.cache
def loaded(folder):
    cfg = read_config(folder)
    return cfg, load_params(folder, cfg, jnp.float32)


def ours(folder, prompts, new=NEW, eos=(), batch=8):
    cfg, params = loaded(folder)
    generator = make_generator(cfg, dtype=jnp.float32, eos=eos)
    return list(generate(generator, params, prompts, batch, new))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.cases(1)
@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=CASES)
def test_answers_are_those_of_transformers(tmp_path, family, changes):
    folder = save_tiny(tmp_path, family, **changes)
    prompts = random_prompts()
    expected = theirs(folder, prompts)
    assert len({token for answer in expected for token in answer}) > 8 and len(
        set(map(tuple, expected))
    ) == len(prompts)
    assert ours(folder, prompts) == expected


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen2", "windows"])
def test_layers_apart_give_the_same_answers(tmp_path, case, monkeypatch):
    """As they are on GPUs, where a stack's weights would be copied for each token."""
    family, changes = CASES[case]
    folder = save_tiny(tmp_path, family, **changes)
    prompts = random_prompts()
    stacked = ours(folder, prompts)
    monkeypatch.setattr(devices, "platform", lambda: "gpu")
    cfg, params = loaded(folder)
    generator = make_generator(cfg, dtype=jnp.float32, eos=())
    weights = generator.prepare(params)
    assert len(weights["layers"]) == cfg.num_layers
    slots = generator.empty(weights, rows=8, columns=64, sampled=False)
    assert len(slots.cache) == cfg.num_layers
    assert generator.prepare(weights) is weights and weights["embed"] is params["embed"]
    with jax.set_mesh(mesh.make_mesh(data=2, devices=jax.devices()[:2])):  # XLA would gather all
        assert isinstance(generator.prepare(params)["layers"], dict)
    assert list(generate(generator, params, prompts, 8, NEW)) == stacked


@pytest.mark.slow
def test_a_cache_in_order_of_time_gives_the_same_answers(llama, monkeypatch):
    """As it is on TPUs."""
    prompts = random_prompts()
    by_head = ours(llama, prompts)
    monkeypatch.setattr(generate_module, "cache_order", lambda rows: (1, 2, 0, 3))
    assert ours(llama, prompts) == by_head


def test_weights_are_cast_once_but_norms(tmp_path):
    """In bfloat16, from float32 masters: what is multiplied is what a layer would cast."""
    cfg, params = loaded(save_tiny(tmp_path, "qwen2"))
    weights = make_generator(cfg, dtype=jnp.bfloat16, eos=()).prepare(params)
    for path, w in jax.tree_util.tree_leaves_with_path(weights):
        name = path[-1].key
        assert w.dtype == (jnp.float32 if name.endswith("norm") else jnp.bfloat16), name
    again = make_generator(cfg, dtype=jnp.bfloat16, eos=()).prepare(weights)
    same = jax.tree.map(lambda x, y: x is y, again, weights)
    assert all(jax.tree.leaves(same))  # nothing to cast, so nothing is copied


@pytest.mark.slow
def test_decoding_past_the_context_of_a_dynamic_rope(tmp_path):
    """Each row stretches by its own length, as it does alone."""
    rope = {"rope_type": "dynamic", "factor": 4.0}
    folder = save_tiny(tmp_path, "llama", rope_parameters=rope, max_position_embeddings=16)
    prompts = random_prompts((5, 14, 30))
    assert ours(folder, prompts) == theirs(folder, prompts)


def test_stops_at_any_of_several_ends(llama):
    prompts = random_prompts()
    free = theirs(llama, prompts)
    ends = [free[0][3], free[1][7]]
    expected = theirs(llama, prompts, eos=ends)
    assert len(expected[0]) <= 4 and expected[0][-1] in ends
    assert any(len(answer) == NEW for answer in expected)  # and some run on
    assert ours(llama, prompts, eos=ends) == expected


def test_stops_when_every_row_has_ended(llama):
    """The loop itself ends: no step is taken for slots that are free."""
    cfg, params = loaded(llama)
    prompts = random_prompts((9, 9))
    free = ours(llama, prompts)
    generator = make_generator(cfg, dtype=jnp.float32, eos=[free[0][0], free[1][0]])
    slots = generator.empty(params, rows=2, columns=32, sampled=False)
    tokens, segments = left_pad(prompts, 16)
    new = generate_module.Arrival(tokens, segments, np.arange(2), np.full(2, 20), None)
    slots = generator.admit(params, slots, new)
    slots, said = generator.go_on(params, slots, np.ones(2, bool), np.int32(2), np.int32(100))
    assert int(slots.column) == 1 and not slots.left.any()
    assert said[:, 0].tolist() == [free[0][0], free[1][0]] and (said[:, 1:] == -1).all()


@pytest.mark.cases(1)
@pytest.mark.parametrize("new", [1, 2, 7])
def test_max_new_tokens(llama, new):
    prompts = random_prompts()
    assert ours(llama, prompts, new=new) == [answer[:new] for answer in ours(llama, prompts)]


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch(llama):
    prompts = random_prompts()
    together = ours(llama, prompts)
    assert ours(llama, prompts, batch=2) == together  # the last batch is not full
    assert ours(llama, prompts[::-1], batch=5) == together[::-1]
    assert [ours(llama, [prompt], batch=1)[0] for prompt in prompts] == together


def test_padding_is_on_the_left():
    tokens, segments = left_pad([[7, 8, 9], [5]], 4)
    assert tokens.tolist() == [[0, 7, 8, 9], [0, 0, 0, 5]]
    assert segments.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2), (1, 2, 4)])
def test_eight_devices_give_the_same_answers(llama, sizes):
    """4 query heads in 2 groups, vocabulary and mlp over the model axis; the last one replicates
    the heads."""
    cfg, params = loaded(llama)
    prompts = random_prompts()
    expected = ours(llama, prompts)
    ends = [expected[1][6]]
    with set_mesh(*sizes):
        places = jax.tree.map(lambda s: s.sharding, decoder.abstract_params(cfg))
        spread = jax.tree.map(jax.device_put, params, places)
        generator = make_generator(cfg, dtype=jnp.float32, eos=ends)
        assert mesh.current() is not None
        answers = list(generate(generator, spread, prompts, 8, NEW))
    assert answers == ours(llama, prompts, eos=ends)
