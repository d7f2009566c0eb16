"""Evaluate a model on a set of problems: k samples of each, graded, summarised; resumable.

A folder holds `settings.json` first, then one line of `samples.jsonl` per finished problem, and
`summary.json` at the end. The problems are generated in fixed groups whose seed depends on nothing
but the settings, so a killed and resumed run writes the same bytes as an uninterrupted one.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.errors import UserError
from oprd.evaluation import metrics
from oprd.evaluation.grade import extract_answer, grade
from oprd.rollouts import Engine, HFEngine, Prompt, Rollout, Sampling, eos_token_ids, render_prompt
from oprd.whole import check_writable, write_whole

FINGERPRINT_ENTRIES = 1024


@dataclass(frozen=True)
class EvalSettings:
    """How a model is evaluated: `samples` per problem, at most `batch_size` responses at a time.

    `prompt_suffix` is appended to the last user message, or to a plain prompt. Raises `UserError`
    for counts below 1.
    """

    samples: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 64
    prompt_suffix: str = ""
    chat_template_kwargs: Mapping[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, but must be at least 1")


@dataclass(frozen=True)
class _Problem:
    """A row made ready: the prompt with its suffix, its token ids, and the reference answer."""

    prompt: Prompt
    prompt_ids: list[int]
    reference: str


@dataclass(frozen=True)
class _Evaluation:
    """What is evaluated, and how."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    problems: list[_Problem]
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
    problems = [_problem(i, row, tokenizer, settings) for i, row in enumerate(rows)]
    if not problems:
        raise UserError("there are no problems to evaluate: the data set is empty")
    _check_context(model, problems, settings.sampling.max_new_tokens)
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


def response_room(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    settings: EvalSettings,
) -> int | None:
    """Tokens that the model's positions leave for a response to the longest prompt; None if unbounded."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    problems = [_problem(i, row, tokenizer, settings) for i, row in enumerate(rows)]
    return limit and limit - max(len(problem.prompt_ids) for problem in problems)


def _problem(
    index: int, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, settings: EvalSettings
) -> _Problem:
    if not row.get("prompt"):
        raise UserError(f'row {index} has no "prompt": give it a text or a list of messages')
    reference = row.get("solution")
    if reference is None or not str(reference).strip():
        raise UserError(f'row {index} has no reference answer: give it a non-empty "solution"')
    prompt = _with_suffix(index, row["prompt"], settings.prompt_suffix)
    ids = render_prompt(tokenizer, prompt, settings.chat_template_kwargs)
    return _Problem(prompt, ids, str(reference))


def _with_suffix(index: int, prompt: Prompt, suffix: str) -> Prompt:
    if isinstance(prompt, str) or not suffix:
        return prompt + suffix if isinstance(prompt, str) else prompt
    users = [i for i, message in enumerate(prompt) if message["role"] == "user"]
    if not users:
        raise UserError(f"row {index} has no user message that prompt_suffix could be appended to")
    last = prompt[users[-1]]
    changed = {**last, "content": last["content"] + suffix}
    return [*prompt[: users[-1]], changed, *prompt[users[-1] + 1 :]]


def _check_context(model: PreTrainedModel, problems: list[_Problem], max_new_tokens: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(range(len(problems)), key=lambda i: len(problems[i].prompt_ids))
    length = len(problems[longest].prompt_ids)
    if limit is not None and length + max_new_tokens > limit:
        raise UserError(
            f"the prompt of row {longest} has {length} tokens, which with max_new_tokens {max_new_tokens} is "
            f"more than the {limit} positions of the model: lower max_new_tokens or drop long prompts"
        )


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
                    "samples": [_sample(evaluation.tokenizer, r, problem.reference) for r in drawn],
                }
                bar.update()


def _group_rollouts(evaluation: _Evaluation, group: list[_Problem], first: int) -> list[Rollout]:
    """All samples of a group, problem by problem; `first` is the index of its first problem."""
    settings = evaluation.settings
    prompts = [problem.prompt_ids for problem in group for _ in range(settings.samples)]
    rollouts: list[Rollout] = []
    for start in range(0, len(prompts), settings.batch_size):
        batch = prompts[start : start + settings.batch_size]
        seed = _derived_seed(settings.seed, first, start)
        rollouts += evaluation.engine.generate(batch, settings.sampling, seed)
    return rollouts


def _derived_seed(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7])


def _sample(tokenizer: PreTrainedTokenizerBase, rollout: Rollout, reference: str) -> dict[str, Any]:
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
