"""Evaluate a model on a set of problems: k samples of each, graded, summarised; resumable.

A folder holds `settings.json` first, then one line of `samples.jsonl` per finished problem, and
`summary.json` at the end. The problems are generated in fixed groups whose seed depends on nothing
but the settings, so a killed and resumed run writes the same bytes as an uninterrupted one, and a line
that was lost can be drawn again alone.
"""

import hashlib
import json
import logging
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.evaluation import metrics
from oprd.evaluation.grade import extract_answer, grade
from oprd.evaluation.problems import EvalSettings, Problem, check_context, read_problems
from oprd.evaluation.samples import line, read_samples
from oprd.folders.claims import check_kinds
from oprd.folders.fingerprint import sampled
from oprd.folders.lock import check_held, hold
from oprd.folders.whole import write_whole
from oprd.foundation.errors import Fault, UserError, writing
from oprd.models.eos import eos_token_ids
from oprd.rollouts.generation import Engine, HFEngine, Rollout
from oprd.rollouts.progress import tokens_shown

logger = logging.getLogger(__name__)

COMMAND = "oprd eval"
SETTINGS_FILE, SAMPLES_FILE, SUMMARY_FILE = "settings.json", "samples.jsonl", "summary.json"


@dataclass(frozen=True)
class _Evaluation:
    """What is evaluated, and how."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    problems: list[Problem]
    settings: EvalSettings
    label: str
    engine: Engine

    @property
    def group_size(self) -> int:
        """Problems whose samples share a batch."""
        return max(1, self.settings.batch_size // self.settings.samples)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    settings: EvalSettings,
    output_dir: Path | None = None,
    model_name: str = "",
    progress: bool = True,
    label: str = "eval",
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Sample, grade and summarise `rows` of {"prompt": text or messages, "solution": reference answer}.

    Returns the summary: accuracies, diversity and truncation as shares in [0, 1] (see `metrics`),
    `ci95` of avg_at_k over problems, and `mean_length` in response tokens with EOS by the model's own
    tokenizer. `engine` draws the samples, by default HF's of `model`. With `output_dir` it is also
    written there; the same call on a stopped folder resumes, on a finished one it returns the stored
    summary. Raises `UserError` for rows without a prompt or a reference, prompts too long for the
    model, and a folder of another evaluation.
    """
    problems = read_problems(model, tokenizer, rows, settings)
    check_context(model, problems, settings.sampling.max_new_tokens)
    evaluation = _Evaluation(
        model, tokenizer, problems, settings, label, engine or HFEngine(model, tokenizer)
    )
    resolved = _resolved(evaluation, model_name)
    if output_dir is None:
        records = list(_records(evaluation, (), progress))
        return {**metrics.summarize(records), "settings": resolved}
    summary = _stored_summary(output_dir, resolved)
    if summary is not None:
        return summary
    with hold(output_dir, COMMAND):
        summary = _stored_summary(output_dir, resolved)  # of a process that has just let go of it
        if summary is None:
            if (output_dir / SUMMARY_FILE).exists():
                logger.warning("%s/%s is damaged: it is made again", output_dir, SUMMARY_FILE)
            _write_json(output_dir / SETTINGS_FILE, resolved)
            records = _complete(output_dir / SAMPLES_FILE, evaluation, progress)
            summary = {**metrics.summarize(records), "settings": resolved}
            _write_json(output_dir / SUMMARY_FILE, summary)
    return json.loads(json.dumps(summary))


