"""What the ids of a tokenizer spell: the bytes of its tokens, and which of them end a response."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from oprd.errors import UserError

Value = TypeVar("Value")

REPLY = "the-reply"
BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
BYTE_FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")


def _per_tokenizer(build: Callable[..., Value]) -> Callable[..., Value]:
    """Keep what `build` returns while the tokenizer lives with its size, EOS and chat template."""
    kept: WeakKeyDictionary[Tokenizer, tuple[Any, Value]] = WeakKeyDictionary()

    @wraps(build)
    def cached(tokenizer: Tokenizer, *args: Any) -> Value:
        stamp = len(tokenizer), tokenizer.eos_token_id, tokenizer.chat_template
        if tokenizer not in kept or kept[tokenizer][0] != stamp:
            kept[tokenizer] = stamp, build(tokenizer, *args)
        return kept[tokenizer][1]

    return cached


def same_vocabulary(student_tokenizer: Tokenizer, teacher_tokenizer: Tokenizer) -> bool:
    """Whether ids mean the same tokens; added ones, which chat variants of a family rename, do not count."""
    if student_tokenizer is teacher_tokenizer:
        return True
    return _base_vocabulary(student_tokenizer) == _base_vocabulary(teacher_tokenizer)


@_per_tokenizer
def _base_vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    added = set(tokenizer.get_added_vocab())
    return {token: index for token, index in tokenizer.get_vocab().items() if token not in added}


@_per_tokenizer
def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template writes first after an assistant's words, else the EOS."""
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": REPLY}]
    try:
        tail = tokenizer.apply_chat_template(messages, tokenize=False).rsplit(REPLY, 1)[1]
    except Exception:  # no template, or one that refuses this chat or rewrites it
        return tokenizer.eos_token_id
    added = tokenizer.added_tokens_decoder.items()
    found = [(tail.find(t.content), -len(t.content), i) for i, t in added if t.special and t.content in tail]
    return min(found)[2] if found else tokenizer.eos_token_id


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of plain text, in which the name of a special token is text as well."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    before = getattr(backend, "encode_special_tokens", None)
    try:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
    finally:
        if backend is not None:  # transformers leaves it switched on
            backend.encode_special_tokens = before


@dataclass(frozen=True)
class Spelling:
    """Bytes of text tokens and names of control tokens by id, and which ids end a response.

    `drops_space`: whether decoding drops a space at the start, then the other way if encoding may add one.
    """

    text: dict[int, bytes]
    controls: dict[int, bytes]
    ends: set[int | None]
    drops_space: tuple[bool, ...]


@_per_tokenizer
def spelling(tokenizer: Tokenizer, role: str) -> Spelling:
    """What the ids of a tokenizer spell; raises `UserError` if its tokens do not tell."""
    added, drops = tokenizer.added_tokens_decoder, False
    spell: Callable[[Any], bytes] | None
    if hasattr(tokenizer, "backend_tokenizer"):
        tokens = {i: token for token, i in tokenizer.get_vocab().items() if i not in added}
        spell, drops = _read_decoder(json.loads(tokenizer.backend_tokenizer.to_str()))
    else:
        tokens = {i: tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer)) if i not in added}
        spell = bytes if all(isinstance(token, bytes) for token in tokens.values()) else None
    if spell is None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise UserError(
            f"the {role}'s tokenizer {name!r} does not give its tokens' bytes back, so responses cannot be "
            "aligned: use models with byte-level or SentencePiece BPE tokenizers, or with one vocabulary"
        )
    text = {i: spell(token) for i, token in tokens.items()}
    text |= {i: token.content.encode() for i, token in added.items() if not token.special}
    controls = {i: token.content.encode() for i, token in added.items() if token.special}
    start = b"".join(text.get(i, b"") for i in encode(tokenizer, "a"))
    ends = {tokenizer.eos_token_id, end_of_turn(tokenizer)} - {None}
    return Spelling(text, controls, ends, (drops, not drops) if drops or start[:1] == b" " else (drops,))


def _read_decoder(backend: dict[str, Any]) -> tuple[Callable[[str], bytes] | None, bool]:
    """How the decoder spells a token (None: of no known kind) and whether it drops a space at the start."""
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
                return None, False
        kinds.add(step["type"])
    if kinds <= {"Fuse"} or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None, False

    def spell(token: str) -> bytes:
        if "ByteFallback" in kinds and (byte := BYTE_FALLBACK.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        for old, new in renames.items():
            token = token.replace(old, new)
        if "ByteLevel" in kinds and all(character in BYTE_OF for character in token):
            return bytes(BYTE_OF[character] for character in token)
        return token.encode()

    return spell, drops
