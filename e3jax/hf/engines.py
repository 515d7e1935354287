"""What serves an exported folder beside transformers: which engine has which architecture.

Read from the sources of the releases named. An engine that has an architecture may still not serve
what is left of it: some count out by the layers' numbers which ones have a window or a rope,
instead of reading it from config.json, and would serve another model, silently. Those are left out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from e3jax.hf.cut import NUMBERS, PER_LAYER, QUANTIZATION

EVERYWHERE = (
    "DeepseekV3 Glm4 Glm4Moe Granite Llama Mistral Mixtral Olmo2 Olmoe Phi3 Qwen2 Qwen2Moe Qwen3"
    " Qwen3Moe StableLm"
).split()


@dataclasses.dataclass(frozen=True)
class Engine:
    """A program, the release that was read, and what to type; `{0}` is the folder."""

    name: str
    release: str
    command: str
    architectures: frozenset[str]  # whose cuts it serves, without ForCausalLM
    irregular: frozenset[str]  # of them those of which it reads how each layer differs
    quantized: bool  # whether it takes quantised weights as they are

    def serves(self, config: Mapping[str, Any]) -> bool:
        """Whether it has the model of a config.json, as that says it."""
        (name, *others) = config.get("architectures") or [""]
        name = name.removesuffix("ForCausalLM")
        known = self.irregular if is_irregular(config) else self.architectures
        quantized = any(config.get(key) for key in QUANTIZATION)
        return name in known and not others and (self.quantized or not quantized)


ENGINES = (
    Engine(
        name="vLLM",
        release="0.33.0",
        command="vllm serve {0}",
        # By number: the windows of gpt-oss. Qwen with windows in some layers is refused.
        architectures=frozenset(
            [
                *EVERYWHERE,
                *"Cohere2 DeepseekV2 Exaone4 Gemma2 Gemma3 Nemotron SeedOss SmolLM3".split(),
            ]
        ),
        irregular=frozenset("Cohere2 Exaone4 Gemma2 Gemma3 SmolLM3".split()),
        quantized=True,
    ),
    Engine(
        name="SGLang",
        release="0.5.23",
        command="python -m sglang.launch_server --model-path {0}",
        # By number: the windows of Gemma 2 and EXAONE 4.
        architectures=frozenset([*EVERYWHERE, *"Cohere2 DeepseekV2 Gemma3 GptOss".split()]),
        irregular=frozenset("Cohere2 Gemma3 GptOss".split()),
        quantized=True,
    ),
    Engine(
        name="llama.cpp",
        release="commit 00bdaa10",
        command="python convert_hf_to_gguf.py {0} --outfile {0}.gguf",
        # By number: windows and ropes of Cohere2, EXAONE 4, Gemma, gpt-oss and SmolLM3. And by
        # their count, that a DeepSeek-V2 is the Lite one.
        architectures=frozenset([*EVERYWHERE, "Nemotron", "SeedOss"]),
        irregular=frozenset(),
        quantized=False,
    ),
)


def is_irregular(config: Mapping[str, Any]) -> bool:
    """Whether a config.json tells layers apart, one by one. (Dense ones before all that have
    experts are a count, which every engine reads.)"""
    lists = (config[key] for key in PER_LAYER if isinstance(config.get(key), list | str))
    return any(len(set(map(str, value))) > 1 for value in lists) or any(
        config.get(key) for key in NUMBERS
    )
