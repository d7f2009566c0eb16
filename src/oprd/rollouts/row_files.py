"""Rows of parquet, jsonl and json files, as plain Python values."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset, Value
from datasets.table import InMemoryTable

from oprd.foundation.errors import UserError, reason, whatever_fails_is
from oprd.text.answers import ANSWER_COLUMNS, JSONFloat, shown

Row = dict[str, Any]

COLUMNS = ("prompt", *ANSWER_COLUMNS)
LIKELY_PROMPTS = ("problem", "question", "query", "instruction", "input", "messages", "conversations", "text")
MOST_SHOWN = 20  # names of columns
SPLIT_WORDS = {"train", "test", "eval", "validation", "val", "dev"}


def folder_files(folder: Path, split: str) -> list[Path]:
    """The data files of `folder` that belong to `split`, sorted by name; raises `UserError` without one."""
    try:
        listed = (path for path in folder.iterdir() if not path.name.startswith("."))
        files = sorted(path for path in listed if path.suffix.lower() in READERS)
    except OSError as error:
        raise UserError(
            f"{folder}: the folder cannot be read ({error.strerror}): check its rights."
        ) from error
    if not files:
        raise UserError(f"{folder}: the folder has no {', '.join(READERS)} file: name one that has.")
    kinds = sorted({path.suffix.lower() for path in files})
    if len(kinds) > 1:
        raise UserError(f"{folder}: the folder mixes {' and '.join(kinds)} files: name one of the files.")
    splits = [SPLIT_WORDS & set(re.split(r"[^a-z]+", path.stem.lower())) for path in files]
    if not any(splits):
        return files
    chosen = [path for path, named in zip(files, splits, strict=True) if split in named]
    if not chosen:
        found = ", ".join(path.name for path in files)
        raise UserError(f"{folder}: no file of split {split!r} (found {found}): name the file or its split.")
    return chosen


def read_file(path: Path) -> list[Row]:
    """The rows of a file, of its prompt and answer columns; raises `UserError`, naming file and line."""
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}: not a {', '.join(READERS)} file: convert it to one of them.")
    return READERS[path.suffix.lower()](path)


def dataset_rows(dataset: Dataset, where: str) -> list[Row]:
    """The rows of a dataset, of its prompt and answer columns.

    A float16 or float32 stands for the shortest decimal that rounds to it: 0.1, not 0.10000000149.
    """
    dataset = dataset.with_format(None).select_columns(_columns_to_read(dataset.column_names, where))
    columns, features = dict(dataset[:]), dataset.features
    for name in set(ANSWER_COLUMNS) & set(columns):
        columns[name] = [_shortest(value, features[name]) for value in columns[name]]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def plain_rows(rows: list[Any], where: str) -> list[Row]:
    """`rows` checked: objects, and at least one of them with a prompt."""
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{where}, row {i}: {shown(row)} is not an object: write one with a prompt.")
    if rows:
        _columns_to_read(dict.fromkeys(key for row in rows for key in row), where)
    return rows


def _shortest(value: Any, feature: Any) -> Any:
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: _shortest(item, feature[key]) for key, item in value.items()}
    if isinstance(feature, Value) and feature.dtype in ("float16", "float32") and value is not None:
        return float(str(np.dtype(feature.dtype).type(value)))
    return value


def _read_parquet(path: Path) -> list[Row]:
    with whatever_fails_is(
        lambda error: f"{path}: cannot be read as parquet ({reason(error)}): write the file again."
    ):
        with pq.ParquetFile(path) as file:
            columns = _columns_to_read(file.schema_arrow.names, str(path))
            table = file.read(columns=columns).replace_schema_metadata()
        return dataset_rows(Dataset(InMemoryTable(table)), str(path))


def _read_json(path: Path) -> list[Row]:
    """A list of objects, an object holding that list as `data`, or one object a line."""
    text = _file_text(path)
    try:
        document = _parsed(text if text.strip() else "[]", path)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _read_jsonl(path)
        raise _json_error(path, error.lineno, error.msg) from error
    if isinstance(document, dict):
        document = document["data"] if isinstance(document.get("data"), list) else [document]
    return plain_rows(document if isinstance(document, list) else [document], str(path))


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_file_text(path).split("\n"), start=1):  # splitlines() breaks at U+2028
        if line.strip():
            try:
                rows.append(_parsed(line, path, number))
            except json.JSONDecodeError as error:
                raise _json_error(path, number, error.msg) from error
    return plain_rows(rows, str(path))


def _parsed(text: str, path: Path, line: int = 1) -> Any:
    """What `text` holds, with numbers as they are written there."""
    try:
        return json.loads(text, parse_float=JSONFloat)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise _json_error(path, line, "nested too deeply") from error
    except ValueError as error:  # a whole number longer than Python reads
        raise _json_error(path, line, str(error).partition(";")[0]) from error


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
}


def _file_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}): write the file again.") from error


def _json_error(path: Path, line: int, reason: str) -> UserError:
    return UserError(f"{path}, line {line}: malformed JSON ({reason}): fix or remove it.")


def _columns_to_read(found: Iterable[str], where: str) -> list[str]:
    """Those of `COLUMNS` that were found; `prompt` has to be one of them."""
    found = list(found)
    if "prompt" not in found:
        likely = next(
            (f"rename {column!r} to 'prompt'" for column in LIKELY_PROMPTS if column in found), None
        )
        names = ", ".join(name if name.isprintable() else repr(name) for name in found[:MOST_SHOWN])
        others = ", …" if len(found) > MOST_SHOWN else ""
        raise UserError(
            f"{where}: no column 'prompt' (found {names}{others}): {likely or 'rename or add it'}."
        )
    return [column for column in COLUMNS if column in found]
