"""The plan's figures against counts made otherwise: published sizes, and arithmetic by hand."""

import dataclasses
import json

import pytest

from e3jax import configure
from e3jax.errors import UserError
from e3jax.hf.families import from_hf, read_config
from e3jax.planning import budget

QWEN25_14B = {  # its config.json, as published
    "model_type": "qwen2",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "max_position_embeddings": 32768,
    "num_attention_heads": 40,
    "num_hidden_layers": 48,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}


def billions(number):
    return round(number / 1e9, 2)


def real(name, cfg):
    """The bundled configuration of a real model, and its plan."""
    run = configure.load_run(name)
    assert run.data.window <= cfg.max_position
    return run, budget.make_budget(run, cfg, "bfloat16")


def test_qwen3_32b(shared):
    run, found = real("qwen3-32b-math", read_config(shared / "configs" / "Qwen--Qwen3-32B"))
    assert (found.layers, found.keep) == (64, 48)
    assert billions(found.params_before) == 32.76
    assert billions(found.params_after) == 24.96  # a layer is 487.6 M
    assert billions(found.distill_tokens) == 0.5
    assert found.export_bytes == 2 * found.params_after
    assert found.search_tokens < 0.1 * found.distill_tokens
    assert run.data.window == 4096


def test_llama2_7b(shared):
    cfg = read_config(shared / "configs" / "meta-llama--Llama-2-7b-chat-hf")
    _, found = real("llama2-7b", cfg)
    assert (found.layers, found.keep) == (32, 12)
    assert found.params_before == 6_738_415_616  # what the hub says of it
    assert round(found.params_after / 1e9, 1) == 2.7


def test_qwen25_14b():
    _, found = real("qwen2.5-14b", from_hf(QWEN25_14B, "published"))
    assert (found.layers, found.keep) == (48, 24)
    assert found.params_before == 14_770_033_664
    assert billions(found.params_after) == 8.16


def test_chain_math(shared):
    folder = shared / "models" / "chain-math-24l"
    _, found = real("chain-math", read_config(folder))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert found.params_before == index["metadata"]["total_size"] // 2  # bfloat16
    assert (found.layers, found.keep) == (24, 18)
    assert found.tokens <= 3.6e6  # what this experiment may cost in all


@pytest.fixture
def small():
    """A configuration whose counts are easily made by hand, and a model for it."""
    run = configure.validate({"out": "x", "data": {"window": 100}}, "small")
    search = dataclasses.replace(
        run.search,
        keep=2,
        steps=10,
        batch=3,
        init_windows=5,
        score_every=4,
        score_windows=7,
        refine=0,
    )
    distill = dataclasses.replace(run.distill, steps=6, batch=2, top_k=4)
    cfg = from_hf(QWEN25_14B | {"num_hidden_layers": 3, "tie_word_embeddings": True}, "small")
    return dataclasses.replace(run, search=search, distill=distill), cfg


def test_tokens_and_bytes_by_hand(small):
    run, cfg = small
    found = budget.make_budget(run, cfg, "float16")
    assert found.importance_tokens == 3 * 5 * 100  # one layer left out at a time
    assert found.search_tokens == 10 * 3 * 100
    assert found.scoring_tokens == 4 * 7 * 100  # before steps 0, 4, 8 and after the last
    assert found.distill_tokens == 6 * 2 * 100
    assert found.tokens == 1500 + 3000 + 2800 + 1200
    layer = found.params_before - found.params_after
    width, mlp, kv = 5120, 13824, 8 * 128
    attention = 2 * width * (width + kv) + (width + 2 * kv)  # q, k, v, o and three biases
    assert layer == attention + 3 * width * mlp + 2 * width
    assert found.params_before == 3 * layer + 152064 * width + width
    assert found.checkpoint_bytes == 12 * found.params_after
    assert found.export_bytes == 2 * found.params_after
    assert found.teacher_cache_bytes == 0  # the teacher is online


def test_what_the_configuration_changes(small):
    run, cfg = small
    run = dataclasses.replace(
        run,
        search=dataclasses.replace(run.search, init="zeros", refine=2),
        distill=dataclasses.replace(run.distill, teacher="cache", hidden=0.0),
        export=dataclasses.replace(run.export, dtype="float32"),
    )
    found = budget.make_budget(run, cfg, "bfloat16")
    assert found.importance_tokens == 0
    assert found.scoring_tokens == ((4 + 2) * 7 + run.search.refine_windows) * 100
    assert found.candidate_tokens == 0
    assert found.teacher_cache_bytes == 1200 * (4 * (4 + 2) + 8)
    assert found.export_bytes == 4 * found.params_after


def test_candidates_are_recovered_for_a_while(small):
    run, cfg = small
    spec = dataclasses.replace(run.search, candidates=3, candidate_steps=5)
    found = budget.make_budget(dataclasses.replace(run, search=spec), cfg, "bfloat16")
    before = budget.make_budget(run, cfg, "bfloat16")
    tokens = 3 * (5 * 2 + 2 * run.search.refine_windows) * 100
    assert found.candidate_tokens == tokens == found.tokens - before.tokens


def test_all_layers_are_trained_for_a_while(small):
    run, cfg = small
    spec = dataclasses.replace(run.search, refine=2, adapt_steps=5)
    found = budget.make_budget(dataclasses.replace(run, search=spec), cfg, "bfloat16")
    spec = dataclasses.replace(spec, adapt_steps=0)
    before = budget.make_budget(dataclasses.replace(run, search=spec), cfg, "bfloat16")
    assert found.adapt_tokens == (5 * 2 + 2 * 7) * 100 == found.tokens - before.tokens
    assert before.adapt_tokens == 0


@pytest.mark.parametrize(("keep", "count"), [(0.5, 24), (0.75, 36), (24, 24), (1, 1), (47, 47)])
def test_keep_is_a_count_or_a_share(small, keep, count):
    run, _ = small
    run = dataclasses.replace(run, search=dataclasses.replace(run.search, keep=keep))
    assert budget.make_budget(run, from_hf(QWEN25_14B, "published"), "bfloat16").keep == count


@pytest.mark.parametrize("changes", [{"keep": 3}, {"keep": 0.01}, {"protect": (0, 1, 2)}])
def test_refused(small, changes):
    run, cfg = small
    run = dataclasses.replace(run, search=dataclasses.replace(run.search, **changes))
    with pytest.raises(UserError, match=r"search\.keep"):
        budget.make_budget(run, cfg, "bfloat16")


def test_description(small):
    run, cfg = small
    text = budget.describe(budget.make_budget(run, cfg, "bfloat16"))
    assert "3 -> 2 (ideal speed-up 1.50x)" in text
    assert "8.5 k tokens" in text  # in all
    assert all(len(line) < 100 for line in text.splitlines())
