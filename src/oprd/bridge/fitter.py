"""Fit a bridge in one streaming pass: moments of paired rows in, exact projectors out (Eq. 12–13)."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from operator import index
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from oprd.bridge.artifact import Bridge
from oprd.bridge.held_out import RowCounter, RowSample, is_held_out, rollout_hash, row_hash
from oprd.bridge.moments import Key, Moments
from oprd.bridge.pair import FitSettings, PairRows, Rank, alignment, fit_pair
from oprd.bridge.solve import Joint, linear_cka
from oprd.foundation.errors import UserError
from oprd.objective.selection import LayerMap

logger = logging.getLogger(__name__)


class BridgeFitter:
    """Accumulates second moments of both models' rows, not the rows, and fits bridges from them.

    Pairs are those of `layer_map`; with `all_pairs`, each of its student layers with each of its teacher
    layers, which `best_layer_map` and `cka` between all layers need. `holdout` is the share of rollouts held
    out for validation; projectors are then fitted on all rows. The other
    options are those of `FitSettings`. Raises `UserError` (a `ValueError`) for what cannot be fitted.
    """

    def __init__(
        self,
        layer_map: LayerMap,
        *,
        holdout: float = 0.1,
        all_pairs: bool = False,
        teacher_layers: Sequence[int] = (),
        **options: Any,
    ) -> None:
        if not 0 <= holdout < 1:
            raise UserError(f"holdout is a share of the rollouts, from 0 to below 1, not {holdout}")
        self.layer_map, self.holdout = layer_map, holdout
        self.settings = FitSettings(**options)
        self.student_layers = layer_map.student_layers
        self.teacher_layers = tuple(teacher_layers) or layer_map.teacher_layers
        crossed = [(s, t) for s in self.student_layers for t in self.teacher_layers]
        self.pairs = tuple(crossed) if all_pairs else layer_map.pairs
        self.num_rows = 0
        self._training, self._held_out = Moments(self._products()), Moments(self._products())
        self._sample, self._counter = RowSample(), RowCounter()
        self._widths: dict[Key, int] = {}

    def update(
        self,
        student: Mapping[int, Float[Tensor, "N S"]],
        teacher: Mapping[int, Float[Tensor, "N T"]],
        rollout_ids: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Add rows by layer, of any float dtype: row n of every tensor has read the same text.

        `rollout_ids` keeps the rows of a rollout on one side of the split; without them every row counts
        as a rollout of its own.
        """
        rows = self._checked(student, teacher)
        count = len(next(iter(rows.values())))
        ids = self._ids(rollout_ids, count)
        hashes = rollout_hash(ids)
        self._claim_widths({key: x.shape[1] for key, x in rows.items()})
        held_out = is_held_out(hashes, self.holdout)
        apart, device = _pick(rows, held_out), _device(rows)
        self._training.update(_pick(rows, ~held_out), device)
        self._held_out.update(apart, device)
        numbers = self._counter.number(ids[held_out]) if rollout_ids is not None else 0
        self._sample.add(row_hash(hashes[held_out.numpy()], numbers), apart)
        self.num_rows += count

    def merge(self, other: "BridgeFitter") -> None:
        """Add the rows that another fitter of the same layers has seen."""
        if other.pairs != self.pairs:
            raise UserError("fitters of different layers cannot be merged")
        if other.holdout != self.holdout:
            raise UserError(
                "fitters with different holdout cannot be merged: a rollout could be in both splits"
            )
        self._claim_widths(other._widths)
        self._training.merge(other._training)
        self._held_out.merge(other._held_out)
        self._sample.add(other._sample.hashes, other._sample.rows)
        self.num_rows += other.num_rows

    def gather(self) -> None:
        """Merge the fitters of all ranks of the default process group, in place, on every rank."""
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, (self._widths, self.num_rows, self._sample))
        self._sample, self.num_rows = RowSample(), 0
        for widths, num_rows, sample in states:
            self._claim_widths(widths)
            self._sample.add(sample.hashes, sample.rows)
            self.num_rows += num_rows
        if self.num_rows:
            for moments in (self._training, self._held_out):
                moments.gather(self._widths)

    def fit(
        self, rank: Rank = "auto", settings: FitSettings | None = None, layer_map: LayerMap | None = None
    ) -> Bridge:
        """The bridge of `rank` directions per layer, or of the number that minimises Eq. 30 (held out).

        With `auto` a layer may be dropped (rank 0), with a warning. `settings` and `layer_map` fit the
        same rows in another way than the fitter's own. Raises `UserError` for too few rows.
        """
        rank = _checked_rank(rank)
        settings, pairs = settings or self.settings, (layer_map or self.layer_map).pairs
        if rank != "auto":
            settings = replace(settings, max_rank=max(settings.max_rank, rank))
        self._check_rows()
        fitted = {s: fit_pair(self._rows(s, t), t, rank, settings) for s, t in pairs}
        dropped = [layer for layer, (projector, _) in fitted.items() if not projector.rank]
        for layer in dropped:
            logger.warning("student layer %d is dropped: it predicts none of the teacher's directions", layer)
        if len(dropped) == len(fitted):
            raise UserError("no student layer predicts a direction: set a rank, or pair other layers")
        metadata = {
            "rank": rank,
            "fit": asdict(settings),
            "num_rows": self.num_rows,
            "dropped_layers": dropped,
            "layers": {str(layer): asdict(report) for layer, (_, report) in fitted.items()},
        }
        kept = {layer: projector for layer, (projector, _) in fitted.items() if projector.rank}
        return Bridge(kept, metadata)

    def best_layer_map(self) -> LayerMap:
        """For every student layer the teacher layer of the best held-out alignment, depths in order.

        Maximises the sum of the predicted shares of held-out variance over all non-decreasing maps among
        the pairs that are accumulated.
        """
        self._check_rows()
        if not (self._training.count and self._held_out.count):
            raise UserError("the best layer map needs held-out rollouts: give more of them, or raise holdout")
        scores = [
            [
                alignment(self._rows(s, t), self.settings) if (s, t) in self.pairs else float("-inf")
                for t in self.teacher_layers
            ]
            for s in self.student_layers
        ]
        chosen = best_monotone(scores)
        teachers = [self.teacher_layers[j] for j in chosen]
        pairs = tuple(zip(self.student_layers, teachers, strict=True))
        if not set(pairs) <= set(self.pairs):
            raise UserError("no map of these layers keeps their order: make the fitter with all_pairs=True")
        return LayerMap(pairs)

    def cka(self) -> dict[tuple[int, int], float]:
        """Linear CKA of every pair of student and teacher layer that is accumulated."""
        self._check_rows()
        return {(s, t): linear_cka(self._rows(s, t).both) for s, t in self.pairs}

    def _products(self) -> list[tuple[Key, Key]]:
        """The pairs of row sets whose products are summed: every layer with itself, and the layer pairs."""
        keys = self._keys()
        crossed: list[tuple[Key, Key]] = [(("student", s), ("teacher", t)) for s, t in self.pairs]
        return [(key, key) for key in keys] + crossed

    def _keys(self) -> list[Key]:
        students: list[Key] = [("student", layer) for layer in self.student_layers]
        return students + [("teacher", layer) for layer in self.teacher_layers]

    def _checked(
        self, student: Mapping[int, Tensor], teacher: Mapping[int, Tensor]
    ) -> dict[Key, Float[Tensor, "N D"]]:
        """The rows of all wanted layers; refuses missing ones, other shapes, non-finite values."""
        given = {"student": student, "teacher": teacher}
        rows = {}
        for model, layer in self._keys():
            if layer not in given[model]:
                raise UserError(
                    f"the {model}'s layer {layer} is missing; its rows were given for "
                    f"{', '.join(map(str, given[model])) or 'no layer'}"
                )
            rows[model, layer] = given[model][layer].detach()
        count = len(next(iter(rows.values())))
        for (model, layer), x in rows.items():
            if x.ndim != 2 or len(x) != count:
                raise UserError(
                    f"the rows of the {model}'s layer {layer} have shape {tuple(x.shape)}, but all layers "
                    f"must have the same rows, here [{count}, width]"
                )
            if not (x.sum(dtype=torch.float32).isfinite() or x.isfinite().all()):
                raise UserError(
                    f"the {model}'s layer {layer} has states that are not finite: check the model"
                )
        return rows

    def _ids(self, rollout_ids: Sequence[int] | Tensor | None, count: int) -> Tensor:
        if rollout_ids is None:
            return torch.arange(self.num_rows, self.num_rows + count)
        try:
            ids = torch.as_tensor(rollout_ids)
        except (ValueError, TypeError):
            ids = torch.empty(0, dtype=torch.float32)
        if ids.is_floating_point() and count:
            raise UserError("rollout_ids must be whole numbers, one for each row")
        if ids.shape != (count,):
            raise UserError(f"rollout_ids has shape {tuple(ids.shape)} for {count} rows: give one id per row")
        return ids

    def _claim_widths(self, widths: Mapping[Key, int]) -> None:
        for (model, layer), width in widths.items():
            known = self._widths.get((model, layer), width)
            if known != width:
                raise UserError(f"the {model}'s layer {layer} was {known} wide before and is now {width}")
        self._widths.update(widths)

    def _check_rows(self) -> None:
        if not self.num_rows:
            raise UserError("the bridge has seen 0 rows: give it both models' states of the same text")
        widest = max(self._widths.values())
        if self.num_rows < rows_needed(widest):
            raise UserError(
                f"the bridge has seen {self.num_rows} rows, and states {widest} wide need at least "
                f"{rows_needed(widest)}: give it more or longer rollouts"
            )

    def _rows(self, student: int, teacher: int) -> PairRows:
        keys: tuple[Key, Key] = ("student", student), ("teacher", teacher)
        if (student, teacher) not in self.pairs:
            raise UserError(f"layers {student}={teacher} were not accumulated: pair them, or set all_pairs")
        training, held_out = (self._joint(m, *keys) for m in (self._training, self._held_out))
        sample = [self._sample.rows.get(key, torch.empty(0, self._widths[key])) for key in keys]
        return PairRows(training, held_out, (training + held_out).without_rounding(), *sample)

    def _joint(self, moments: Moments, student: Key, teacher: Key) -> Joint:
        if not moments.count:
            return Joint.empty(self._widths[student], self._widths[teacher])
        means = [moments.mean[key].cpu() for key in (student, teacher)]
        products = ((student, student), (teacher, teacher), (student, teacher))
        joint = Joint(moments.count, *means, *(moments.scatter[pair].cpu() for pair in products))
        return joint.without_rounding()


