"""Recipes: one YAML mapping of keys to values, overridden by `--key value` flags of the same names."""

import difflib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from oprd.errors import UserError

JOINED = ("layers",)  # a list of it is one text with commas
SWITCHES = {"on": "true", "off": "false"}


class RecipeParser(HfArgumentParser):
    """HF's argument parser whose every refusal is a `UserError` and that takes whole key names only."""

    def __init__(self, dataclass_types: Sequence[type]) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, add_help=False)
        self.register("type", string_to_bool, lambda text: string_to_bool(SWITCHES.get(text.lower(), text)))
        self.by_key = {action.dest: action for action in self._actions if action.nargs != 0}
        if "report_to" in self.by_key:  # several trackers, of which HF's parser takes one
            self.by_key["report_to"].nargs = "+"

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_recipe(path: str | Path, flags: Sequence[str], dataclass_types: Sequence[type]) -> tuple[Any, ...]:
    """Instances of `dataclass_types` from the YAML file at `path` and then `flags`.

    A value of the file is parsed as the same text would be after a flag, so the type of its key says what
    `no`, `1e-5` or `010` mean. A flag's mapping is JSON or as in YAML. Raises `UserError` for a missing or
    malformed file, an unknown key or flag, and a value of the wrong type.
    """
    known = {field.name for kind in dataclass_types for field in fields(kind) if field.init}
    parser = RecipeParser(dataclass_types)
    optional = _optional_keys(dataclass_types)
    arguments = []
    for key, value in read_recipe(path).items():
        if key not in known:
            raise UserError(f"{path}: unknown key {key!r}{_suggest(key, known)}")
        if value is None and key in optional:
            parser.set_defaults(**{key: None})
        else:
            arguments += _as_flag(path, key, value, takes_list=parser.by_key[key].nargs == "+")
    arguments += map(_with_json, flags)
    *parsed, rest = parser.parse_args_into_dataclasses(
        arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        name = rest[0].lstrip("-").partition("=")[0]
        raise UserError(f"unknown flag {rest[0]!r}{_suggest(name, known)}")
    return tuple(parsed)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises `UserError` if there is none.

    A value is its text as it is written, a list of such texts, or None for `null`. Within a mapping, where no
    key has a type, YAML's own types hold, as `_Loader` reads them.
    """
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        try:
            recipe = loader.mapping_of_texts()
        finally:
            loader.dispose()
    except FileNotFoundError:
        raise UserError(f"there is no recipe file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise UserError(f"{path}{line}: malformed YAML: {getattr(error, 'problem', error)}") from error
    except RecursionError:
        raise UserError(f"{path}: malformed YAML: it is nested too deeply") from None
    if recipe is None:
        raise UserError(f"{path}: a recipe is a mapping of keys to values, such as 'layers: all'")
    return recipe


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that stands twice.

    Of YAML 1.1's implicit types it leaves out dates, base 60 and octal numbers, and reads 1e-5 as a number.
    """

    def mapping_of_texts(self) -> dict[str, Any] | None:
        """The document's values as texts; None if it is no mapping of names."""
        node = self.get_single_node()
        if node is None:
            return None
        if not isinstance(node, yaml.MappingNode) or node.tag != f"{_TAG}map":
            self.construct_document(node)  # what is malformed is told first
            return None
        self._refuse_twice(node)
        self.flatten_mapping(node)
        keys = [self.construct_object(key) for key, _ in node.value]
        if not all(isinstance(key, str) for key in keys):
            return None
        return {key: self._text(value) for key, (_, value) in zip(keys, node.value, strict=True)}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self._refuse_twice(node)
        return super().construct_mapping(node, deep)

    def _text(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [self._text(item) for item in node.value]
        value = self.construct_object(node, deep=True)
        return node.value if isinstance(node, yaml.ScalarNode) and value is not None else value

    def _refuse_twice(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"the key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))


_TAG = "tag:yaml.org,2002:"
_NUMBERS = (
    (f"{_TAG}int", re.compile(r"[-+]?\d+$"), list("-+0123456789")),
    (
        f"{_TAG}float",
        re.compile(r"(?:[-+]?(?:\.\d+|\d+\.\d*|\d+(?=[eE]))(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.nan)$"),
        list("-+.0123456789"),
    ),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.removeprefix(_TAG) in ("bool", "null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _number in _NUMBERS:
    _Loader.add_implicit_resolver(*_number)
_Loader.add_constructor(f"{_TAG}int", lambda _, node: int(str(node.value)))


def _optional_keys(dataclass_types: Sequence[type]) -> set[str]:
    """The keys that may be None."""
    hints = [get_type_hints(kind) for kind in dataclass_types]
    return {name for kind in hints for name, hint in kind.items() if type(None) in get_args(hint)}


def _as_flag(path: str | Path, key: str, value: Any, takes_list: bool) -> list[str]:
    if value is None or value == []:
        raise UserError(f"{path}: {key} has no value; give it one or leave the key out")
    if isinstance(value, dict):
        return [f"--{key}={json.dumps(value, default=str)}"]
    if isinstance(value, list):
        if key in JOINED:
            return [f"--{key}={','.join(map(str, value))}"]
        if not takes_list:
            raise UserError(f"{path}: {key} takes one value, and this is a list: {value}")
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value}"]


def _with_json(flag: str) -> str:
    """A word of the command line; if it is a mapping as YAML writes it, or ends in one, as JSON."""
    start = flag.find("=") + 1 if flag.startswith("--") else 0
    value = flag[start:]
    if value.startswith("{"):
        with suppress(yaml.YAMLError, RecursionError):
            mapping = yaml.load(value, _Loader)
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
