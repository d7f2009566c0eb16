"""Second moments of many sets of rows in one pass: float64, streamed, mergeable, never all rows at once."""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

Key = tuple[Literal["student", "teacher"], int]  # a model and one of its layers

CHUNK = 1024  # rows held in float64 at a time


class Moments:
    """Count, means and centred sums of products of row sets that share their rows.

    `scatter[a, b]` is Σ (x_a − mean_a)(x_b − mean_b)ᵀ for the pairs of keys asked for. Updates and merges
    use the exact formula for shifted sums, so the order and size of chunks change nothing but rounding.
    """

    def __init__(self, pairs: Iterable[tuple[Key, Key]]) -> None:
        self.pairs = tuple(pairs)
        self.count = 0
        self.mean: dict[Key, Float[Tensor, " D"]] = {}
        self.scatter: dict[tuple[Key, Key], Float[Tensor, "D D2"]] = {}

    def update(self, rows: Mapping[Key, Float[Tensor, "N D"]], device: torch.device) -> None:
        """Add rows; the sums live on `device`."""
        total = len(next(iter(rows.values())))
        for start in range(0, total, CHUNK):
            chunk = {key: x[start : start + CHUNK].to(device, torch.float64) for key, x in rows.items()}
            means = {key: x.mean(0) for key, x in chunk.items()}
            shifts = self._shift(means, min(CHUNK, total - start))
            centred = {key: x - means[key] for key, x in chunk.items()}
            for (a, b), scatter in self.scatter.items():
                scatter.addmm_(centred[a].T, centred[b]).addr_(shifts[a], shifts[b])

    def merge(self, other: "Moments") -> None:
        """Add the rows that another accumulation of the same pairs has seen."""
        if not other.count:
            return
        device = next(iter((self.mean or other.mean).values())).device
        shifts = self._shift({key: mean.to(device) for key, mean in other.mean.items()}, other.count)
        for (a, b), scatter in self.scatter.items():
            scatter.add_(other.scatter[a, b].to(device)).addr_(shifts[a], shifts[b])

    def _shift(self, means: Mapping[Key, Tensor], count: int) -> dict[Key, Tensor]:
        """Move count and means on by a set of `count` rows with `means`.

        Returns √(n·m/(n+m)) (means − own means): the products of these are what recentring adds.
        """
        if not self.count:
            self.mean = {key: torch.zeros_like(mean) for key, mean in means.items()}
            self.scatter = {(a, b): means[a].new_zeros(len(means[a]), len(means[b])) for a, b in self.pairs}
        before, self.count = self.count, self.count + count
        weight = (before * count / self.count) ** 0.5
        differences = {key: mean - self.mean[key] for key, mean in means.items()}
        for key, difference in differences.items():
            self.mean[key] += difference * (count / self.count)
        return {key: weight * difference for key, difference in differences.items()}

    def gather(self, widths: Mapping[Key, int]) -> None:
        """Sum over the ranks of the default process group, in place; ranks without rows may take part."""
        device = torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")
        if not self.count:
            self.mean = {
                key: torch.zeros(width, dtype=torch.float64, device=device) for key, width in widths.items()
            }
            self.scatter = {(a, b): self.mean[a].new_zeros(widths[a], widths[b]) for a, b in self.pairs}
        total = torch.tensor(float(self.count), dtype=torch.float64, device=device)
        dist.all_reduce(total)
        shifts = {}
        for key, mean in self.mean.items():
            common = mean * (self.count / total.clamp(min=1))
            dist.all_reduce(common)
            shifts[key] = (mean - common) * self.count**0.5
            self.mean[key] = common
        for (a, b), scatter in self.scatter.items():
            dist.all_reduce(scatter.addr_(shifts[a], shifts[b]))
        self.count = int(total)
