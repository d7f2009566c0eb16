"""Prompts and reference answers: the bundled tasks, files, folders and Hub datasets in one format.

Everything is read into memory and checked row by row; nothing is cached, so an edited file is
never shadowed by an older copy (the Hub keeps its own download cache).
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, List, Value, load_dataset

from oprd.foundation.errors import UserError, reason, whatever_fails_is
from oprd.models.tiny import task as tiny
from oprd.rollouts.row_files import READERS, Row, dataset_rows, folder_files, plain_rows, read_file
from oprd.rollouts.word_problems import task as word_problems
from oprd.text.answers import reference_answers
from oprd.text.messages import Prompt, checked_prompt

logger = logging.getLogger(__name__)

PLAIN = {"role": Value("string"), "content": Value("string")}


def load_prompts(
    name: str,
    split: str = "train",
    config: str | None = None,
    drop_malformed: bool = False,
    streamed: int | None = None,
    answers: bool = True,
) -> Dataset:
    """Load prompts and, if `answers` are asked for, reference answers where the source has them.

    `name` is `tiny` (splits train and eval, also called test), `word-problems` (train, test, also called
    eval, and test-templates), a .parquet, .jsonl or .json file (its split is whatever the file holds), a
    folder of such files of one kind (where file names carry a split word, as in `train.parquet`, only those
    of `split` are read), or a Hub dataset, of which only the first `streamed` rows are fetched, if that is
    given. Rows may be TRL's (`prompt`; `solution` or `answer`) or verl's (`reward_model.ground_truth`).

    Returns the columns `prompt`, text or a list of messages (see `checked_prompt`), the same kind in
    every row, and, if the source has one, `solution`, text (see `reference_answers`); of `word-problems`
    beside it `worked_solution`, which training ignores. Rows keep their order. Raises `UserError`, naming
    the file and the row (from 0), where something is missing, malformed or empty; with `drop_malformed`,
    rows whose prompt is so are dropped and counted.
    """
    sources = _read_sources(name, split, config, streamed)
    rows = [(f"{where}, row {i}", row) for where, part in sources for i, row in enumerate(part)]
    if not rows:
        raise UserError(f"{name} has no rows: give a dataset with at least one prompt.")
    kept = _checked_rows(rows, drop_malformed)
    if not kept:
        raise UserError(f"{name}: all {len(rows)} prompts are malformed: fix them.")
    for at, prompt, _ in kept:
        if type(prompt) is not type(kept[0][1]):
            raise UserError(f"{at}: text and chat prompts are mixed ({kept[0][0]}, differs): use one kind.")
    columns: dict[str, list[Any]] = {"prompt": [prompt for _, prompt, _ in kept]}
    if answers:
        columns |= _solutions([row for _, _, row in kept], [at for at, _, _ in kept])
        if name == word_problems.NAME:
            columns["worked_solution"] = [row["worked_solution"] for _, _, row in kept]
    return prompt_dataset(columns, name)


def _solutions(rows: list[Row], places: list[str]) -> dict[str, list[str | None]]:
    """The column `solution`, unless no row has one."""
    solutions = reference_answers(rows, places)
    if all(solution is None for solution in solutions):
        return {}
    if None in solutions:
        at = places[solutions.index(None)]
        raise UserError(f"{at} has no solution, but other rows have one: add it or drop the row.")
    return {"solution": solutions}


def _checked_rows(rows: list[tuple[str, Row]], drop_malformed: bool) -> list[tuple[str, Prompt, Row]]:
    """Place, prompt and row of every row whose prompt is well-formed."""
    kept, dropped = [], []
    for at, row in rows:
        try:
            kept.append((at, checked_prompt(row.get("prompt"), at), row))
        except UserError as error:
            if not drop_malformed:
                raise
            dropped.append(error)
    if dropped:
        logger.warning(
            "dropped %d of %d malformed prompts, the first: %s", len(dropped), len(rows), dropped[0]
        )
    return kept


def prompt_dataset(columns: dict[str, list[Any]], where: str) -> Dataset:
    """`columns`, `prompt` and text ones, as a dataset.

    Messages of other keys than role and content are kept as JSON: Arrow would fill in nulls, and wants one
    type of a key in all rows. Raises `UserError` for text that is no Unicode.
    """
    features = {column: Value("string") for column in columns}
    chats = [prompt for prompt in columns["prompt"] if isinstance(prompt, list)]
    if chats:
        plain = all(_is_plain(message) for chat in chats for message in chat)
        features["prompt"] = List(PLAIN if plain else Json())
        if not plain:  # written here, as `Json` itself keeps ten decimals of a number
            columns = columns | {
                "prompt": [prompt and list(map(_json, prompt)) for prompt in columns["prompt"]]
            }
    try:
        return Dataset.from_dict(columns, features=Features(features))
    except UnicodeEncodeError as error:  # half an emoji, which JSON can escape and UTF-8 cannot hold
        raise UserError(f"{where}: the text {error.object[:40]!r} is broken Unicode: fix it.") from error


def _is_plain(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.keys() == PLAIN.keys()
        and all(isinstance(value, str) for value in message.values())
    )


def _json(message: Any) -> str:
    return json.dumps(message, ensure_ascii=False, default=str)


def _read_sources(
    name: str, split: str, config: str | None, streamed: int | None
) -> list[tuple[str, list[Row]]]:
    """The rows of each file, or of the one dataset, behind `name`, with its name for messages."""
    bundled = BUNDLED.get(name)
    path = None if bundled else _local_path(name)
    asked = {
        f"config {config!r}": config is not None,
        f"the slice {split!r}": "[" in split,
        "dataset_streaming": streamed is not None,
    }
    if (bundled or path) and any(asked.values()):
        extra = next(option for option, is_asked in asked.items() if is_asked)
        raise UserError(
            f"{name}: only Hub datasets have configurations, slices and streams: leave out {extra}."
        )
    if bundled:
        return [(name, [dict(row) for row in bundled(split)])]
    if path is None:
        return [(name, _hub_rows(name, split, config, streamed))]
    files = folder_files(path, split) if path.is_dir() else [path]
    return [(str(file), read_file(file)) for file in files]


def _local_path(name: str) -> Path | None:
    """The file or folder of that name, or None where there is none."""
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path
        is_link = path.is_symlink()
    except (OSError, RuntimeError) as error:  # too long a name, no right to look, no such user's home
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name[:80]}: no such file or folder ({reason}): check the path.") from error
    if is_link:
        raise UserError(f"{name}: a link to {path.readlink()}, where nothing is: check the path.")
    return None


def _tiny_rows(split: str) -> list[tiny.Row]:
    if split not in ("train", "eval", "test"):
        raise UserError(f"tiny has the splits train and eval (also called test), not {split!r}: name one.")
    return tiny.rows("train" if split == "train" else "eval")


BUNDLED: dict[str, Callable[[str], Sequence[Mapping[str, Any]]]] = {
    "tiny": _tiny_rows,
    word_problems.NAME: word_problems.rows,
}


def _hub_rows(name: str, split: str, config: str | None, streamed: int | None) -> list[Row]:
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).suffix.lower() in READERS:
        raise UserError(f"{name}: no such file or folder: check the path, relative to {Path.cwd()}.")
    with whatever_fails_is(
        lambda error: (
            f"{name}: no such file or folder, and loading it from the Hugging Face Hub "
            f"(config {config!r}, split {split!r}) failed: {reason(error)}"
        )
    ):
        if streamed is not None:
            stream = load_dataset(name, config, split=split, streaming=True)
            return plain_rows(list(islice(stream, streamed)), name)
        dataset = load_dataset(name, config, split=split)
    return dataset_rows(dataset, name)
