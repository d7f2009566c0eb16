"""Rows that are held out from the fit of a bridge, and what they measure: errors, ρ², cosines, rank."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from oprd.bridge.moments import Key
from oprd.bridge.solve import Predictor, Target

SAMPLE = 1024  # held-out rows kept for cosines, which moments do not give


@dataclass(frozen=True)
class LayerReport:
    """What was fitted for one pair of layers, and its held-out measures with P_S fitted on the other rows.

    `variance` (λ_i) and `share` (ρ_i²) are per direction, `error` is Eq. 30 at ranks 0, 1, …, `mse` and
    `cosine` stand at ranks 1, 2, …, beside those of a random P_S (`…_before`), and `cosine_at_rank` is that
    of the chosen directions. These are None without held-out rows. `explained` is the share of the
    teacher's variance in the first 1, 2, … directions.
    """

    teacher_layer: int
    rank: int
    directions: list[int]
    affine: bool
    num_rows: int
    num_held_out: int
    cka: float
    explained: list[float]
    cosine_at_rank: float | None = None
    variance: list[float] | None = None
    share: list[float] | None = None
    error: list[float] | None = None
    mse: list[float] | None = None
    mse_before: list[float] | None = None
    cosine: list[float] | None = None
    cosine_before: list[float] | None = None


def rollout_hash(rollout_ids: Int[Tensor, " N"]) -> np.ndarray:
    """A well-mixed 64-bit hash of every id (splitmix64), the same on every machine."""
    x = rollout_ids.cpu().numpy().astype(np.int64).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def row_hash(rollout_hashes: np.ndarray, numbers: np.ndarray | int) -> np.ndarray:
    """A hash of every row, of its rollout's hash and its number there."""
    return rollout_hash(torch.from_numpy((rollout_hashes + np.uint64(numbers)).view(np.int64)))


def is_held_out(hashes: np.ndarray, share: float) -> Bool[Tensor, " N"]:
    """The rows of the rollouts that are held out: about `share` of all rollouts, by their hash alone."""
    return torch.from_numpy((hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53 < share)


class RowCounter:
    """Numbers the rows of every rollout from 0, in the order they come in."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def number(self, rollout_ids: Int[Tensor, " N"]) -> np.ndarray:
        """The number of every row in its rollout."""
        ids, place, counts = np.unique(rollout_ids.cpu().numpy(), return_inverse=True, return_counts=True)
        before = np.array([self._counts.get(int(i), 0) for i in ids], dtype=np.int64)
        self._counts.update(zip(map(int, ids), (before + counts).tolist(), strict=True))
        numbers = np.empty(len(place), dtype=np.int64)
        numbers[np.argsort(place, kind="stable")] = np.concatenate([np.arange(n) for n in counts] or [counts])
        return (numbers + before[place]).astype(np.uint64)


class RowSample:
    """At most `SAMPLE` rows: those with the lowest hashes, whatever order or process they came in."""

    def __init__(self) -> None:
        self.hashes = np.empty(0, dtype=np.uint64)
        self.rows: dict[Key, Float[Tensor, "K D"]] = {}

    def add(self, hashes: np.ndarray, rows: Mapping[Key, Float[Tensor, "N D"]]) -> None:
        """Offer rows; those of equal hashes are kept in the order they come in."""
        if len(self.hashes) == SAMPLE:
            lower = torch.from_numpy(hashes < self.hashes[-1])
            hashes = hashes[lower.numpy()]
            rows = {key: x[lower.to(x.device)] for key, x in rows.items()}
        if not len(hashes):
            return
        together = np.concatenate([self.hashes, hashes])
        kept = np.argsort(together, kind="stable")[:SAMPLE]
        self.hashes = together[kept]
        index = torch.from_numpy(kept)
        old = self.rows
        self.rows = {
            key: torch.cat([old[key], x.cpu()] if key in old else [x.cpu()])[index] for key, x in rows.items()
        }


def cosine_curve(predicted: Float[Tensor, "K R"], wanted: Float[Tensor, "K R"]) -> Float[Tensor, " R"]:
    """Mean cosine of the first 1, 2, …, R coordinates."""
    dot = (predicted * wanted).cumsum(1)
    norms = predicted.square().cumsum(1).sqrt() * wanted.square().cumsum(1).sqrt()
    return (dot / torch.where(norms > 0, norms, 1)).mean(0)


def project(
    predictor: Predictor, target: Target, student: Float[Tensor, "K S"], teacher: Float[Tensor, "K T"]
) -> tuple[Float[Tensor, "K R"], Float[Tensor, "K R"]]:
    """Predicted and wanted coordinates of rows, in float64."""
    predicted = student.double() @ predictor.matrix.T + predictor.offset
    return predicted, (teacher.double() - target.mean) @ target.directions.T


def random_predictor(rank: int, width: int) -> Predictor:
    """A projector before any fit: seeded Gaussian rows of norm about one."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(rank, width, dtype=torch.float64, generator=generator) / width**0.5
    return Predictor(matrix, torch.zeros(rank, dtype=torch.float64))
