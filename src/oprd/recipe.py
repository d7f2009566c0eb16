"""Recipes: one YAML mapping of keys to values, overridden by `--key value` flags of the same names."""

import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from oprd.errors import UserError


class RecipeParser(HfArgumentParser):
    """HF's argument parser whose every refusal is a `UserError` and that takes whole key names only."""

    def __init__(self, dataclass_types: Sequence[type]) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, add_help=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


@contextmanager
def _depth_told() -> Iterator[None]:
    """Within it what is nested deeper than Python reads is the user's to mend."""
    try:
        yield
    except RecursionError as error:
        raise UserError("a recipe, or a value after a flag, is nested too deeply to be read") from error


@_depth_told()
def parse_recipe(path: str | Path, flags: Sequence[str], dataclass_types: Sequence[type]) -> tuple[Any, ...]:
    """Instances of `dataclass_types` from the YAML file at `path` and then `flags`.

    YAML values go through the same parsing as flags; a flag's mapping is JSON or as in YAML. Raises
    `UserError` for a missing or malformed file, an unknown key or flag, and a value of the wrong type.
    """
    known = {field.name for kind in dataclass_types for field in fields(kind) if field.init}
    arguments = []
    for key, value in read_recipe(path).items():
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}{_suggest(key, known)}")
        arguments += _as_flag(str(path), key, value)
    arguments += map(_with_json, flags)
    parser = RecipeParser(dataclass_types)
    *parsed, rest = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if rest:
        name = rest[0].lstrip("-").partition("=")[0]
        raise UserError(f"unknown flag {rest[0]!r}{_suggest(name, known)}")
    return tuple(parsed)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises `UserError` if there is none."""
    try:
        recipe = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeyLoader)
    except FileNotFoundError:
        raise UserError(f"there is no recipe file {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise UserError(f"{path}{line}: malformed YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(recipe, dict) or not all(isinstance(key, str) for key in recipe):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, such as 'layers: all'")
    return recipe


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which keeps the last of two equal keys, made to refuse them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                problem = f"the key {key_node.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _as_flag(path: str, key: str, value: Any) -> list[str]:
    if value is None:
        raise UserError(f"{path}: {key} has no value; give it one or leave the key out")
    if isinstance(value, dict):
        return [f"--{key}={json.dumps(value, default=str)}"]
    if isinstance(value, list):
        return (
            [f"--{key}={','.join(map(str, value))}"] if key in ("layers",) else [f"--{key}", *map(str, value)]
        )
    return [f"--{key}={value}"]


def _with_json(flag: str) -> str:
    """A word of the command line; if it is a mapping as YAML writes it, or ends in one, as JSON."""
    start = flag.find("=") + 1 if flag.startswith("--") else 0
    value = flag[start:]
    if value.startswith("{"):
        with suppress(yaml.YAMLError):
            mapping = yaml.safe_load(value)
            if isinstance(mapping, dict) and not _is_json(value):  # whose 1e-5 is a number
                return flag[:start] + json.dumps(mapping, default=str)
    return flag


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _suggest(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else "; see the keys in docs/recipes.md"
