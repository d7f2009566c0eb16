"""The problems of an evaluation made ready, and how responses to them are drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.foundation.errors import UserError
from oprd.foundation.ranges import check_ranges
from oprd.models.positions import num_positions
from oprd.rollouts.generation import Sampling
from oprd.text.answers import answer_text
from oprd.text.messages import Prompt, checked_prompt, excerpt
from oprd.text.rendering import Refusal, Renderer


@dataclass(frozen=True)
class EvalSettings:
    """How a model is evaluated: `samples` per problem, at most `batch_size` responses at a time.

    `prompt_suffix` is appended to the last user message, or to a plain prompt. Raises `UserError`
    for a value outside its range.
    """

    samples: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 64
    prompt_suffix: str = ""
    chat_template_kwargs: Mapping[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(vars(self))


@dataclass(frozen=True)
class Problem:
    """A row made ready: the prompt with its suffix, its token ids, and the reference answer."""

    prompt: Prompt
    prompt_ids: list[int]
    reference: str


def read_problems(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    settings: EvalSettings,
) -> list[Problem]:
    """`rows` of {"prompt": text or messages, "solution": reference answer}, rendered for the model.

    Raises `UserError`, naming the row, for others and for a prompt that the chat template refuses.
    """
    if not len(rows):
        raise UserError("there are no problems to evaluate: the data set is empty")
    prompts = [_prompt(i, row, settings.prompt_suffix) for i, row in enumerate(rows)]
    references = [_reference(i, row) for i, row in enumerate(rows)]
    vocabulary = model.config.get_text_config().vocab_size
    read = Renderer(tokenizer, settings.chat_template_kwargs or {}, "the model", vocabulary).attempt(prompts)
    problems = []
    for i, (prompt, ids, reference) in enumerate(zip(prompts, read, references, strict=True)):
        if isinstance(ids, Refusal):
            raise UserError(f"row {i} ({excerpt(prompt)}): {ids.reason}; fix or remove the row")
        problems.append(Problem(prompt, ids, reference))
    return problems


def _reference(index: int, row: Mapping[str, Any]) -> str:
    reference = answer_text(row.get("solution"), f"row {index}")
    if reference is None or not reference.strip():
        raise UserError(f'row {index} has no reference answer: give it a non-empty "solution"')
    return reference


def _prompt(index: int, row: Mapping[str, Any], suffix: str) -> Prompt:
    """The prompt of a row, with `suffix` after its text or its last user message."""
    if not row.get("prompt"):
        raise UserError(f'row {index} has no "prompt": give it a text or a list of messages')
    prompt = checked_prompt(row["prompt"], f"row {index}")
    if isinstance(prompt, str) or not suffix:
        return prompt + suffix if isinstance(prompt, str) else prompt
    users = [i for i, message in enumerate(prompt) if message["role"] == "user"]
    if not users:
        raise UserError(f"row {index} has no user message that prompt_suffix could be appended to")
    last = prompt[users[-1]]
    changed = {**last, "content": last["content"] + suffix}
    return [*prompt[: users[-1]], changed, *prompt[users[-1] + 1 :]]


def check_context(model: PreTrainedModel, problems: list[Problem], max_new_tokens: int) -> None:
    """Raise `UserError` for a prompt that leaves the model no positions for `max_new_tokens`."""
    limit = num_positions(model.config)
    longest = max(range(len(problems)), key=lambda i: len(problems[i].prompt_ids))
    length = len(problems[longest].prompt_ids)
    if limit is not None and length + max_new_tokens > limit:
        raise UserError(
            f"the prompt of row {longest} has {length} tokens, which with max_new_tokens {max_new_tokens} is "
            f"more than the {limit} positions of the model: lower max_new_tokens or drop long prompts"
        )


def response_room(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    settings: EvalSettings,
) -> int | None:
    """Tokens that the model's positions leave for a response to the longest prompt; None if unbounded."""
    limit = num_positions(model.config)
    problems = read_problems(model, tokenizer, rows, settings)
    return limit and limit - max(len(problem.prompt_ids) for problem in problems)
