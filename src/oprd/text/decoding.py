"""What a tokenizer's decoder makes of a token, and what the tokenizer changes in a text before it cuts it."""

import json
import re
from codecs import utf_8_decode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models
from tokenizers.normalizers import Normalizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
BYTE_FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Decoder:
    """The bytes of a token, what the decoder renames, and whether it drops a space at the start of a text."""

    spell: Callable[[Any], bytes]
    renames: Mapping[str, str]
    drops_space: bool


def bytes_decoder(tokens: Iterable[Any]) -> Decoder | None:
    """The decoder of a tokenizer whose own `tokens` are bytes, and its added ones text; None for others."""
    if not all(isinstance(token, bytes) for token in tokens):
        return None
    return Decoder(lambda token: token.encode() if isinstance(token, str) else token, {}, drops_space=False)


def read_decoder(backend: dict[str, Any]) -> Decoder | None:
    """The decoder of a `tokenizer.json`; None if it is of no known kind."""
    decoder, model = backend["decoder"] or {}, backend["model"]
    renames, kinds, drops = {}, set(), False
    for step in decoder.get("decoders", [decoder]):
        fused = "Fuse" in kinds
        match step:
            case {"type": "ByteLevel" | "ByteFallback" | "Fuse"} if not fused:
                pass
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if not fused:
                renames[old] = new
            case {"type": "Metaspace", "replacement": old, "prepend_scheme": when} if not fused:
                renames[old], drops = " ", when != "never"
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0} if fused:
                drops = True
            case _:
                return None
        kinds.add(step["type"])
    if kinds <= {"Fuse"} or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None

    def spell(token: str) -> bytes:
        if "ByteFallback" in kinds and (byte := BYTE_FALLBACK.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for old, new in renames.items():
            token = token.replace(old, new)
        if "ByteLevel" in kinds and all(character in BYTE_OF for character in token):
            return bytes(BYTE_OF[character] for character in token)
        return token.encode()

    return Decoder(spell, renames, drops)


def read_normalizer(
    backend: dict[str, Any], renames: Mapping[str, str], adds_space: bool
) -> Normalizer | None:
    """What the tokenizer of a `tokenizer.json` changes in a text; None if it changes nothing.

    These are the steps of its normaliser and the spaces that added tokens take with them, or have behind them
    if the tokenizer `adds_space` in front of what it reads: after such a token it starts anew. They act on a
    part of a text as on the whole: spaces at the ends of a text, which a spelling treats by itself, are left
    out, and characters that stand for others in tokens are the others, as the decoder `renames` them.
    """
    steps = [_spaces_around(token, adds_space) for token in backend["added_tokens"] if not token["special"]]
    steps += [_decoded(step, renames) for step in _steps(backend["normalizer"])]
    if not any(steps):
        return None
    described = {"type": "Sequence", "normalizers": [step for step in steps if step]}
    blank = json.loads(Tokenizer(models.BPE()).to_str())
    return Tokenizer.from_str(json.dumps(blank | {"normalizer": described})).normalizer


def _spaces_around(token: dict[str, Any], adds_space: bool) -> dict[str, Any] | None:
    if not token["lstrip"] and not token["rstrip"] and not adds_space:
        return None
    before, after = r"\s*" * token["lstrip"], r"\s*" if token["rstrip"] else " *" * adds_space
    return _replace({"Regex": before + re.escape(token["content"]) + after}, token["content"])


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if normalizer is None or normalizer["type"] in ("Prepend", "Strip", "ByteLevel"):
        return []
    if normalizer["type"] == "Sequence":
        return [step for part in normalizer["normalizers"] for step in _steps(part)]
    return [normalizer]


def _decoded(step: dict[str, Any], renames: Mapping[str, str]) -> dict[str, Any] | None:
    """A step that gives text, not the characters of tokens; None if it is undone."""
    if step["type"] != "Replace":
        return step
    content = step["content"]
    for old, new in renames.items():
        content = content.replace(old, new)
    return None if step["pattern"] == {"String": content} else _replace(step["pattern"], content)


def valid_utf8(data: bytes, ended: bool) -> tuple[str, int]:
    """The text before any invalid UTF-8, and where that starts, at the latest at the end of `data`.

    A character that the end of `data` cuts off is invalid if the response has `ended`.
    """
    try:
        return utf_8_decode(data, "strict", ended)[0], len(data)
    except UnicodeDecodeError as error:
        return data[: error.start].decode(), error.start
