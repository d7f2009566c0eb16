"""The tokens that two vocabularies spell alike: classes over which both models' predictions are compared."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from oprd.text.spelling import encode, spelling

NO_CLASS = -1


@dataclass(frozen=True)
class Vocabulary:
    """One model's side: the id of each class but the last, which all `ends` share; the class of each id."""

    ids: Int[Tensor, " C"]
    ends: Int[Tensor, " E"]
    classes: Int[Tensor, " V"]  # NO_CLASS for a token that the other vocabulary does not have
    host_classes: Int[Tensor, " V"]  # the same on the host, where rows are chosen

    @classmethod
    def of(cls, ids: list[int], ends: Iterable[int], size: int) -> "Vocabulary":
        """From ids in the order of the classes; `size` counts the model's logits."""
        own = torch.tensor(ids, dtype=torch.long)
        last = torch.tensor([i for i in dict.fromkeys(ends) if i < size], dtype=torch.long)
        classes = torch.full((size,), NO_CLASS)
        classes[own] = torch.arange(len(own))
        classes[last] = len(own)
        return cls(own, last, classes, classes)

    def to(self, device: torch.device) -> "Vocabulary":
        """The same for logits on `device`."""
        ids, ends, classes = (x.to(device) for x in (self.ids, self.ends, self.classes))
        return replace(self, ids=ids, ends=ends, classes=classes)

    def tokens(self, ids: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
        """The classes of ids."""
        return self.classes.to(ids.device)[ids]

    def logits(self, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N K"]:
        """Logits of the classes; their softmax is the model's distribution, given that one of them comes."""
        ids, ends = self.ids.to(logits.device), self.ends.to(logits.device)
        return torch.cat([logits[:, ids], logits[:, ends].logsumexp(-1, keepdim=True)], -1)


@dataclass(frozen=True)
class SharedTokens:
    """Classes of tokens with the same bytes in both vocabularies, and one class of what ends a response."""

    student: Vocabulary
    teacher: Vocabulary

    @classmethod
    def with_one_end(cls, size: int, ends: Sequence[int]) -> "SharedTokens":
        """Of one vocabulary: every token is a class of its own, but for the `ends`."""
        last = set(ends)
        side = Vocabulary.of([index for index in range(size) if index not in last], ends, size)
        return cls(side, side)

    @classmethod
    def of(cls, student: "Speller", teacher: "Speller") -> "SharedTokens":
        """Raises `UserError` for a tokenizer that does not show its bytes."""
        ours, theirs = student.ids_by_bytes("student"), teacher.ids_by_bytes("teacher")
        shared = [piece for piece in ours if piece in theirs]
        return cls(
            Vocabulary.of([ours[piece] for piece in shared], student.ends, student.size),
            Vocabulary.of([theirs[piece] for piece in shared], teacher.ends, teacher.size),
        )

    def to(self, device: torch.device) -> "SharedTokens":
        """The same for logits on `device`."""
        return SharedTokens(self.student.to(device), self.teacher.to(device))

    @property
    def size(self) -> int:
        """How many classes there are."""
        return len(self.student.ids) + 1

    def logits(
        self, student: Float[Tensor, "N V"], teacher: Float[Tensor, "N W"]
    ) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N K"]]:
        """Both models' logits of the classes."""
        return self.student.logits(student), self.teacher.logits(teacher)

    def next_tokens_agree(
        self, student_ids: Int[Tensor, "B T"], teacher_ids: Int[Tensor, "B T"]
    ) -> Bool[Tensor, "B T"]:
        """Where both tokens are of one class."""
        ours = self.student.host_classes[student_ids]
        return (ours != NO_CLASS) & (ours == self.teacher.host_classes[teacher_ids])


@dataclass(frozen=True)
class Speller:
    """A tokenizer, the ids that end a response of its model, and how many logits the model has."""

    tokenizer: Tokenizer
    ends: Sequence[int]
    size: int

    def ids_by_bytes(self, role: str) -> dict[bytes, int]:
        """The id that writes each text: of several that spell it, the one that the tokenizer itself takes."""
        found: dict[bytes, list[int]] = {}
        for index, piece in sorted(spelling(self.tokenizer, role).text.items()):
            if piece and index < self.size and index not in self.ends:
                found.setdefault(piece, []).append(index)
        return {
            piece: ids[0] if len(ids) == 1 else self._own_choice(piece, ids) for piece, ids in found.items()
        }

    def _own_choice(self, piece: bytes, ids: list[int]) -> int:
        encoded = encode(self.tokenizer, piece.decode(errors="replace"))
        return next((index for index in encoded if index in ids), ids[0])
