"""Which checkpoint a model's name means: a folder here, or one of the Hugging Face hub; no jax."""

import logging
import pathlib
import re

from e3jax import files
from e3jax.errors import UserError

log = logging.getLogger(__name__)

# What a checkpoint of these families is made of; no pickles, no code, no other frameworks.
HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "*.md"]
HUB_FILES += ["LICENSE*", "NOTICE*"]
# Mistral's repositories hold the weights a second time under this name; folders hold other formats.
HUB_IGNORED = ["consolidated*", "*/*"]
ID = r"[\w.-]+(/[\w.-]+)?"  # what may be a hub id


def resolve(path: str, revision: str | None = None) -> pathlib.Path:
    """The folder of a checkpoint: an existing one, `demo` (the bundled model), or a hub id.

    A hub id is downloaded to the Hugging Face cache. Raises UserError when it is none of them.
    """
    if (folder := _local(path)) is not None:
        return folder
    import huggingface_hub  # slow to import, and most runs are offline

    try:
        found = huggingface_hub.snapshot_download(
            path, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED
        )
    except Exception as error:
        raise _not_fetched(path, error) from None
    return pathlib.Path(found)


def resolve_config(path: str, revision: str | None = None) -> pathlib.Path:
    """The config.json of a checkpoint, without its weights: a folder's, or the hub's alone.

    Where the hub cannot be reached, the bundled facts of the models in configs/, with a line that
    says so. Raises UserError when it is none of them.
    """
    if (folder := _local(path)) is not None:
        return folder / "config.json"
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(path, "config.json", revision=revision))
    except Exception as error:
        facts = files.bundled(f"configs/models/{path.replace('/', '--')}.json")
        if not facts.is_file():
            raise _not_fetched(path, error) from None
        log.warning("%s: the hub could not be reached; using the bundled %s", path, facts.name)
        return facts


def shown(path: str) -> str:
    """A model's path for a card: a folder's never looks like a hub id."""
    here = _local(path) is not None and path != "demo"
    return f"./{path}" if here and re.fullmatch(ID, path) else path


def _local(path: str) -> pathlib.Path | None:
    """The folder of a checkpoint that is here, or None for what may be a hub id."""
    folder = files.bundled("demo/model" if path == "demo" else path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no config.json; expected a Hugging Face checkpoint folder")
        return folder
    if folder.exists() or not re.fullmatch(ID, path) or path == "demo":
        raise UserError(f"{path}: not a folder; expected a checkpoint folder, `demo` or a hub id")
    return None


def _not_fetched(path: str, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [""])[0]
    return UserError(
        f"{path}: there is no such folder, and as a Hugging Face hub id it could not be "
        f"fetched ({type(error).__name__}: {reason}). "
        "Give an existing folder, or check the id, the revision, access and the network"
    )
