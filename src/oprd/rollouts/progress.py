"""What a progress bar shows while a model generates: how many tokens every response has so far."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

ON_A_TERMINAL, ELSEWHERE = 0.5, 60.0  # seconds between two updates; a file keeps every one of them


@contextmanager
def tokens_shown(bar: tqdm | None, what: str, model: PreTrainedModel, limit: int | None) -> Iterator[None]:
    """Within it `bar` shows how many tokens `model` has generated for `what`, of at most `limit` each.

    Generation reads the input embedding once for every token, whichever library asks for it, and reads
    more than one position where it begins with the next prompts.
    """
    if bar is None or bar.disable:
        yield
        return
    wait = ON_A_TERMINAL if sys.stderr.isatty() else ELSEWHERE
    count, told, former = 0, time.monotonic(), str(bar.postfix or "")

    def passed(_: Any, inputs: tuple[Tensor, ...], states: Tensor) -> None:
        nonlocal count, told
        count = 1 if states.shape[-2] > 1 else count + 1
        if time.monotonic() - told >= wait:
            told = time.monotonic()
            bar.set_postfix_str(f"{what}: token {count:,}" + (f" of {limit:,}" if limit else ""))

    hook = model.get_input_embeddings().register_forward_hook(passed)
    try:
        yield
    finally:
        hook.remove()
        bar.set_postfix_str(former, refresh=False)
