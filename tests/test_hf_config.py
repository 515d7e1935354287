"""config.json against transformers' own reading of it, and the tensor table against its models."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from e3jax.errors import UserError
from e3jax.hf.cut import cut_config
from e3jax.hf.families import FAMILIES, from_hf, read_config, to_hf
from e3jax.hf.tensors import tensor_table
from e3jax.models.config import ModelConfig, Rope
from e3jax.models.rope import inverse_frequencies
from hf_tiny import SHARED, SIZES

DENSE = ("llama", "mistral", "qwen2", "qwen3")  # the others are in test_families.py
REAL = sorted(
    path
    for path in (SHARED / "configs").glob("*/config.json")
    if json.loads(path.read_text()).get("model_type") in DENSE
    and "quantization_config" not in json.loads(path.read_text())
)
real = pytest.mark.parametrize("path", REAL, ids=lambda p: p.parent.name)
# Any list shorter than two would make the tests that run over REAL pass by doing nothing.
needs_real = pytest.mark.skipif(len(REAL) < 2, reason="no ../shared/configs")
families = pytest.mark.parametrize("family", DENSE)


def config_class(family: str):
    return type(transformers.AutoConfig.for_model(family))


def facts(hf, family: str) -> dict:
    """What transformers' config object says, by the names of ModelConfig."""
    layers = hf.num_hidden_layers
    window = getattr(hf, "sliding_window", None)
    sliding = {"llama": [False] * layers, "mistral": [window is not None] * layers}.get(
        family, [t == "sliding_attention" for t in getattr(hf, "layer_types", ())]
    )
    return {
        "num_layers": layers,
        "width": hf.hidden_size,
        "mlp_width": hf.intermediate_size,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads,
        "head_dim": getattr(hf, "head_dim", hf.hidden_size // hf.num_attention_heads),
        "vocab_size": hf.vocab_size,
        "max_position": hf.max_position_embeddings,
        "norm_eps": hf.rms_norm_eps,
        "tied": hf.tie_word_embeddings,
        "windows": tuple(window if s else None for s in sliding),
        "activation": hf.hidden_act,
        "qkv_bias": family == "qwen2" or bool(getattr(hf, "attention_bias", False)),
        "out_bias": family != "qwen2" and bool(getattr(hf, "attention_bias", False)),
        "mlp_bias": bool(getattr(hf, "mlp_bias", False)),
        "qk_norm": family == "qwen3",
    }


def assert_agrees(cfg: ModelConfig, hf, family: str) -> None:
    ours = dataclasses.asdict(cfg)
    assert {key: ours[key] for key in facts(hf, family)} == facts(hf, family)
    assert_rope_agrees(cfg, hf)


def assert_rope_agrees(cfg: ModelConfig, hf, length: int | None = None) -> None:
    """Same angles and magnitude as transformers computes from its own config object."""
    kind = hf.rope_parameters["rope_type"]
    assert cfg.rope.kind == kind
    if kind == "default":
        theta, dims = hf.rope_parameters["rope_theta"], np.arange(0, cfg.head_dim, 2)
        freqs, magnitude = theta ** -(dims / cfg.head_dim), 1.0
    else:
        freqs, magnitude = ROPE_INIT_FUNCTIONS[kind](hf, "cpu", seq_len=length)
    ours = inverse_frequencies(cfg.rope, cfg.head_dim, length or 0)
    np.testing.assert_allclose(np.asarray(ours), np.asarray(freqs), rtol=2e-6)
    assert cfg.rope.attention_factor == pytest.approx(magnitude)


@families
def test_absent_keys_mean_transformers_defaults(family):
    assert_agrees(from_hf({"model_type": family}, "x"), config_class(family)(), family)


@needs_real
@real
def test_real_configs(path):
    hf = transformers.AutoConfig.from_pretrained(path.parent)
    assert_agrees(read_config(path), hf, hf.model_type)


@needs_real
@real
def test_tensor_table_is_transformers_state_dict(path):
    hf = transformers.AutoConfig.from_pretrained(path.parent)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf)
    theirs = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert {t.name: t.shape for t in tensor_table(read_config(path))} == theirs


