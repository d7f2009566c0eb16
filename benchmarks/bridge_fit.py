"""How much faster is the exact fit of a bridge than the paper's training, and is its held-out error no worse?

    python benchmarks/bridge_fit.py --output benchmarks/bridge_fit.csv

Arms, on the same rollouts and the same batches (generation is not timed):
exact     one forward of both models feeds `BridgeFitter`, one `fit` gives every rank (no bias, as Eq. 13).
          holdout=0, because the last tenth of the rollouts is kept away from all arms.
paper     PCA of at most 16,384 teacher rows (Eq. 12); then, for every rank, 20 epochs of AdamW on Eq. 13 that
          run both models again in every epoch.
cached    the same training on states that one forward put in memory, the projected teacher states too.
joint     the paper's training of all ranks side by side, sharing the forwards.
default   `exact` with the fitter's own defaults: a tenth held out, both forms measured, curves for a report.

Learning rate and β₂ (cosine decay) are chosen per rank by the error on the very held-out rollouts that are
reported, which favours the baselines; tuning is not timed. AdamW treats every row of P_S alone and PCA bases
nest, so one run at the highest rank tunes all ranks. `lstsq` is the exact solution for the baselines' PCA,
which has seen fewer rows than that of `exact`, so that their targets differ a little. The training of every
rank is timed next to runs of the other arms; times are medians over these, summed over ranks.
"""

import argparse
import csv
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from oprd.bridge import Bridge, BridgeFitter
from oprd.bridge.pair import FitSettings
from oprd.models.capture import num_layers
from oprd.models.forward import ModelInput, StateRequest, read_states
from oprd.models.loading import load_model, load_tokenizer
from oprd.objective.selection import LayerMap
from oprd.rollouts.generation import Sampling, generate, left_pad
from oprd.rollouts.prompts import load_prompts
from oprd.text.alignment import same_vocabulary
from oprd.text.rendering import Renderer

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
BETAS = (0.95, 0.999)
PCA_ROWS = 16_384
Batch = tuple[ModelInput, Tensor]  # what both models read, and which response rows are kept
States = tuple[dict[int, Tensor], dict[int, Tensor]]  # the student's and the teacher's rows by layer


@dataclass
class Pair:
    """Two models of one vocabulary and the layers that are paired (Eq. 11)."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    layer_map: LayerMap

    @torch.no_grad()
    def read(self, batch: Batch) -> States:
        """One forward of both models."""
        model_input, mask = batch
        (student,) = read_states(
            self.student, model_input, [StateRequest(self.layer_map.student_layers, mask)]
        )
        return student, self.read_teacher(batch)

    @torch.no_grad()
    def read_teacher(self, batch: Batch) -> dict[int, Tensor]:
        """One forward of the teacher."""
        model_input, mask = batch
        return read_states(self.teacher, model_input, [StateRequest(self.layer_map.teacher_layers, mask)])[0]

    def stack(self, states: States) -> tuple[Tensor, Tensor]:
        """Student and teacher rows of all pairs of layers, [L, N, D] each."""
        student, teacher = states
        pairs = self.layer_map.pairs
        return torch.stack([student[s] for s, _ in pairs]), self.stack_teacher(teacher)

    def stack_teacher(self, teacher: dict[int, Tensor]) -> Tensor:
        """Teacher rows of all pairs of layers, [L, N, D]."""
        return torch.stack([teacher[t] for _, t in self.layer_map.pairs])


@dataclass
class Basis:
    """The teacher's mean and principal directions (Eq. 12) of every pair of layers."""

    mean: Tensor
    directions: Tensor

    @classmethod
    def of(cls, teacher: Tensor) -> "Basis":
        """PCA of the first `PCA_ROWS` rows of [L, N, D]; the prompts are shuffled."""
        rows = teacher[:, :PCA_ROWS].double()
        mean = rows.mean(1, keepdim=True)
        vectors = torch.linalg.eigh((rows - mean).mT @ (rows - mean)).eigenvectors
        return cls(mean.to(teacher), vectors.flip(-1).to(teacher))

    def project(self, teacher: Tensor, rank: int) -> Tensor:
        """P_T(h_T − μ_T), [L, N, rank]."""
        return (teacher - self.mean) @ self.directions[..., :rank]


