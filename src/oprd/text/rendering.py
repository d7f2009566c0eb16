"""Prompts as token ids, as a tokenizer and its chat template read them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from oprd.foundation.errors import UserError, panics_are_errors
from oprd.text.messages import Prompt, checked_prompt, excerpt

logger = logging.getLogger(__name__)

SET_BY_RENDERER = (
    *("conversation", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict"),
    *("return_tensors", "padding", "truncation", "max_length", "return_assistant_tokens_mask"),
)
REASON_LENGTH = 160  # characters of what a template says


def plain_text(question: str) -> str:
    """What a model without a chat template reads of a question: its text, and the end of its line."""
    return f"{question}\n"


@dataclass(frozen=True)
class Refusal:
    """Why a prompt cannot be read."""

    reason: str


@dataclass(frozen=True)
class Renderer:
    """Turns prompts into token ids that are ready to be continued.

    Messages go through the chat template: with the generation prompt or, where the last one is the
    assistant's, with that turn left open to be continued. Text is tokenised as it is. Neither gets a second
    BOS. Without a chat template, as base models come, a single message of the user is read as plain text
    (`plain_text`), which a warning tells once. `template_kwargs` are arguments of the template, `tools` and
    `chat_template` among them. `vocabulary` is the number of ids that the reading model has embeddings for,
    if that is known. Raises `UserError` for template arguments that decide how a prompt is rendered.
    """

    tokenizer: PreTrainedTokenizerBase
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reader: str = "the student"
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        for name in SET_BY_RENDERER:
            if name in self.template_kwargs:
                raise UserError(f"chat_template_kwargs: {name} is set by oprd: leave it out")

    def __call__(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of every prompt; raises `UserError` for one that cannot be read."""
        ids = []
        for prompt, read in zip(prompts, self.attempt(prompts), strict=True):
            if isinstance(read, Refusal):
                raise UserError(f"the prompt {excerpt(prompt)} cannot be read: {read.reason}")
            ids.append(read)
        return ids

    def attempt(self, prompts: Sequence[Prompt]) -> list[list[int] | Refusal]:
        """Token ids of every prompt, or why it cannot be read; raises `UserError` for a malformed one."""
        checked = [checked_prompt(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
        alike: dict[_Kind, list[tuple[int, Prompt]]] = {}
        read: dict[int, list[int] | Refusal] = {}
        for i, prompt in enumerate(map(self._as_it_is_read, checked)):
            if isinstance(prompt, Refusal):
                read[i] = prompt
            else:
                alike.setdefault(_Kind.of(prompt, self.tokenizer.bos_token), []).append((i, prompt))
        for kind, members in alike.items():
            ids = self._attempt_alike(kind, [prompt for _, prompt in members])
            read |= zip([i for i, _ in members], ids, strict=True)
        return [read[i] for i in range(len(prompts))]

    def _attempt_alike(self, kind: "_Kind", prompts: list[Prompt]) -> list[list[int] | Refusal]:
        """One call for all or, if that fails, one for each: a template is code, and may raise anything."""
        try:
            with panics_are_errors():
                return [self._accepted(ids) for ids in self._ids(kind, prompts)]
        except Exception as error:
            if len(prompts) == 1:
                read_by = "tokenizer" if kind.is_text else "chat template"
                return [Refusal(f"{self.reader}'s {read_by} refuses it ({_reason(error)})")]
            return [read for prompt in prompts for read in self._attempt_alike(kind, [prompt])]

    def _as_it_is_read(self, prompt: Prompt) -> Prompt | Refusal:
        """A prompt or, of one that takes a chat template where there is none, its text."""
        template = self.template_kwargs.get("chat_template") or self.tokenizer.chat_template
        if template or isinstance(prompt, str):
            return prompt
        if len(prompt) > 1 or prompt[0]["role"] != "user" or "tools" in self.template_kwargs:
            return Refusal(
                f"{self.reader}'s tokenizer has no chat template, and without one only text and a single "
                "message of the user are read"
            )
        _tell_plain_text(self.reader)
        return plain_text(prompt[0]["content"])

    def _ids(self, kind: "_Kind", prompts: list[Prompt]) -> list[list[int]]:
        if kind.is_text:
            read: Any = self.tokenizer(prompts, add_special_tokens=not kind.has_bos)
        else:
            chats: Any = prompts  # whose messages hold more than text where tools were called
            read = self.tokenizer.apply_chat_template(
                chats,
                add_generation_prompt=not kind.is_continued,
                continue_final_message=kind.is_continued,
                return_dict=True,
                **self.template_kwargs,
            )
        return read["input_ids"]

    def _accepted(self, ids: list[int]) -> list[int] | Refusal:
        if not ids:
            return Refusal(f"it has no token as {self.reader} reads it")
        if self.vocabulary is not None and max(ids) >= self.vocabulary:
            return Refusal(
                f"it has the token {max(ids)}, and {self.reader} has {self.vocabulary} embeddings: tokenizer "
                "and model do not belong together"
            )
        return ids


@dataclass(frozen=True)
class _Kind:
    """What one call of the tokenizer renders alike."""

    is_text: bool
    has_bos: bool = False
    is_continued: bool = False

    @classmethod
    def of(cls, prompt: Prompt, bos: str | None) -> "_Kind":
        if isinstance(prompt, str):
            return cls(is_text=True, has_bos=bool(bos) and prompt.startswith(str(bos)))
        return cls(is_text=False, is_continued=prompt[-1]["role"] == "assistant")


@cache
def _tell_plain_text(reader: str) -> None:
    """Once, since a run renders its prompts again and again."""
    logger.warning(
        "%s's tokenizer has no chat template: prompts are messages, and it reads their plain text and a new "
        "line",
        reader,
    )


def _reason(error: Exception) -> str:
    """The first line of what was raised, with its type where the words alone say little."""
    line = str(error).strip().partition("\n")[0][:REASON_LENGTH]
    known = isinstance(error, ValueError | TemplateError) and line
    return line if known else f"{type(error).__name__}: {line}".removesuffix(": ")
