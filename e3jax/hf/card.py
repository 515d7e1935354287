"""The model card of an export: README.md with the front matter that the Hugging Face hub reads."""

import contextlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from e3jax.hf.engines import ENGINES

LICENSE_KEYS = ("license", "license_name", "license_link")


def read_license(folder: str | pathlib.Path) -> dict[str, str]:
    """The licence keys of a checkpoint: of its README's front matter, else of its LICENSE file.

    Empty when the checkpoint names none.
    """
    folder = pathlib.Path(folder)
    readme = folder / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace")
        front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        try:
            keys = yaml.safe_load(front[1]) if front else None
        except yaml.YAMLError:
            keys = None
        if isinstance(keys, dict) and keys.get("license"):
            return {key: str(keys[key]) for key in LICENSE_KEYS if keys.get(key)}
    files = sorted(path.name for path in folder.glob("LICENSE*"))
    return {"license": "other", "license_link": files[0]} if files else {}


def has_chat_template(folder: str | pathlib.Path) -> bool:
    """Whether a checkpoint's tokenizer can render messages."""
    folder = pathlib.Path(folder)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        with contextlib.suppress(ValueError):  # what is wrong with it is told where it is used
            if "chat_template" in json.loads(settings.read_text(encoding="utf-8")):
                return True
    return any(folder.glob("chat_template*"))


def model_card(
    *,
    name: str,
    folder: str,
    base_model: str,
    license_keys: Mapping[str, str],
    config: Mapping[str, Any],
    chat: bool,
    keep: Sequence[int],
    num_layers: int,
    chosen_by: str,
    rows: Sequence[Mapping[str, Any]] = (),
    recovered: bool = True,
) -> str:
    """README.md, in Markdown, of a pruned model.

    name: the title; folder: what the exported one is called; base_model: hub id, or what else to
    call the source; license_keys: from `read_license`; config: the export's config.json; chat:
    whether it has a chat template; keep: kept layers, counted from 0, of the source's `num_layers`;
    rows: figures, one mapping of column -> value a row, all with the same columns; recovered:
    whether the pruned model was distilled; chosen_by: what chose the layers.
    """
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {"tags": ["e3jax", "e3-pruner", "layer-pruning"], **license_keys}
    base = base_model
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base_model):  # a hub id
        front |= {"base_model": base_model, "base_model_relation": "finetune"}
        base = f"[{base_model}](https://huggingface.co/{base_model})"
    kept = set(keep)
    removed = [i for i in range(num_layers) if i not in kept]
    training = (
        "recovered by entropy-aware distillation from it"
        if recovered
        else "not trained since: expect it to be worse than the base model"
    )
    terms = "the base model names none: ask its authors"
    if license_keys:
        terms = f"{license_keys['license']}, carried over from the base model"
    return CARD.format(
        front=yaml.safe_dump(front, sort_keys=True, allow_unicode=True).strip(),
        name=name,
        folder=folder,
        base=base,
        count=len(keep),
        num_layers=num_layers,
        training=training,
        chosen_by=chosen_by,
        kept=", ".join(map(str, keep)),
        removed=", ".join(map(str, removed)) or "none",
        terms=terms,
        figures=_table(rows),
        endpoint="chat/completions" if chat else "completions",
        question='"messages": [{"role": "user", "content": "…"}]' if chat else '"prompt": "…"',
        engines=_engines(config, folder),
    )


def _engines(config: Mapping[str, Any], folder: str) -> str:
    """How each engine that has the model serves it, and which do not."""
    having = [engine for engine in ENGINES if engine.serves(config)]
    lines = [f"# {e.name} ({e.release})\n{e.command.format(folder)}" for e in having]
    text = "\n```sh\n" + "\n".join(lines) + "\n```\n" if lines else ""
    if missing := [f"{e.name} ({e.release})" for e in ENGINES if e not in having]:
        text += (
            f"\nNot known to serve it as it is: {', '.join(missing)}. Either the architecture is"
            " missing there, or what tells its layers apart is not read from config.json.\n"
        )
    return text


def trained_card(
    name: str, base_model: str | None = None, license_keys: Mapping[str, str] | None = None
) -> str:
    """README.md of a model made by plain training: from `base_model`, or from scratch."""
    front = {"library_name": "transformers", **(license_keys or {})}
    start = f"from {base_model}" if base_model else "from random initialisation"
    return f"---\n{yaml.safe_dump(front)}---\n\n# {name}\n\nTrained {start} with e3jax.\n"


CARD = """---
{front}
---

# {name}

{base} with {count} of its {num_layers} decoder layers, chosen by {chosen_by} and
{training}.

- kept layers (of the base model, counted from 0): {kept}
- removed layers: {removed}
- licence: {terms}

{figures}## How to use it

An ordinary checkpoint of its family: no custom code, no flag. From the folder above this one:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

```sh
pip install "transformers[serving]"
transformers serve {folder}
curl localhost:8000/v1/{endpoint} -H "Content-Type: application/json" \\
  -d '{{"model": "{folder}", {question}, "max_tokens": 256, "temperature": 0}}'
```
{engines}
## How it was made

With e3jax, an implementation in JAX of E3-Pruner:

```bibtex
@misc{{yuan2025e3pruner,
  title         = {{E$^3$-Pruner: Towards Efficient, Economical, and Effective Layer Pruning for
                   Large Language Models}},
  year          = {{2025}},
  eprint        = {{2511.17205}},
  archivePrefix = {{arXiv}}
}}
```
"""


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures as a section with a Markdown table; nothing where there are none."""
    if not rows:
        return ""
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    lines = ["| " + " | ".join(map(_cell, line)) + " |" for line in cells]
    return "## Figures\n\n" + "\n".join(lines) + "\n\n"


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
