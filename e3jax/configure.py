"""A YAML file and `key=value` overrides -> config.Run: an unknown key or bad value is an error."""

import dataclasses
import difflib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic
import yaml

from e3jax import files
from e3jax.config import Run
from e3jax.errors import UserError


def load_run(
    path: str | pathlib.Path | None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> Run:
    """Reads a YAML file or none, applies `key.path=value` overrides (also YAML), validates.

    values: the same as Python values, by key; a section may be a mapping, of which each key counts.
    A file that is not here, or a bare name such as `demo`, means one of the bundled configurations.
    Raises UserError naming the file, key and value; an unknown key with the nearest known one.
    """
    given = "the command line" if values is None else "the arguments"
    where = given if path is None else str(_find(str(path)))
    try:
        tree = yaml.safe_load(pathlib.Path(where).read_text("utf-8") if path else "") or {}
    except OSError as error:
        raise UserError(f"{where}: cannot read the configuration: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{where}: expected keys and values, found {type(tree).__name__}")
    for text in overrides:
        _override(tree, text)
    for key, value in _leaves(values or {}):
        _put(tree, key, value, f"{key}={value}")
    return validate(tree, where)


def _find(path: str) -> pathlib.Path:
    name = pathlib.Path(path)
    if not name.is_file() and name.suffix not in (".yaml", ".yml") and len(name.parts) == 1:
        path = f"configs/{path}.yaml"
    return files.bundled(path)


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"override {text!r}: expected key=value, such as search.keep=24")
    try:
        _put(tree, key, yaml.safe_load(value), text)
    except yaml.YAMLError as error:
        raise UserError(f"override {text!r}: the value is not valid YAML") from error


def _leaves(values: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{section}{key}.")
        else:
            yield section + key, str(value) if isinstance(value, os.PathLike) else value


def _put(tree: dict[str, Any], key: str, value: Any, text: str) -> None:
    *parents, last = key.split(".")
    place: Any = tree
    for name in parents:
        if isinstance(place, dict):
            place.setdefault(name, {})
        place = _child(place, name, text)
    if isinstance(place, list):
        _child(place, last, text)
    elif not isinstance(place, dict):
        raise UserError(f"override {text!r}: {'.'.join(parents)} is a value, not a section")
    index: Any = int(last) if isinstance(place, list) else last
    place[index] = value


def _child(place: Any, name: str, text: str) -> Any:
    """One step down a dotted key; lists are entered by number, as in data.train.0.path."""
    if isinstance(place, dict):
        return place[name]
    if isinstance(place, list) and name.isdigit() and int(name) < len(place):
        return place[int(name)]
    raise UserError(f"override {text!r}: there is nothing at {name}")


def validate(tree: dict[str, Any], where: str) -> Run:
    """A nested dict -> Run. Raises UserError listing every wrong key and value."""
    try:
        return pydantic.TypeAdapter(Run).validate_python(tree)
    except pydantic.ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        head = f"{where}: {len(lines)} mistake(s) in the configuration"
        raise UserError("\n".join([head, *lines])) from error


def _explain(error: Any) -> str:
    place = [p for p in error["loc"] if p not in ("int", "float", "str", "none")]
    key = ".".join(str(p) for p in place)
    if error["type"] == "unexpected_keyword_argument":
        general = ".".join(str(p) for p in place if not isinstance(p, int))
        known = {".".join(key.split(".")[: general.count(".") + 1]) for key in known_keys()}
        known |= known_keys().keys()
        near = [k for k in known_keys() if k.endswith(f".{general}")]  # its section was left out
        near = near or difflib.get_close_matches(general, known, 1, 0.5)
        return f"  {key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] in ("missing", "missing_argument"):
        return f"  {key}: required and missing"
    found = "" if isinstance(error["input"], dict) else f" (found {error['input']!r})"
    return f"  {key}: {error['msg'].removeprefix('Value error, ')}{found}"


def known_keys(cls: Any = Run, prefix: str = "") -> dict[str, str]:
    """Every dotted key of the configuration with its help text."""
    keys = {}
    for field in dataclasses.fields(cls):
        name = prefix + field.name
        section = _section(field.type)
        if section is not None:
            keys |= known_keys(section, name + ".")
        else:
            keys[name] = field.default.description or ""
    return keys


def _section(annotation: Any) -> Any:
    """The dataclass inside X or tuple[X, ...], or None."""
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next((c for c in candidates if dataclasses.is_dataclass(c)), None)


def as_dict(run: Run) -> dict[str, Any]:
    """Plain JSON-able form of a configuration."""
    return pydantic.TypeAdapter(Run).dump_python(run, mode="json")
