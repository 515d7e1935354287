"""Which engine the model card names: every family is decided, and irregular layers are seen."""

import pytest

from e3jax.hf.cut import cut_config
from e3jax.hf.engines import ENGINES, EVERYWHERE
from e3jax.hf.families import FAMILIES

# Said of no engine by name: what vLLM and SGLang cannot name they hand to transformers, untested.
NOWHERE = {"Ministral"}
SOMEWHERE = {name for engine in ENGINES for name in engine.architectures}


def serving(config):
    return {engine.name for engine in ENGINES if engine.serves(config)}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_family_is_decided(family):
    name = family.architecture.removesuffix("ForCausalLM")
    assert (name in SOMEWHERE) != (name in NOWHERE)


def test_nothing_else_is_named():
    ours = {family.architecture.removesuffix("ForCausalLM") for family in FAMILIES.values()}
    assert ours == SOMEWHERE | NOWHERE
    for engine in ENGINES:
        assert engine.irregular <= engine.architectures and engine.architectures >= {*EVERYWHERE}


SIZES = {"num_hidden_layers": 8, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 96}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
ALL = {"vLLM", "SGLang", "llama.cpp"}


@pytest.mark.parametrize(
    ("family", "changes", "keep", "expected"),
    [
        ("llama", {}, [0, 2, 3], ALL),
        ("qwen3", {}, [0, 2, 3], ALL),
        ("gemma2", {}, [0, 1, 3], {"vLLM"}),  # windows in layers 0, 2, ...: now 0 alone
        ("gemma2", {}, [0, 2, 4], {"vLLM"}),  # in all that are left, which the others do not read
        ("gpt_oss", {"num_local_experts": 4}, [0, 1, 3], {"SGLang"}),
        ("gemma3_text", {}, [4, 5, 6], {"vLLM", "SGLang"}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 4}, [0, 5, 6], set()),
        ("smollm3", {}, [0, 3, 4], {"vLLM"}),  # every fourth without rope
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 4}, [0, 1, 2], ALL),
    ],
)
def test_irregular_layers(family, changes, keep, expected):
    import transformers

    config = transformers.AutoConfig.for_model(family, **{**SIZES, **changes}).to_dict()
    config["architectures"] = [FAMILIES[family].architecture]
    assert serving(cut_config(config, keep)) == expected


def test_what_is_not_known_is_not_promised():
    assert serving({}) == serving({"architectures": ["NewForCausalLM"]}) == set()
    assert serving({"architectures": ["LlamaForSequenceClassification"]}) == set()
    quantized = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"bits": 4}}
    assert serving(quantized) == {"vLLM", "SGLang"}
