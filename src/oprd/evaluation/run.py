"""Evaluate a model on a set of problems: k samples of each, graded, summarised; resumable.

A folder holds `settings.json` first, then one line of `samples.jsonl` per finished problem, and
`summary.json` at the end. The problems are generated in fixed groups whose seed depends on nothing
but the settings, so a killed and resumed run writes the same bytes as an uninterrupted one.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.errors import UserError
from oprd.evaluation import metrics
from oprd.evaluation.grade import extract_answer, grade
from oprd.evaluation.problems import EvalSettings, Problem, check_context, read_problems
from oprd.folder.whole import check_writable, write_whole
from oprd.rollouts import Engine, HFEngine, Rollout, eos_token_ids

FINGERPRINT_ENTRIES = 1024


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
        records = list(_records(evaluation, 0, progress))
        return {**metrics.summarize(records), "settings": resolved}
    _claim(output_dir, resolved)
    summary_file, samples_file = output_dir / "summary.json", output_dir / "samples.jsonl"
    if not summary_file.exists():
        _complete(samples_file, evaluation, progress)
        records = [json.loads(line) for line in samples_file.read_bytes().splitlines()]
        _write_json(summary_file, {**metrics.summarize(records), "settings": resolved})
    return json.loads(summary_file.read_text())


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
        stride = max(1, parameter.numel() // FINGERPRINT_ENTRIES)
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[::stride].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _claim(output_dir: Path, resolved: dict[str, Any]) -> None:
    """Write settings.json into a new folder; refuse a folder that belongs to other settings."""
    file = output_dir / "settings.json"
    if not file.exists():
        if (output_dir / "samples.jsonl").exists() or (output_dir / "summary.json").exists():
            raise UserError(f"{output_dir} holds results but no settings.json: choose another output folder")
        check_writable(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        _write_json(file, resolved)
        return
    stored = json.loads(file.read_text())
    for key, value in json.loads(json.dumps(resolved)).items():
        if key not in stored or stored[key] != value:
            raise UserError(
                f"{output_dir} holds an evaluation with another {key} ({stored.get(key)!r}, now {value!r}): "
                "choose another output folder or remove this one"
            )


def _complete(file: Path, evaluation: _Evaluation, progress: bool) -> None:
    """Append one line per missing problem, after cutting a half-written line or group off."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    if len(lines) < len(evaluation.problems):
        lines = lines[: len(lines) - len(lines) % evaluation.group_size]
    with file.open("ab") as stream:
        stream.truncate(sum(map(len, lines)))
        for record in _records(evaluation, len(lines), progress):
            stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())


def _records(evaluation: _Evaluation, start: int, progress: bool) -> Iterator[dict[str, Any]]:
    """The lines of samples.jsonl from problem `start`, the first of a group, on."""
    size, num_samples = evaluation.group_size, evaluation.settings.samples
    count = len(evaluation.problems)
    with tqdm(total=count, initial=start, desc=evaluation.label, unit="problem", disable=not progress) as bar:
        for first in range(start, count, size):
            group = evaluation.problems[first : first + size]
            rollouts = _group_rollouts(evaluation, group, first)
            for i, problem in enumerate(group):
                drawn = rollouts[i * num_samples : (i + 1) * num_samples]
                yield {
                    "problem": first + i,
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
    text = cast(str, tokenizer.decode(rollout.response_ids, skip_special_tokens=True))
    return {
        "text": text,
        "answer": extract_answer(text),
        "correct": grade(text, reference),
        "length": len(rollout.response_ids),
        "truncated": rollout.truncated,
    }


def _write_json(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
