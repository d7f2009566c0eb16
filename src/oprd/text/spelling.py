"""What the ids of a tokenizer spell: the bytes of its tokens, and which of them end a response."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import wraps
from itertools import accumulate
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from tokenizers.normalizers import Normalizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from oprd.foundation.errors import UserError
from oprd.text.decoding import bytes_decoder, read_decoder, read_normalizer, valid_utf8

Value = TypeVar("Value")

REPLY = "the-reply"


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
        tail = str(tokenizer.apply_chat_template(messages, tokenize=False)).rsplit(REPLY, 1)[1]
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
    `literals`: added words that the decoder spells as invalid UTF-8, as they are written. `normalizer`: what
    the tokenizer makes of a text before it cuts it.
    """

    text: dict[int, bytes]
    controls: dict[int, bytes]
    ends: set[int]
    drops_space: tuple[bool, ...]
    literals: dict[int, bytes]
    normalizer: Normalizer | None

    def ended_by(self, ids: Iterable[int]) -> "Spelling":
        """The same, with more ids that end a response."""
        return replace(self, ends=self.ends | set(ids))

    def pieces(self, ids: list[int], ended: bool) -> list[bytes]:
        """What each id spells; control tokens spell nothing.

        A byte-level decoder takes the letters of every token for bytes, those of an added `café` too. Where
        these bytes are invalid UTF-8, the word stands for its own text, which is what an encoder cut it from.
        """
        pieces = [self.text.get(i, b"") for i in ids]
        while not self.literals.keys().isdisjoint(ids):
            text = b"".join(pieces)
            valid = valid_utf8(text, ended=True)[1]
            broken = next((n for n, stop in enumerate(accumulate(map(len, pieces))) if stop > valid), None)
            if broken is None or pieces[broken] == self.literals.get(ids[broken], pieces[broken]):
                break
            if len(pieces[broken]) == 1 and valid_utf8(text, ended)[1] == len(text):
                break  # a byte with which the response is cut off, not a letter
            pieces[broken] = self.literals[ids[broken]]
        return pieces


@_per_tokenizer
def spelling(tokenizer: Tokenizer, role: str) -> Spelling:
    """What the ids of a tokenizer spell; raises `UserError` if its tokens do not show it."""
    added, backend = tokenizer.added_tokens_decoder, _description(tokenizer)
    tokens = _tokens(tokenizer, is_fast=backend is not None)
    own = (token for i, token in tokens.items() if i not in added)
    decoder = bytes_decoder(own) if backend is None else read_decoder(backend)
    if decoder is None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise UserError(
            f"the {role}'s tokenizer {name!r} does not give its tokens' bytes back, so responses cannot be "
            "aligned: use models with byte-level or SentencePiece BPE tokenizers, or with one vocabulary"
        )
    text = {i: decoder.spell(token) for i, token in tokens.items()}
    # A special token of one byte is a part of characters, and counts as text.
    special = {i for i, token in added.items() if token.special and len(text[i]) > 1}
    controls = {i: added[i].content.encode() for i in special}
    text = {i: piece for i, piece in text.items() if i not in controls}
    broken = {i for i in added.keys() & text.keys() if valid_utf8(text[i], ended=True)[1] < len(text[i])}
    start = b"".join(text.get(i, b"") for i in encode(tokenizer, "a"))
    drops, adds = decoder.drops_space, start[:1] == b" "
    return Spelling(
        text,
        controls,
        {tokenizer.eos_token_id, end_of_turn(tokenizer)} - {None},
        (drops, not drops) if drops or adds else (drops,),
        {i: added[i].content.encode() for i in broken},
        None if backend is None else read_normalizer(backend, decoder.renames, adds),
    )


def _description(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The contents of `tokenizer.json`; None for a tokenizer that is not made of one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())


def _tokens(tokenizer: Tokenizer, is_fast: bool) -> dict[int, Any]:
    """The tokens as the decoder is given them: an added one that is to be normalised has been."""
    added = tokenizer.added_tokens_decoder
    known = {i: token for token, i in tokenizer.get_vocab().items()} if is_fast else {}
    others = added if is_fast else {*range(len(tokenizer)), *added}
    return known | {i: tokenizer.convert_ids_to_tokens(i) for i in others}
