"""Prompts as they have to be: text, or messages whose content is text."""

from collections.abc import Mapping
from typing import Any

from oprd.foundation.errors import UserError
from oprd.text.answers import shown

Message = dict[str, Any]
Prompt = str | list[Message]

MOST_LEVELS = 64  # of a message: what copies and renders it calls itself for each


def checked_prompt(value: Any, at: str) -> Prompt:
    """`value` as a prompt: text, or messages with a role, a content that is text, and no null keys.

    A content of text parts, `[{"type": "text", "text": …}]`, becomes their text joined. An assistant's
    message that calls tools needs no content. All other keys (`tool_calls`, `tool_call_id`, `name`,
    `reasoning_content`, …) stay, but for nulls, which Arrow fills in where rows differ. Raises
    `UserError`, naming the row `at`, for anything else.
    """
    if isinstance(value, str):
        return _text(value, f"{at}: the prompt")
    if not isinstance(value, list) or not value:
        raise UserError(f"{at}: the prompt is {shown(value)}, neither text nor a list of messages: fix it.")
    messages = [_message(message, f"message {i}", at) for i, message in enumerate(value)]
    if "tool_calls" in messages[-1]:
        raise UserError(
            f"{at}: the prompt ends with tool calls: add what the tools answered, or drop the row."
        )
    return messages


def excerpt(prompt: Any) -> str:
    """How a prompt begins, or its last message, for a message to the user."""
    text = str(prompt[-1].get("content") or "" if isinstance(prompt, list) else prompt)
    return repr(text if len(text) <= 60 else text[:59] + "…")


def _message(value: Any, name: str, at: str) -> Message:
    if not isinstance(value, Mapping):
        raise UserError(f"{at}: {name} is {shown(value)}, not an object with role and content.")
    message = _without_nulls(value, f"{at}: {name}")
    _text(message.get("role"), f"{at}: the role of {name}")
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], f"{at}: the content of {name}")
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)  # templates take an empty list for calls
    calls_alone = message["role"] == "assistant" and "tool_calls" in message and not message.get("content")
    nothing_returned = message["role"] == "tool" and message.get("content") == ""
    if not calls_alone and not nothing_returned:
        _text(message.get("content"), f"{at}: the content of {name}")
    return message


def _joined(parts: list[Any], what: str) -> str:
    """The text of a content's parts, one after the other, as templates that know parts write them."""
    for part in parts:
        if not isinstance(part, Mapping):
            raise UserError(f"{what} is {shown(parts)}, not text: write it as text.")
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") or ", ".join(map(str, part))
            raise UserError(
                f"{what} has a part of type {kind!r}, and oprd distils text-only models: drop it."
            )
    return "".join(part["text"] for part in parts)


def _without_nulls(value: Any, what: str, levels: int = MOST_LEVELS) -> Any:
    if not levels:
        raise UserError(f"{what} is nested more than {MOST_LEVELS} levels deep: fix it.")
    if isinstance(value, Mapping):
        return {k: _without_nulls(item, what, levels - 1) for k, item in value.items() if item is not None}
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise UserError(f"{what} holds a whole number of more than 64 bits: write it as text.")
    return [_without_nulls(item, what, levels - 1) for item in value] if isinstance(value, list) else value


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} is {shown(value)}, not text: write it as text.")
    if not value.strip():
        raise UserError(f"{what} is empty: fill it in or drop the row.")
    return value