def load(
    student: str, teacher: str, dataset: str, rollouts: int, length: int, batch: int, seed: int
) -> tuple[Pair, list[Batch], list[Batch]]:
    """The pair, batches to fit on and batches of the last tenth of the rollouts, held out from all arms."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = student, teacher
    tokenizer, other = map(load_tokenizer, names)
    if not same_vocabulary(tokenizer, other):
        raise SystemExit("this benchmark reads one text of token ids: give models of one vocabulary")
    models = [load_model(name, dtype=torch.float32).to(device).eval().requires_grad_(False) for name in names]
    pair = Pair(*models, LayerMap.parse("all", *map(num_layers, models)))
    prompts = load_prompts(dataset).shuffle(seed=seed)["prompt"][:rollouts]
    ids = Renderer(tokenizer)(prompts)
    sampling = Sampling(length, temperature=1.0, top_p=1.0)
    samples = [
        rollout
        for start in range(0, len(ids), 64)
        for rollout in generate(models[0], tokenizer, ids[start : start + 64], sampling, seed + start)
    ]

    def batches(chosen: Sequence) -> list[Batch]:
        made = []
        for start in range(0, len(chosen), batch):
            part = chosen[start : start + batch]
            responses = [torch.tensor(rollout.response_ids) for rollout in part]
            completion = pad_sequence(responses, batch_first=True)
            mask = pad_sequence([torch.ones_like(response) for response in responses], batch_first=True)
            prompt = left_pad([rollout.prompt_ids for rollout in part], 0)
            made.append((ModelInput.of(*prompt, completion, mask).to(device), mask.bool().to(device)))
        return made

    kept = len(samples) - max(1, len(samples) // 10)
    return pair, batches(samples[:kept]), batches(samples[kept:])


def exact(
    pair: Pair, states: Iterable[States], rank: int, affine: bool | None = False, holdout: float = 0.0
) -> tuple[Bridge, BridgeFitter]:
    """Our fit: stream states through the fitter, solve once (held out are rows here, not rollouts)."""
    fitter = BridgeFitter(pair.layer_map, holdout=holdout, affine=affine, max_rank=rank)
    for student, teacher in states:
        fitter.update(student, teacher)
    return fitter.fit(rank), fitter


def adamw(
    source: Callable[[int], tuple[Tensor, Tensor]],
    num_batches: int,
    ranks: dict[int, tuple[float, float]],
    start: Tensor,
    epochs: int,
    seed: int,
) -> dict[int, Tensor]:
    """Eq. 13 by AdamW for some ranks at once, each with its rate and β₂: P_S by rank, as [L, D, r].

    `source` gives a batch's student rows and projected teacher rows; `start` is P_S at the highest rank.
    """
    matrices = {rank: start[..., :rank].clone().requires_grad_() for rank in ranks}
    groups = [
        {"params": [matrices[rank]], "lr": rate, "betas": (0.9, beta)} for rank, (rate, beta) in ranks.items()
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * num_batches)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(num_batches, generator=generator).tolist():
            student, wanted = source(index)
            for rank, matrix in matrices.items():
                (student @ matrix - wanted[..., :rank]).square().sum(-1).mean(1).sum().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return {rank: matrix.detach() for rank, matrix in matrices.items()}


def paper_basis(pair: Pair, batches: Sequence[Batch]) -> Basis:
    """The PCA of the paper's arm: the teacher reads until there are enough rows."""
    rows: list[Tensor] = []
    for batch in batches:
        if sum(part.shape[1] for part in rows) >= PCA_ROWS:
            break
        rows.append(pair.stack_teacher(pair.read_teacher(batch)))
    return Basis.of(torch.cat(rows, 1))


def cache(pair: Pair, batches: Sequence[Batch], rank: int) -> tuple[list[tuple[Tensor, Tensor]], Basis]:
    """What the cached arm keeps of its one forward: student rows, projected teacher rows, the PCA."""
    states = [pair.stack(pair.read(batch)) for batch in batches]
    basis = Basis.of(torch.cat([teacher for _, teacher in states], 1))
    return [(student, basis.project(teacher, rank)) for student, teacher in states], basis


