"""Recipes: one YAML mapping of keys to values, overridden by `--key value` flags of the same names."""

import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from oprd.foundation.errors import UserError
from oprd.foundation.yaml_texts import Loader, mapping_of_texts

SUFFIXES = (".yaml", ".yml")
MOST_SUGGESTED = 3
# Keys of other YAML files that are at hand where recipes are.
SIGNS = {
    "git_commit": "what a run was started with; name the recipe that it came from",
    "compute_environment": "a configuration of accelerate: accelerate launch --config_file takes it",
}
JOINED = ("layers",)  # a list of it is one text with commas
SWITCHES = {"on": "true", "off": "false"}


class RecipeParser(HfArgumentParser):
    """HF's argument parser whose every refusal is a `UserError` and that takes whole key names only."""

    def __init__(self, dataclass_types: Sequence[Any]) -> None:
        super().__init__(dataclass_types, allow_abbrev=False, add_help=False)
        self.register("type", string_to_bool, lambda text: string_to_bool(SWITCHES.get(text.lower(), text)))
        self.by_key = {action.dest: action for action in self._actions if action.nargs != 0}
        if "report_to" in self.by_key:  # several trackers, of which HF's parser takes one
            self.by_key["report_to"].nargs = "+"

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class UnknownKey(UserError):
    """A key or flag that the recipe's command does not have; `where` begins the sentence."""

    def __init__(self, where: str, kind: str, word: str, key: str, known: set[str]) -> None:
        super().__init__(f"{where}unknown {kind} {word!r}{_suggest(key, known)}")
        self.where, self.key = where, key


@contextmanager
def _depth_told() -> Iterator[None]:
    """Inside it, YAML that is nested too deeply for Python is a `UserError`."""
    try:
        yield
    except RecursionError as error:
        raise UserError("a recipe, or a value after a flag, is nested too deeply to be read") from error


@_depth_told()
def parse_recipe(
    path: str | Path | None, flags: Sequence[str], dataclass_types: Sequence[type]
) -> tuple[Any, ...]:
    """Instances of `dataclass_types` from the YAML file at `path`, if there is one, and then `flags`.

    A value of the file is parsed as the same text would be after a flag, so the type of its key says what
    `no`, `1e-5` or `010` mean. A flag's mapping is JSON or as in YAML, and `--key null` unsets a key that may
    be None. Raises `UserError` for a missing or malformed file, an unknown key or flag, and a value of the
    wrong type.
    """
    known = {field.name for kind in dataclass_types for field in fields(kind) if field.init}
    parser = RecipeParser(dataclass_types)
    optional = _optional_keys(dataclass_types)
    flags, unset = _without_nulls(flags, optional)
    parser.set_defaults(**dict.fromkeys(unset))
    arguments = []
    for key, value in ({} if path is None else read_recipe(path)).items():
        if key not in known:
            raise UnknownKey(f"{path}: ", "key", key, key, known)
        if key in unset:
            continue
        if value is None and key in optional:
            parser.set_defaults(**{key: None})
        else:
            arguments += _as_flag(path, key, value, takes_list=parser.by_key[key].nargs == "+")
    arguments += map(_with_json, flags)
    _, rest = parser.parse_known_args(arguments)
    if rest and not rest[0].startswith("-"):
        raise UserError(f"unknown flag {rest[0]!r}: the recipe comes first, then its keys as --key value")
    if rest:
        raise UnknownKey("", "flag", rest[0], rest[0].lstrip("-").partition("=")[0], known)
    return parser.parse_args_into_dataclasses(arguments)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises `UserError` if there is none.

    A value is its text as it is written, a list of such texts, or None for `null`. Within a mapping, where no
    key has a type, YAML's own types hold, as `yaml_texts` reads them.
    """
    path = Path(path)
    try:
        recipe = mapping_of_texts(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no recipe file {path}{_instead_of(path)}") from None
    except IsADirectoryError:
        raise UserError(f"cannot read the recipe {path}: it is a folder{_within(path)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise UserError(
            f"{path}{line}: malformed YAML: {getattr(error, 'problem', error)}{_no_recipe(path)}"
        ) from error
    except RecursionError:
        raise UserError(f"{path}: malformed YAML: it is nested too deeply") from None
    if recipe is None:
        raise UserError(
            f"{path}: a recipe is a mapping of keys to values, such as 'layers: all'{_no_recipe(path)}"
        )
    for sign, is_what in SIGNS.items():
        if sign in recipe:
            raise UserError(f"{path} is no recipe, but {is_what}")
    return recipe


def _instead_of(path: Path) -> str:
    """What to write where `path` is not there: a file beside it, or a model's name where that belongs."""
    if path.suffix not in SUFFIXES:
        return f": a recipe is a YAML file, and a student is named by --model_name_or_path {path}"
    beside = [file.name for file in path.parent.glob("*") if file.suffix in SUFFIXES]
    close = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else f" in {path.absolute().parent}"


def _within(folder: Path) -> str:
    """What to name instead of a folder."""
    if (folder / "config.json").exists():
        return f" that holds a model: name that by --model_name_or_path {folder}"
    recipes = sorted(file.name for file in folder.glob("*") if file.suffix in SUFFIXES)
    return f": name one of its files {', '.join(recipes)}" if recipes else " without a YAML file"


def _no_recipe(path: Path) -> str:
    return "" if path.suffix in SUFFIXES else "; a recipe is a YAML file"


def _optional_keys(dataclass_types: Sequence[type]) -> set[str]:
    """The keys that may be None."""
    hints = [get_type_hints(kind) for kind in dataclass_types]
    return {name for kind in hints for name, hint in kind.items() if type(None) in get_args(hint)}


def _without_nulls(flags: Sequence[str], optional: set[str]) -> tuple[list[str], set[str]]:
    """The flags without those that give `null` to an optional key, and the keys of these."""
    kept: list[str] = []
    unset: set[str] = set()
    names = {f"--{key}": key for key in optional}
    for flag in flags:
        name, _, value = flag.partition("=")
        if value == "null" and name in names:
            unset.add(names[name])
        elif flag == "null" and kept and kept[-1] in names:
            unset.add(names[kept.pop()])
        else:
            kept.append(flag)
    return kept, unset


def _as_flag(path: str | Path | None, key: str, value: Any, takes_list: bool) -> list[str]:
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
        with suppress(yaml.YAMLError):
            mapping = yaml.load(value, Loader)
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
    """The key that was meant: the closest one, else those of such initials, else those with all its words."""
    words = key.lower().replace("-", "_").split("_")
    close = difflib.get_close_matches(key, known, n=1)
    close = close or [name for name in known if "".join(word[:1] for word in name.split("_")) == key]
    close = close or [name for name in known if all(word in name.split("_") for word in words)]
    close = sorted(close, key=lambda name: (not name.startswith(key), len(name), name))
    shown = close[:MOST_SUGGESTED]
    return f"; did you mean {' or '.join(shown)}?" if shown else "; see --help, or docs/recipes.md"