VARIANTS = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
    ("llama", {"num_key_value_heads": None}),
    ("mistral", {"sliding_window": None, "head_dim": 16}),
    ("mistral", {"sliding_window": 8}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen3", {"attention_bias": True, "head_dim": 16}),
    (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_variants(family, changes):
    given = {"model_type": family, **SIZES, **changes}
    hf = transformers.AutoConfig.for_model(family, **{**SIZES, **changes})
    cfg = from_hf(given, "x")
    assert_agrees(cfg, hf, family)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf)
    theirs = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert {t.name: t.shape for t in tensor_table(cfg)} == theirs
    # And what we write for such a model says the same, to transformers and to us.
    written = to_hf(cfg, bos=1, eos=2, pad=0)
    assert from_hf(written, "x") == cfg
    assert_agrees(cfg, config_class(family).from_dict(written), family)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
ROPES = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    YARN,
    {**YARN, "attention_factor": 0.7},
    {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    {**YARN, "mscale": 1.0},
    {**YARN, "beta_fast": 64, "beta_slow": 2, "truncate": False},
    {**YARN, "factor": None},
    {"rope_type": "yarn", "factor": 4.0},
]


@pytest.mark.parametrize("form", ["transformers 5", "transformers 4", "before 4.43"])
@pytest.mark.parametrize("rope", ROPES, ids=lambda r: "-".join(map(str, r.values())))
def test_rope_kinds_at_real_sizes(rope, form):
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 32768}
    config = {"model_type": "llama", **sizes}
    if form == "transformers 5":
        config["rope_parameters"] = {**rope, "rope_theta": 500000.0}
    else:
        config |= {"rope_theta": 500000.0, "rope_scaling": dict(rope)}
    if form == "before 4.43":
        config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    cfg = from_hf(config, "x")
    hf = transformers.LlamaConfig.from_dict(json.loads(json.dumps(config)))
    for length in (1, 32768, 50000):
        assert_rope_agrees(cfg, hf, length)
    assert from_hf(to_hf(cfg), "x") == cfg
    assert_rope_agrees(cfg, transformers.LlamaConfig.from_dict(to_hf(cfg)), 50000)


