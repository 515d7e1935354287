"""The sampler against transformers' logits processors in float32, and its draws against its own
distribution; requests through slots against transformers' answers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.generation import logits_process

from e3jax import files
from e3jax.data.text import load_tokenizer
from e3jax.errors import UserError
from e3jax.hf.families import read_config
from e3jax.hf.load import load_params
from e3jax.models import decoder, sample, serve
from e3jax.models.generate import make_generator
from e3jax.models.serve import Request
from hf_tiny import save_tiny, torch_logits
from test_generate import random_prompts, theirs
from training_tiny import set_mesh

VOCAB = 96
PROMPT = (7, 3, 50, 7, 9)
ASKED = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.3},
    {"temperature": 0.6, "top_p": 0.95},
    {"top_p": 1e-6},
    {"temperature": 1.5, "min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "temperature": 2.0, "top_k": 30, "top_p": 0.8, "min_p": 0.02},
]


def asking(rows, **changes):
    defaults = {field.name: field.default for field in dataclasses.fields(Request)}
    names = [field.name for field in dataclasses.fields(sample.Sampling)]
    kinds = {"top_k": jnp.int32, "seed": jnp.uint32}
    values = {
        name: [{**defaults, "temperature": 1.0, **row}[name] for row in rows] for name in names
    }
    arrays = {name: jnp.array(x, kinds.get(name, jnp.float32)) for name, x in values.items()}
    return sample.Sampling(**arrays | changes)


def processed(logits, ids, asked):
    """transformers' probabilities, its processors in the order of its generate."""
    asked = {"temperature": 1.0, **asked}
    chain = transformers.LogitsProcessorList()
    if "repetition_penalty" in asked:
        by = asked["repetition_penalty"]
        chain.append(logits_process.RepetitionPenaltyLogitsProcessor(by))
    chain.append(logits_process.TemperatureLogitsWarper(asked["temperature"]))
    if "top_k" in asked:
        chain.append(logits_process.TopKLogitsWarper(asked["top_k"]))
    if "top_p" in asked:
        chain.append(logits_process.TopPLogitsWarper(asked["top_p"]))
    if "min_p" in asked:
        chain.append(logits_process.MinPLogitsWarper(asked["min_p"]))
    found = chain(torch.tensor([ids]), torch.tensor(np.asarray(logits))[None])
    return found.softmax(-1)[0].numpy()


def seen_of(ids, rows):
    return jnp.zeros((rows, VOCAB), bool).at[:, jnp.array(ids)].set(True)


def test_distribution_is_that_of_transformers():
    """All rows in one call, each with its own parameters."""
    logits = 3 * jax.random.normal(jax.random.key(0), (len(ASKED), VOCAB))
    found = sample.distribution(logits, asking(ASKED), seen_of(PROMPT, len(ASKED)))
    expected = [processed(z, PROMPT, asked) for z, asked in zip(logits, ASKED, strict=True)]
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert ((np.asarray(found) == 0) == (np.array(expected) == 0)).all()
    assert len({int((row > 0).sum()) for row in expected}) > 5


def is_plausible(counts, probabilities, draws):
    """Pearson's chi-square of counts, outcomes with few of them together; at one in 1e5."""
    order = np.argsort(-probabilities)
    expected, counts = draws * probabilities[order], counts[order]
    assert counts[expected == 0].sum() == 0
    many = expected >= 5
    expected = np.append(expected[many], expected[~many].sum())
    counts = np.append(counts[many], counts[~many].sum())
    expected, counts = expected[expected > 0], counts[expected > 0]
    freedom = max(len(expected) - 1, 1)
    statistic = ((counts - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    return torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)) > 1e-5


@pytest.mark.parametrize("asked", [ASKED[0], ASKED[5], ASKED[-1]])
def test_draws_have_that_distribution(asked):
    """Over seeds, and over the tokens of an answer; nothing else is random."""
    draws = 4000
    logits = 3 * jax.random.normal(jax.random.key(1), (VOCAB,))
    expected = processed(logits, PROMPT, asked)
    rows = jnp.broadcast_to(logits, (draws, VOCAB))
    many, seen = asking([asked] * draws), seen_of(PROMPT, draws)
    number, zero = jnp.arange(draws, dtype=jnp.int32), jnp.zeros(draws, jnp.int32)
    by_seed = sample.next_token(rows, many.replace(seed=number.astype(jnp.uint32)), seen, zero)
    by_count = sample.next_token(rows, many, seen, number)
    for found in (by_seed, by_count):
        counts = np.bincount(found, minlength=VOCAB)
        assert is_plausible(counts, expected, draws)
        assert not is_plausible(counts, np.roll(expected, 1) + 1e-9, draws)
    assert (np.asarray(by_seed) != np.asarray(by_count)).mean() > 0.2
    assert len(set(np.asarray(sample.next_token(rows, many, seen, zero)))) == 1


# ---------------------------------------------------------------- requests


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("llama"), "llama")
    cfg = read_config(folder)
    return folder, cfg, load_params(folder, cfg, jnp.float32)


@functools.cache
def generator_of(cfg):
    return make_generator(cfg, dtype=jnp.float32, eos=())


def served(llama, requests, batch, *, tokenizer=None, params=None):
    _, cfg, ours = llama
    found = dict(serve.serve(generator_of(cfg), params or ours, requests, batch, tokenizer))
    return [found[number] for number in range(len(requests))]


