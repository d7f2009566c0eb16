"""Prompts as token ids, as a tokenizer and its chat template read them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from oprd.foundation.errors import UserError, panics_are_errors
from oprd.text.messages import Prompt, checked_prompt, excerpt

SET_BY_RENDERER = (
    *("conversation", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict"),
    *("return_tensors", "padding", "truncation", "max_length", "return_assistant_tokens_mask"),
)
REASON_LENGTH = 160  # characters of what a template says


@dataclass(frozen=True)
class Refusal:
    """Why a prompt cannot be read."""

    reason: str


@dataclass(frozen=True)
class Renderer:
    """Turns prompts into token ids that are ready to be continued.

    Messages go through the chat template: with the generation prompt or, where the last one is the
    assistant's, with that turn left open to be continued. Text is tokenised as it is. Neither gets a second
    BOS. `template_kwargs` are arguments of the template, `tools` and `chat_template` among them.
    `vocabulary` is the number of ids that the reading model has embeddings for, if that is known.
    Raises `UserError` for template arguments that decide how a prompt is rendered.
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
        """Token ids of every prompt, or why it cannot be read.

        Raises `UserError` for a malformed prompt, and for messages without any chat template.
        """
        prompts = [checked_prompt(prompt, f"prompt {i}") for i, prompt in enumerate(prompts)]
        alike: dict[_Kind, list[int]] = {}
        for i, prompt in enumerate(prompts):
            alike.setdefault(_Kind.of(prompt, self.tokenizer.bos_token), []).append(i)
        read: dict[int, list[int] | Refusal] = {}
        for kind, members in alike.items():
            read |= zip(members, self._attempt_alike(kind, [prompts[i] for i in members]), strict=True)
        return [read[i] for i in range(len(prompts))]

    def _attempt_alike(self, kind: "_Kind", prompts: list[Prompt]) -> list[list[int] | Refusal]:
        """One call for all or, if that fails, one for each: a template is code, and may raise anything."""
        template = self.template_kwargs.get("chat_template") or self.tokenizer.chat_template
        if not kind.is_text and not template:
            raise UserError(
                f"the prompts are messages, and {self.reader}'s tokenizer has no chat template: give the "
                "prompts as plain text, or use a tokenizer with a chat_template"
            )
        try:
            with panics_are_errors():
                return [self._accepted(ids) for ids in self._ids(kind, prompts)]
        except Exception as error:
            if len(prompts) == 1:
                read_by = "tokenizer" if kind.is_text else "chat template"
                return [Refusal(f"{self.reader}'s {read_by} refuses it ({_reason(error)})")]
            return [read for prompt in prompts for read in self._attempt_alike(kind, [prompt])]

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


def _reason(error: Exception) -> str:
    """The first line of what was raised, with its type where the words alone say little."""
    line = str(error).strip().partition("\n")[0][:REASON_LENGTH]
    known = isinstance(error, ValueError | TemplateError) and line
    return line if known else f"{type(error).__name__}: {line}".removesuffix(": ")