def error(predicted: Tensor, wanted: Tensor) -> float:
    """Held-out MSE: ‖·‖²/r, mean over rows, then over layers."""
    return float((predicted - wanted).double().square().mean())


def bridge_error(pair: Pair, bridge: Bridge, student: Tensor, teacher: Tensor) -> float:
    """Held-out MSE of a bridge."""
    layers = pair.layer_map.student_layers
    predicted = [bridge.student(x, layer) for x, layer in zip(student, layers, strict=True)]
    wanted = [bridge.teacher(x, layer) for x, layer in zip(teacher, layers, strict=True)]
    return error(torch.stack(predicted), torch.stack(wanted))


def run(
    student: str = "tiny:student",
    teacher: str = "tiny:bridge-teacher",
    dataset: str = "tiny",
    rollouts: int = 512,
    max_completion_length: int = 64,
    batch_size: int = 16,
    epochs: int = 20,
    ranks: Sequence[int] = RANKS,
    repeats: int = 1,
    seed: int = 42,
) -> list[dict[str, Any]]:
    """Tune, time and measure all arms; one record per arm and rank, with the seconds of the whole arm."""
    pair, batches, held_out = load(
        student, teacher, dataset, rollouts, max_completion_length, batch_size, seed
    )
    states = [pair.read(batch) for batch in batches]
    stacked = [pair.stack(part) for part in states]
    test_student, test_teacher = (
        torch.cat(part, 1) for part in zip(*(pair.stack(pair.read(batch)) for batch in held_out), strict=True)
    )
    depth, _, width = test_student.shape
    ranks = [rank for rank in ranks if rank <= min(width, test_teacher.shape[-1])]
    most, count = max(ranks), len(batches)
    cached, basis = cache(pair, batches, most)
    generator = torch.Generator().manual_seed(seed)
    start = (2 * torch.rand(depth, width, most, generator=generator) - 1) / width**0.5  # as nn.Linear does
    start = start.to(test_student)
    test_wanted = basis.project(test_teacher, most)

    tuned: dict[int, tuple[float, tuple[float, float]]] = {}
    for setting in itertools.product(RATES, BETAS):
        matrix = adamw(cached.__getitem__, count, {most: setting}, start, epochs, seed)[most]
        errors = {r: error(test_student @ matrix[..., :r], test_wanted[..., :r]) for r in ranks}
        values = " ".join(f"{value:.5f}" for value in errors.values())
        print(f"tuning: lr {setting[0]:<5} β₂ {setting[1]:<6} {values}", flush=True)
        for rank, value in errors.items():
            tuned[rank] = min(tuned.get(rank, (value, setting)), (value, setting))
    chosen = {rank: setting for rank, (_, setting) in tuned.items()}

    seconds: dict[Any, list[float]] = defaultdict(list)

    def timed(key: Any, action: Callable[..., Any], *args: Any) -> Any:
        begin = _now()
        result = action(*args)
        seconds[key].append(_now() - begin)
        return result

    def read_again(basis: Basis, rank: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        def source(index: int) -> tuple[Tensor, Tensor]:
            rows, wanted = pair.stack(pair.read(batches[index]))
            return rows, basis.project(wanted, rank)

        return source

    paper, from_cache, together = {}, {}, {}
    for _ in range(repeats):
        for rank in ranks:
            one, rest = {rank: chosen[rank]}, (start, epochs, seed)
            bridge, fitter = timed("exact", exact, pair, map(pair.read, batches), most)
            timed("default", exact, pair, map(pair.read, batches), most, None, 0.1)
            timed("fitter", exact, pair, states, most)
            cached, _ = timed("cache", cache, pair, batches, most)
            from_cache |= timed(("cached", rank), adamw, cached.__getitem__, count, one, *rest)
            basis = timed("basis", paper_basis, pair, batches)
            paper |= timed(("paper", rank), adamw, read_again(basis, rank), count, one, *rest)
            last = {key if isinstance(key, str) else key[0]: times[-1] for key, times in seconds.items()}
            print(f"rank {rank:3d}:", *(f"{key} {value:.2f} s" for key, value in last.items()), flush=True)
        together = timed("joint", adamw, read_again(basis, most), count, chosen, start, epochs, seed)

    median = {key: statistics.median(values) for key, values in seconds.items()}
    total = {
        "exact": median["exact"],
        "default": median["default"],
        "cached": median["cache"] + sum(median["cached", rank] for rank in ranks),
        "joint": median["basis"] + median["joint"],
        "paper": median["basis"] + sum(median["paper", rank] for rank in ranks),
    }
    train_student, train_teacher = (torch.cat(part, 1) for part in zip(*stacked, strict=True))
    reference = torch.linalg.lstsq(
        train_student.double(), basis.project(train_teacher, most).double()
    ).solution.to(start)
    affine = fitter.fit(most, FitSettings(affine=True, max_rank=most))
    matrices = {"lstsq": {most: reference}, "cached": from_cache, "joint": together, "paper": paper}
    common = {
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "student": student,
        "teacher": teacher,
        "rollouts": rollouts,
        "rows": train_student.shape[1],
        "held_out_rows": test_student.shape[1],
        "epochs": epochs,
        "batch_size": batch_size,
        "repeats": repeats,
    }
    records = []
    for rank in ranks:
        for arm, fitted in (("exact", bridge), ("exact, affine", affine)):
            mse = bridge_error(pair, fitted.first(rank), test_student, test_teacher)
            records.append({"arm": arm, "rank": rank, "held_out_mse": mse, "seconds": total["exact"]})
        for arm, by_rank in matrices.items():
            matrix = by_rank.get(rank, by_rank.get(most))[..., :rank]
            mse = error(test_student @ matrix, test_wanted[..., :rank])
            record = {"arm": arm, "rank": rank, "held_out_mse": mse, "seconds": total.get(arm)}
            if arm != "lstsq":
                record |= {"learning_rate": chosen[rank][0], "beta2": chosen[rank][1]}
            records.append(record)
    print(_summary(records, ranks, total, median))
    return [record | common for record in records]


def _summary(
    records: list[dict[str, Any]], ranks: Sequence[int], total: dict[str, float], median: dict[Any, float]
) -> str:
    """The held-out table, the times and the ratios."""
    mse = {(record["arm"], record["rank"]): record["held_out_mse"] for record in records}
    arms = list(dict.fromkeys(arm for arm, _ in mse))
    lines = ["", f"| rank | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    lines += [f"| {rank} | {' | '.join(f'{mse[arm, rank]:.5f}' for arm in arms)} |" for rank in ranks]
    lines += ["", *(f"{arm:8s} {seconds:8.2f} s" for arm, seconds in total.items()), ""]
    for arm in ("paper", "joint", "cached", "default"):
        lines.append(f"{arm} / exact: {total[arm] / total['exact']:.1f}x")
    most = max(ranks)
    for arm, first in (("paper", "basis"), ("cached", "cache")):  # one run sliced, or a rank that is known
        ratio = (median[first] + median[arm, most]) / total["exact"]
        lines.append(f"{arm}, rank {most} only / exact: {ratio:.1f}x")
    sgd = sum(median["cached", rank] for rank in ranks)
    lines.append(f"on cached states alone, SGD / fitter: {sgd / median['fitter']:.1f}x")
    lines.append(f"of exact, the fitter takes {median['fitter']:.2f} s, the forwards the rest")
    return "\n".join(lines)


def hardware() -> str:
    """The name of the GPU, or of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else 'unknown CPU'}, {torch.backends.cpu.get_cpu_capability()}"


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--student", default="tiny:student")
    parser.add_argument("--teacher", default="tiny:bridge-teacher", help="of the student's vocabulary")
    parser.add_argument("--dataset", default="tiny")
    parser.add_argument("--rollouts", type=int, default=512)
    parser.add_argument("--max-completion-length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16, help="rollouts per batch, in all arms")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="those up to the width count")
    parser.add_argument("--repeats", type=int, default=1, help="of everything that is timed")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="CSV file")
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    torch.set_num_threads(arguments.pop("threads"))
    results = run(**arguments)
    if output:
        with output.open("w", newline="") as file:
            fields = list(dict.fromkeys(key for record in results for key in record))
            writer = csv.DictWriter(file, fields, lineterminator="\n")
            writer.writeheader()
            writer.writerows(results)
