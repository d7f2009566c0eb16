"""The order of prompts, the same in a run that was resumed."""

from collections.abc import Callable, Iterator
from typing import Any

from trl.trainer.utils import RepeatSampler


class EpochSampler(RepeatSampler):
    """TRL's sampler, whose order in an epoch depends on nothing but the seed and the epoch.

    TRL's own order depends on earlier epochs, which a resumed run has not drawn.
    """

    def __init__(self, epoch: Callable[[], int], seed: int, **kwargs: Any) -> None:
        super().__init__(seed=seed, **kwargs)
        self.epoch, self.first_seed = epoch, seed

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.first_seed + self.epoch())
        return super().__iter__()