@contextmanager
def evaluation_folder(folder: Path) -> Iterator[None]:
    """Hold `folder`, unless it is finished; raises `UserError` where it is in use, or damaged."""
    read_settings(folder)
    with nullcontext() if (folder / SUMMARY_FILE).exists() else hold(folder, COMMAND):
        yield


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the evaluation in `folder`, or None; raises `UserError` where they cannot be read."""
    check_kinds(folder)
    file = folder / SETTINGS_FILE
    if not file.exists():
        for name in (SAMPLES_FILE, SUMMARY_FILE):
            if (folder / name).exists():
                raise UserError(f"{folder} holds {name} but no {file.name}: choose another output folder")
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}): choose another output folder, or remove it") from error
    if not isinstance(stored, dict) or "model_fingerprint" not in stored:
        raise UserError(f"{file} is not of an evaluation: choose another output folder")
    return stored


def _resolved(evaluation: _Evaluation, model_name: str) -> dict[str, Any]:
    """Everything that decides the samples, flat, in the order in which differences are reported."""
    flat = asdict(evaluation.settings)
    flat |= flat.pop("sampling")
    data = json.dumps([asdict(problem) for problem in evaluation.problems], sort_keys=True)
    return {
        "model_name": model_name,
        "model_fingerprint": _model_fingerprint(evaluation.model, evaluation.tokenizer),
        "engine": evaluation.engine.name,
        **flat,
        "num_problems": len(evaluation.problems),
        "data_fingerprint": hashlib.sha256(data.encode()).hexdigest()[:16],
    }


def _model_fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of the EOS ids and of about a thousand evenly spaced entries of every parameter."""
    digest = hashlib.sha256(repr(eos_token_ids(model, tokenizer)).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(sampled(parameter).float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _stored_summary(folder: Path, resolved: dict[str, Any]) -> dict[str, Any] | None:
    """The summary in `folder`, or None if it cannot be read; raises `UserError` for another evaluation's."""
    stored, file = read_settings(folder), folder / SUMMARY_FILE
    if stored is None:
        return None
    for key, value in json.loads(json.dumps(resolved)).items():
        if key not in stored or stored[key] != value:
            raise UserError(
                f"{folder} holds an evaluation with another {key} ({stored.get(key)!r}, now {value!r}): "
                "choose another output folder or remove this one"
            )
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        is_whole = summary["settings"] == stored and _is_like(summary, _example(stored))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return summary if is_whole else None


def _example(settings: dict[str, Any]) -> dict[str, Any]:
    """A summary of these settings."""
    sample = {"text": "", "answer": None, "correct": False, "length": 0, "truncated": False}
    return {**metrics.summarize([{"samples": [sample] * settings["samples"]}]), "settings": settings}


def _is_like(value: Any, example: Any) -> bool:
    """Whether a value has the keys, the lengths and the types of another one."""
    if isinstance(example, dict) and isinstance(value, dict):
        return value.keys() == example.keys() and all(_is_like(value[key], example[key]) for key in example)
    if isinstance(example, list) and isinstance(value, list):
        return len(value) == len(example) and all(map(_is_like, value, example))
    return type(value) is type(example)


def _complete(file: Path, evaluation: _Evaluation, progress: bool) -> list[dict[str, Any]]:
    """Append a line for each problem that has none; returns the records of all problems, in their order."""
    asked = file, evaluation.problems, evaluation.settings.samples
    done = read_samples(*asked)
    with writing(file), file.open("ab") as stream:
        for record in _records(evaluation, done, progress):
            check_held(file.parent)
            stream.write(line(record))
            stream.flush()
            os.fsync(stream.fileno())
    records = read_samples(*asked)
    if len(records) < len(evaluation.problems):
        missing = len(evaluation.problems) - len(records)
        raise Fault(f"{file} lacks {missing} problems, which another program took away: run it again")
    return list(records.values())


def num_kept(output_dir: Path) -> int:
    """How many problems a stopped evaluation has done and will not do again."""
    file = output_dir / SAMPLES_FILE
    return file.read_bytes().count(b"\n") if file.exists() else 0


def _records(evaluation: _Evaluation, done: Container[int], progress: bool) -> Iterator[dict[str, Any]]:
    """The records of the problems that are not `done`; problems of one group are drawn together."""
    size, num_samples = evaluation.group_size, evaluation.settings.samples
    count = len(evaluation.problems)
    limit = evaluation.settings.sampling.max_new_tokens
    with (
        tqdm(total=count, desc=evaluation.label, unit="problem", disable=not progress) as bar,
        tokens_shown(bar, "responses", evaluation.model, limit),
    ):
        for first in range(0, count, size):
            group = evaluation.problems[first : first + size]
            numbers = range(first, first + len(group))
            missing = [number for number in numbers if number not in done]
            bar.update(len(group) - len(missing))
            rollouts = _group_rollouts(evaluation, group, first) if missing else []
            for number in missing:
                i, problem = number - first, evaluation.problems[number]
                drawn = rollouts[i * num_samples : (i + 1) * num_samples]
                yield {
                    "problem": number,
                    "prompt": problem.prompt,
                    "reference": problem.reference,
                    "samples": [graded(evaluation.tokenizer, r, problem.reference) for r in drawn],
                }
                bar.update()


def _group_rollouts(evaluation: _Evaluation, group: list[Problem], first: int) -> list[Rollout]:
    """All samples of a group, problem by problem; `first` is the index of its first problem."""
    settings = evaluation.settings
    prompts = [problem.prompt_ids for problem in group for _ in range(settings.samples)]
    rollouts: list[Rollout] = []
    for start in range(0, len(prompts), settings.batch_size):
        batch = prompts[start : start + settings.batch_size]
        seed = derived_seed(settings.seed, first, start)
        rollouts += evaluation.engine.generate(batch, settings.sampling, seed)
    return rollouts


def derived_seed(*parts: int) -> int:
    """A seed that depends on nothing but `parts`."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


def graded(tokenizer: PreTrainedTokenizerBase, rollout: Rollout, reference: str) -> dict[str, Any]:
    """A response as it stands in samples.jsonl."""
    text = cast(str, tokenizer.decode(rollout.text_ids, skip_special_tokens=True))
    return {
        "text": text,
        "answer": extract_answer(text),
        "correct": grade(text, reference),
        "length": len(rollout.response_ids),
        "truncated": rollout.truncated,
    }


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
