"""Small tokenizers with the normalisers, decoders and kinds of added tokens of well-known families."""

from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "the answer is 12345 and then 67890, so the sum is 80235",
    "def answer(x):\n    return x + 1  # the answer\n\nfor i in range(100):\n        print(answer(i))",
    "你好，世界。 こんにちは 안녕 العربية café Zürich 👩\u200d👧 🎉 e\u0301 ﬁ",
] * 4
BYTE_TOKENS = [f"<0x{b:02X}>" for b in range(256)]
RUNS = [*("▁" * n for n in range(2, 6)), *("\n" * n for n in range(2, 5)), "\t\t", "<table>", "</h1>"]
CHATML = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
)


def exact(content: str, **options: bool) -> AddedToken:
    return AddedToken(content, normalized=False, **options)


def byte_level(
    normalizer=None, size: int = 400, added=(), specials=("<|endoftext|>", "<|im_start|>"), split=None
) -> PreTrainedTokenizerFast:
    """GPT-2, Llama 3, Mistral's Tekken, Phi, Qwen (NFC), DeepSeek."""
    backend = Tokenizer(models.BPE())
    splits = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)]
    )
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"extra_special_tokens": list(specials)})
    tokenizer.add_tokens(list(added))
    tokenizer.chat_template = CHATML
    return tokenizer


def sentencepiece(normalizer, steps, added=(), special_bytes: bool = False) -> PreTrainedTokenizerFast:
    """Llama 2, Mistral, Phi-3, Gemma 1–3: BPE with bytes in place of unknown letters."""
    letters = sorted(set("".join(CORPUS[:2])) | set("▁你好é"))
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("t", "h"), ("th", "e"), ("▁", "the"), ("1", "2")]
    tokens = ["<unk>", "<s>", "</s>", *BYTE_TOKENS, *letters, *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer, backend.decoder = normalizer, decoders.Sequence(steps)
    if special_bytes:
        backend.add_special_tokens([exact(token) for token in BYTE_TOKENS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.add_tokens(list(added))
    return tokenizer


SPACES = normalizers.Replace(" ", "▁")
DECODING = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
FIRST_SPACE = decoders.Strip(" ", 1, 0)
LLAMA = normalizers.Sequence([normalizers.Prepend("▁"), SPACES])
ACCENTS = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()])
DEEPSEEK = r"[\r\n]|\s?\p{L}+|\s?\p{P}+|[一-龥ࠀ-一가-퟿]+|\p{N}"
WORDS = ["café", "naïve", "cafÃ©", "ä½łå¥½", "世界", "é", "ö", "Ã"]
KINDS = {
    "gpt2": lambda: byte_level(),
    "qwen": lambda: byte_level(normalizers.NFC(), 360, split=r"\p{N}|\s+|[^\s\p{N}]+"),
    "phi": lambda: byte_level(added=[AddedToken(" " * n, normalized=n % 2 == 0) for n in range(2, 6)]),
    "words": lambda: byte_level(size=380, added=WORDS),
    "deepseek": lambda: byte_level(
        size=390, split=DEEPSEEK, added=["<｜User｜>", "<｜tool▁calls▁begin｜>", "<think>"]
    ),
    "nfkc": lambda: byte_level(normalizers.NFKC(), 370),
    "nfd": lambda: byte_level(normalizers.NFD(), 350),
    "uncased": lambda: byte_level(ACCENTS, 340),
    "quotes": lambda: byte_level(
        normalizers.Sequence([normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]), 330
    ),
    "greedy": lambda: byte_level(
        size=385, added=[exact("<tool>", rstrip=True), exact("<end>", lstrip=True), exact("<x>")]
    ),
    "llama2": lambda: sentencepiece(LLAMA, [*DECODING, FIRST_SPACE]),
    "phi3": lambda: sentencepiece(LLAMA, [*DECODING, FIRST_SPACE], [exact("<tool>", rstrip=True)]),
    "gemma": lambda: sentencepiece(SPACES, DECODING, [exact(token) for token in RUNS]),
    "gemma, normalised": lambda: sentencepiece(SPACES, DECODING, [AddedToken(t) for t in [*RUNS, "the end"]]),
    "one space": lambda: sentencepiece(
        normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " "), SPACES]), DECODING
    ),
    "special bytes": lambda: sentencepiece(SPACES, DECODING, special_bytes=True),
}


@cache
def lookalike(name: str) -> PreTrainedTokenizerFast:
    """One of `KINDS`, made once."""
    return KINDS[name]()