def test_longrope_at_real_sizes():
    """Of 96 of 128 numbers, as Phi-4-mini has them."""
    factors = {"short_factor": [1.0] * 48, "long_factor": [1.0 + i for i in range(48)]}
    given = {
        "model_type": "phi3",
        "max_position_embeddings": 131072,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", **factors},
        **{"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8},
    }
    cfg, hf = from_hf(given, "x"), transformers.Phi3Config.from_dict(json.loads(json.dumps(given)))
    assert cfg.rope_dim == 96 and cfg.rope.attention_factor > 1.1
    for length in (4096, 4097):
        freqs, magnitude = ROPE_INIT_FUNCTIONS["longrope"](hf, "cpu", seq_len=length)
        ours = inverse_frequencies(cfg.rope, cfg.rope_dim, length)
        np.testing.assert_allclose(np.asarray(ours), np.asarray(freqs), rtol=2e-6)
        assert cfg.rope.attention_factor == pytest.approx(magnitude)
    assert from_hf({**given, "rope_scaling": {"type": "su", **factors}}, "x") == cfg


def test_old_and_new_form_are_one():
    scaling = {"rope_type": "linear", "factor": 2.0}
    old = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": scaling}
    new = {"model_type": "llama", "rope_parameters": {**scaling, "rope_theta": 5e5}}
    assert from_hf(old, "x") == from_hf(new, "x")
    assert from_hf(old, "x").rope == Rope("linear", theta=5e5, factor=2.0)


# ---- refusals


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "gemma3"}, ["gemma3", *FAMILIES]),
        ({}, ["model_type", *FAMILIES]),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            ["LlamaForCausalLM"],
        ),
        ({"model_type": "qwen3", "quantization_config": {"quant_method": "fp8"}}, ["fp8"]),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "axial"}}, ["axial", "longrope"]),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "longrope"}}, ["short_factor"]),
        (
            {
                "model_type": "phi3",
                "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1, 2]},
            },
            ["96", "[1, 2]"],
        ),
        ({"model_type": "llama", "rope_scaling": {"type": "linear"}}, ["factor", "None"]),
        ({"model_type": "llama", "rope_parameters": {"full_attention": {}}}, ["full_attention"]),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"model_type": "llama", "hidden_act": "xielu"}, ["xielu", "silu"]),
        ({"model_type": "llama", "num_key_value_heads": 5}, ["num_key_value_heads", "5"]),
        ({"model_type": "llama", "hidden_size": "4096"}, ["hidden_size", "'4096'"]),
        ({"model_type": "llama", "vocab_size": 0}, ["vocab_size", "0"]),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 32}, ["ministral"]),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, ["layer_types", "32"]),
        (
            {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 32},
            ["use_sliding_window"],
        ),
        ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 32}, ["linear_attention"]),
    ],
)  # fmt: skip
def test_refusal_names_the_reason(config, named):
    with pytest.raises(UserError) as error:
        from_hf(config, "folder/config.json")
    for word in ["folder/config.json", *named]:
        assert word in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_broken_config_file(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"config\.json"):
        read_config(tmp_path)


def test_missing_config_file(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        read_config(tmp_path)


# ---- cutting


def layer_types(config: dict, family: str) -> list[str]:
    return config_class(family).from_dict(dict(config)).layer_types


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_cut_keeps_each_layers_window(family, explicit):
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    config = {"model_type": family, **SIZES, "num_hidden_layers": 6, **window}
    if explicit:
        config["layer_types"] = ["sliding_attention", "full_attention"] * 3
    before, keep = layer_types(config, family), [0, 3, 4]
    cut = cut_config(config, keep)
    assert cut["num_hidden_layers"] == 3
    assert cut["layer_types"] == layer_types(cut, family) == [before[i] for i in keep]
    if not explicit:  # what a reader that knows only the number sees is the same
        assert layer_types({**cut, "layer_types": None}, family) == cut["layer_types"]
    assert len(set(layer_types(cut, family))) == 2
    assert from_hf(cut, "x") == from_hf(config, "x").take_layers(keep)


def test_cut_of_every_per_layer_list_and_of_nothing_else():
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 3,
        "eos_token_id": [5, 6, 7],
        "some_layer_facts": ["a", "b", "c"],
        "other": [1, 2],
        "torch_dtype": "float16",
    }
    cut = cut_config(config, [0, 2])
    assert cut == {**config, "num_hidden_layers": 2, "some_layer_facts": ["a", "c"]}
    assert cut_config({**config, "num_hidden_layers": 1}, [0])["architectures"] == [
        "LlamaForCausalLM"
    ]


@needs_real
@real
def test_cut_real_configs(path):
    config = json.loads(path.read_text())
    keep = [i for i in range(config["num_hidden_layers"]) if i % 4]
    cut = cut_config(config, keep)
    family = config["model_type"]
    assert_agrees(from_hf(cut, "x"), config_class(family).from_dict(dict(cut)), family)
    assert from_hf(cut, "x") == read_config(path).take_layers(keep)
    changed = {key for key in cut if cut[key] != config.get(key)}
    assert changed <= {"num_hidden_layers", "max_window_layers", "layer_types"}


@pytest.mark.parametrize("keep", [[], [32], [-1]])
def test_cut_refuses_layers_that_are_not_there(keep):
    with pytest.raises(UserError, match="31"):
        cut_config({"model_type": "llama"}, keep)