def test_the_model_is_asked_what_transformers_would_draw_from(llama):
    """First tokens of many seeds against the processed distribution of transformers' logits."""
    asked = {"temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.5}
    logits = torch_logits(llama[0], np.array([PROMPT]))[0, -1]
    draws = 512
    found = served(llama, [Request(PROMPT, 1, seed=n, **asked) for n in range(draws)], 128)
    counts = np.bincount(np.ravel(found), minlength=VOCAB)
    assert is_plausible(counts, processed(logits, PROMPT, asked), draws)
    assert not is_plausible(counts, processed(logits, PROMPT, {"temperature": 3.0}), draws)


def mixed_requests():
    """Of all kinds, short and long, two of them the same but for the seed."""
    prompts = random_prompts((45, 19, 33, 3, 40, 30, 44, 36, 21, 40, 38))
    lengths = (3, 24, 1, 30, 8, 17, 2, 12, 20, 5, 9)  # so that each takes as many columns
    asks = zip(prompts, lengths, ASKED, strict=True)
    found = [Request(p, n, seed=7, **{"temperature": 1.0, **asked}) for p, n, asked in asks]
    return [*found, dataclasses.replace(found[1], seed=8), Request(prompts[1], 24)]


@pytest.mark.slow
def test_a_request_gets_the_same_alone_and_in_company(llama):
    """Whatever the batch, the slot and the neighbours; the queue is longer than the slots."""
    requests = mixed_requests()
    alone = [served(llama, [request], 1)[0] for request in requests]
    assert [len(answer) for answer in alone] == [request.max_new_tokens for request in requests]
    assert alone[1] != alone[-2] != alone[-1]  # seeds, and none
    assert served(llama, requests, 3) == alone
    assert served(llama, requests[::-1], 3) == alone[::-1]


@pytest.mark.slow
def test_devices_draw_the_same(llama):
    requests = mixed_requests()
    expected = served(llama, requests, 3)
    with set_mesh(2, 2, 2):
        places = jax.tree.map(lambda s: s.sharding, decoder.abstract_params(llama[1]))
        spread = jax.tree.map(jax.device_put, llama[2], places)
        assert served(llama, requests, 8, params=spread) == expected


@pytest.mark.slow
def test_greedy_with_a_repetition_penalty_is_transformers_own(llama):
    folder, prompts = llama[0], random_prompts((5, 12, 9))
    found = served(llama, [Request(p, 20, repetition_penalty=1.4) for p in prompts], 2)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, repetition_penalty=1.4,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert answer == ids[0, len(prompt) :].tolist()


def test_short_answers_do_not_wait_for_long_ones(llama):
    """Two slots; one long answer beside many short ones takes no more steps than itself."""
    _, cfg, params = llama
    generator = make_generator(cfg, dtype=jnp.float32, eos=())
    columns = []

    def watch(weights, slots, *rest):
        found = generator.go_on(weights, slots, *rest)
        columns.append(int(found[0].column) - sum(columns))
        return found

    prompts = random_prompts((9,) * 8)
    requests = [Request(prompts[0], 36), *(Request(prompt, 5) for prompt in prompts[1:])]
    watched = dataclasses.replace(generator, go_on=watch)
    order, found = zip(*serve.serve(watched, params, requests, 2), strict=True)
    assert order == (*range(1, 7), 0, 7) and columns == [5] * 6 + [6]  # 36 steps for 71 tokens
    for number, answer in zip(order, found, strict=True):
        request = requests[number]
        assert [answer] == theirs(llama[0], [request.prompt], request.max_new_tokens)


@pytest.mark.slow
def test_few_programs_for_any_lengths(llama, monkeypatch):
    """A width of prompts is a power of two, and all else is data."""
    _, cfg, params = llama
    traced, embed = [], decoder.first_stream

    def counted(weights, tokens, *rest):
        traced.append(tokens.shape)
        return embed(weights, tokens, *rest)

    monkeypatch.setattr(decoder, "first_stream", counted)
    generator = make_generator(cfg, dtype=jnp.float32, eos=())
    for asked in ({"temperature": 0.5}, {"top_p": 0.5, "temperature": 1.0, "seed": 3}):
        lengths = (1, 5, 16, 9, 17, 30)
        requests = [Request(p, 64 - len(p), **asked) for p in random_prompts(lengths)]
        list(serve.serve(generator, params, requests, 4))
    assert traced == [(1, 16), (4, 1), (1, 32)]


def test_stop_strings_end_an_answer_where_they_are_complete(llama):
    """Also where one is spread over tokens, and whenever it is looked for."""
    tokenizer = load_tokenizer(files.bundled("demo/model"))
    ids = list(range(8, 60))
    cfg = dataclasses.replace(llama[1], vocab_size=len(tokenizer))
    params = decoder.init_params(jax.random.key(0), cfg)
    ours = (None, cfg, params)
    requests = [Request([n], 40, temperature=1.0, seed=n) for n in ids[:5]]
    free = served(ours, requests, 5)
    texts = [tokenizer.decode(answer) for answer in free]
    for stop in (texts[0][10:16], texts[1][30:33]):
        stopping = [
            dataclasses.replace(request, stop=(stop, "never there")) for request in requests
        ]
        found = served(ours, stopping, 5, tokenizer=tokenizer)
        assert served(ours, stopping[:3], 1, tokenizer=tokenizer) == found[:3]
        shorter = 0
        for answer, whole in zip(found, free, strict=True):
            ends = [n for n in range(1, 41) if stop in tokenizer.decode(whole[:n])]
            assert answer == whole[: min(ends, default=40)]
            shorter += bool(ends)
        assert shorter > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"stop": ("",)},
        {"prompt": []},
    ],
)
def test_what_is_no_distribution_is_refused(wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))}=.*expected"):
        Request(**{"prompt": [1], "max_new_tokens": 4, **wrong})
