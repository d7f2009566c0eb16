"""The lines of `samples.jsonl`, one per problem: as they are written, and as they are found again."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any

from oprd.evaluation.problems import Problem
from oprd.folders.whole import write_whole

logger = logging.getLogger(__name__)

SAMPLE: dict[str, type | UnionType] = {
    "text": str,
    "answer": str | None,
    "correct": bool,
    "length": int,
    "truncated": bool,
}


def line(record: dict[str, Any]) -> bytes:
    """A record as it stands in the file."""
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def read_samples(file: Path, problems: Sequence[Problem], samples: int) -> dict[int, dict[str, Any]]:
    """The records of a file by their problem, in the problems' order; empty where there is no file.

    A last line that a killed process has half written is left out, and so, with a word, is every line that
    is not of this evaluation or of a problem that had one before. The file is written anew without them.
    """
    content = file.read_bytes() if file.exists() else b""
    found: dict[int, dict[str, Any]] = {}
    dropped = []
    lines = content.split(b"\n")[:-1]
    for number, text in enumerate(lines, 1):
        record = _record(text, problems, samples)
        if record is None or record["problem"] in found:
            dropped.append(number)
        else:
            found[record["problem"]] = record
    if dropped:
        logger.warning(
            "%s: %d lines, the first of them line %d, are not of this evaluation or stand twice: they are "
            "dropped, and what is then missing is drawn again",
            *(file, len(dropped), dropped[0]),
        )
    found = dict(sorted(found.items()))
    whole = b"".join(map(line, found.values()))
    if whole != content:
        write_whole(file, whole.decode())
    return found


def _record(text: bytes, problems: Sequence[Problem], samples: int) -> dict[str, Any] | None:
    try:
        record = json.loads(text)
        problem = problems[record["problem"]]
        asked = json.loads(json.dumps({"prompt": problem.prompt, "reference": problem.reference}))
        is_whole = (
            record.keys() == {"problem", "samples", *asked}
            and type(record["problem"]) is int
            and record["problem"] >= 0
            and {name: record[name] for name in asked} == asked
            and len(record["samples"]) == samples
            and all(_is_sample(sample) for sample in record["samples"])
            and bool(line(record))  # which half of a surrogate pair does not make
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return record if is_whole else None


def _is_sample(sample: dict[str, Any]) -> bool:
    return sample.keys() == SAMPLE.keys() and all(isinstance(sample[k], kind) for k, kind in SAMPLE.items())
