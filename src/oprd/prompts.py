"""Prompts and reference answers: the bundled task, files, folders and Hub datasets in one format.

Everything is read into memory and checked row by row; nothing is cached, so an edited file is
never shadowed by an older copy (the Hub keeps its own download cache).
"""

import json
import re
from collections.abc import Callable, Iterable
from numbers import Number
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset

from oprd.errors import UserError
from oprd.tiny import task

Prompt = str | list[dict[str, str]]
Row = dict[str, Any]

COLUMNS = ("prompt", "solution", "reward_model", "answer")
SPLIT_WORDS = {"train", "test", "eval", "validation", "val", "dev"}


def load_prompts(name: str, split: str = "train", config: str | None = None) -> Dataset:
    """Load prompts, and reference answers where the source has them.

    `name` is `tiny` (splits train and eval, also called test), a .parquet, .jsonl or .json file (its
    split is whatever the file holds), a folder of such files of one kind (where file names carry a
    split word, as in `train.parquet`, only those of `split` are read), or a Hub dataset.
    Rows may be TRL's (`prompt`; `solution` or `answer`) or verl's (`reward_model.ground_truth`).

    Returns the columns `prompt`, text or a list of {role, content}, the same kind in every row, and,
    if the source has one, `solution`, text; rows keep their order. Raises `UserError`, naming the
    file and the row (from 0), where something is missing, malformed or empty.
    """
    sources = _read_sources(name, split, config)
    rows = [(f"{where}, row {i}", row) for where, part in sources for i, row in enumerate(part)]
    if not rows:
        raise UserError(f"{name} has no rows: give a dataset with at least one prompt.")

    prompts = [_prompt(row.get("prompt"), at) for at, row in rows]
    solutions = [_solution(row, at) for at, row in rows]
    has_solutions = any(solution is not None for solution in solutions)
    for (at, _), prompt, solution in zip(rows, prompts, solutions, strict=True):
        if type(prompt) is not type(prompts[0]):
            raise UserError(f"{at}: text and chat prompts are mixed ({rows[0][0]}, differs): use one kind.")
        if has_solutions and solution is None:
            raise UserError(f"{at} has no solution, but other rows have one: add it or drop the row.")
    try:
        return Dataset.from_dict({"prompt": prompts} | ({"solution": solutions} if has_solutions else {}))
    except UnicodeEncodeError as error:  # half an emoji, which JSON can escape and UTF-8 cannot hold
        raise UserError(f"{name}: the text {error.object[:40]!r} is broken Unicode: mend it.") from error


def drop_long_prompts(
    dataset: Dataset, render: Callable[[Prompt], list[int]], max_prompt_length: int | None
) -> tuple[Dataset, int]:
    """Drop the prompts that `render` turns into more than `max_prompt_length` tokens; None keeps all.

    Prompts are never cut. Returns the rows that stay, in order, and how many were dropped.
    Raises `UserError` when none would stay.
    """
    if max_prompt_length is None:
        return dataset, 0
    lengths = [len(render(prompt)) for prompt in dataset["prompt"]]
    kept = [i for i, length in enumerate(lengths) if length <= max_prompt_length]
    if not kept:
        raise UserError(
            f"All {len(lengths)} prompts are longer than max_prompt_length={max_prompt_length} tokens "
            f"(the shortest has {min(lengths)}): raise max_prompt_length."
        )
    return dataset.select(kept), len(lengths) - len(kept)


def _read_sources(name: str, split: str, config: str | None) -> list[tuple[str, list[Row]]]:
    """The rows of each file, or of the one dataset, behind `name`, with its name for messages."""
    path = Path(name).expanduser()
    is_local = name == "tiny" or path.exists()
    if is_local and (config is not None or "[" in split):
        asked = f"config {config!r}" if config is not None else f"the slice {split!r}"
        raise UserError(f"{name}: only Hub datasets have configurations and slices: leave out {asked}.")
    if name == "tiny":
        return [(name, _tiny_rows(split))]
    if path.exists():
        files = _folder_files(path, split) if path.is_dir() else [path]
        return [(str(file), _read_file(file)) for file in files]
    return [(name, _hub_rows(name, split, config))]