def rows_needed(width: int) -> int:
    """The fewest rows that states of `width` can be fitted on: fewer leave their covariance singular."""
    return width + 1


def _checked_rank(rank: Any) -> Rank:
    if isinstance(rank, str) and rank == "auto":
        return "auto"
    if isinstance(rank, bool) or not hasattr(rank, "__index__") or index(rank) < 1:
        raise UserError(f"rank is a whole number from 1 on, or auto; got {rank!r}")
    return index(rank)


def best_monotone(scores: Sequence[Sequence[float]]) -> list[int]:
    """The non-decreasing choice of one column per row with the largest sum; the first of equals."""
    best, history = [0.0] * len(scores[0]), []
    for row in scores:
        reached, source = [], []
        for column in range(len(row)):
            before = max(range(column + 1), key=lambda j: best[j])
            source.append(before)
            reached.append(best[before] + row[column])
        best = reached
        history.append(source)
    column = max(range(len(best)), key=lambda j: best[j])
    path = [column]
    for source in reversed(history[1:]):
        column = source[column]
        path.append(column)
    return path[::-1]


def _pick(rows: Mapping[Key, Tensor], mask: Tensor) -> dict[Key, Tensor]:
    if mask.all():
        return dict(rows)
    return {key: x[mask.to(x.device)] for key, x in rows.items()}


def _device(rows: Mapping[Key, Tensor]) -> torch.device:
    """Where the rows are, unless there is no float64 there."""
    device = next(iter(rows.values())).device
    return torch.device("cpu") if device.type == "mps" else device
