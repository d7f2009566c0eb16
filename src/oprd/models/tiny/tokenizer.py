"""The bundled tokenizers: byte-level BPEs, each with a chat template and a real EOS."""

from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 320


@dataclass(frozen=True)
class TokenizerDesign:
    """How text is split before merges, and how a chat is written."""

    split: str
    pad: str
    turn_end: str
    other_specials: tuple[str, ...]
    chat_template: str


# Letters in words, every digit alone, punctuation runs, line breaks; ChatML.
DIGITS = TokenizerDesign(
    split=r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+",
    pad="<|pad|>",
    turn_end="<|im_end|>",
    other_specials=("<|im_start|>",),
    chat_template=(
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    ),
)
# Digits go in pairs from the right, and every role has a token of its own.
PAIRS = TokenizerDesign(
    split=r" ?\p{L}+|\p{N}{1,2}(?=(?:\p{N}{2})*(?!\p{N}))| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+",
    pad="<|dummy|>",
    turn_end="<|end|>",
    other_specials=("<|system|>", "<|user|>", "<|assistant|>"),
    chat_template=(
        "{%- for message in messages -%}"
        "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
    ),
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = VOCAB_SIZE, design: TokenizerDesign = DIGITS
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `design` on `texts`, of `vocab_size` tokens at most; its EOS ends a turn."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(design.split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[design.pad, *design.other_specials, design.turn_end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=design.pad, eos_token=design.turn_end
    )
    fast.padding_side = "left"
    fast.chat_template = design.chat_template
    return fast