def _tiny_rows(split: str) -> list[Row]:
    if split not in ("train", "eval", "test"):
        raise UserError(f"tiny has the splits train and eval (also called test), not {split!r}: name one.")
    return [dict(row) for row in task.rows("train" if split == "train" else "eval")]


def _hub_rows(name: str, split: str, config: str | None) -> list[Row]:
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).suffix.lower() in READERS:
        raise UserError(f"{name}: no such file or folder: check the path, relative to {Path.cwd()}.")
    try:
        dataset = load_dataset(name, config, split=split)
    except Exception as error:  # network, authorisation, split and builder errors share no base class
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{name}: no such file or folder, and loading it from the Hugging Face Hub "
            f"(config {config!r}, split {split!r}) failed: {reason}"
        ) from error
    columns = _columns_to_read(dataset.column_names, name)
    return dataset.select_columns(columns).with_format("arrow")[:].to_pylist()


def _folder_files(folder: Path, split: str) -> list[Path]:
    """The data files of `folder` that belong to `split`, sorted by name."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in READERS)
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


def _read_file(path: Path) -> list[Row]:
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}: not a {', '.join(READERS)} file: convert it to one of them.")
    return READERS[path.suffix.lower()](path)


def _read_parquet(path: Path) -> list[Row]:
    try:
        with pq.ParquetFile(path) as file:
            columns = _columns_to_read(file.schema_arrow.names, str(path))
            return file.read(columns=columns).to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: cannot be read as parquet ({reason}): write the file again.") from error


def _read_json(path: Path) -> list[Row]:
    """A list of objects, an object holding that list as `data`, or one object a line."""
    text = _file_text(path)
    try:
        document = json.loads(text if text.strip() else "[]")
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _read_jsonl(path)
        raise _json_error(path, error.lineno, error.msg) from error
    if isinstance(document, dict):
        document = document["data"] if isinstance(document.get("data"), list) else [document]
    return _json_rows(document if isinstance(document, list) else [document], path)


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_file_text(path).split("\n"), start=1):  # splitlines() breaks at U+2028
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise _json_error(path, number, error.msg) from error
    return _json_rows(rows, path)


def _json_rows(rows: list[Any], path: Path) -> list[Row]:
    """`rows` checked: objects, and at least one of them with a prompt."""
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {i}: {_shown(row)} is not an object: write one with a prompt.")
    if rows:
        _columns_to_read(dict.fromkeys(key for row in rows for key in row), str(path))
    return rows


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
    return UserError(f"{path}, line {line}: malformed JSON ({reason}): mend or remove it.")


def _columns_to_read(found: Iterable[str], where: str) -> list[str]:
    """Those of `COLUMNS` that were found; `prompt` has to be one of them."""
    found = list(found)
    if "prompt" not in found:
        raise UserError(f"{where}: no column 'prompt' (found {', '.join(found)}): rename or add it.")
    return [column for column in COLUMNS if column in found]


def _prompt(value: Any, at: str) -> Prompt:
    """`value` checked; of a message's keys only role and content stay."""
    if isinstance(value, str):
        return _text(value, f"{at}: the prompt")
    if not isinstance(value, list) or not value:
        raise UserError(f"{at}: the prompt is {_shown(value)}, neither text nor a list of messages: mend it.")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise UserError(f"{at}: message {i} is {_shown(message)}, not an object with role and content.")
        messages.append(
            {key: _text(message.get(key), f"{at}: the {key} of message {i}") for key in ("role", "content")}
        )
    return messages


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} is {_shown(value)}, not text: write it as text.")
    if not value.strip():
        raise UserError(f"{what} is empty: fill it in or drop the row.")
    return value


def _solution(row: Row, at: str) -> str | None:
    """The reference answer: `solution`, else verl's ground truth, else `answer`; numbers become text."""
    reward_model = row.get("reward_model")
    ground_truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    candidates = (row.get("solution"), ground_truth, row.get("answer"))
    present = (value for value in candidates if value is not None and value == value)  # NaN: pandas' missing
    value = next(present, None)
    if value is None or isinstance(value, str | Number):
        return None if value is None else str(value)
    raise UserError(f"{at}: the solution is {_shown(value)}, neither text nor a number: write it as text.")


def _shown(value: Any) -> str:
    """`value` for a message: None, or its type and how it begins."""
    return "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
