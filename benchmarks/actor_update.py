"""What does one actor update cost beside its limit, the two backbones alone?

    python benchmarks/actor_update.py --preset cpu                    # all arms, results/actor_update-cpu.csv
    python benchmarks/actor_update.py --preset cpu --sweep length     # over T; --sweep vocabulary: over |V|

An update is teacher forward, student forward and backward on one batch of rollouts, the same random weights
and tokens for all arms, gradient checkpointing on; the optimiser, the same for all, is left out. Seconds are
wall time; memory is torch's allocations at most, gradients included, over those before the update (CUDA: the
allocator's peak; CPU: the profiler's events in an update of its own, which is the warm-up too: what is
resident there lies by the habits of malloc). What has no room here is left out. Arms:

bare               both backbones and a scalar of the student's last state: the limit
oprd, oprd_last    ours, all layers or the last one, the last k rows
oprd_bridge        ours, all layers through a bridge of rank 8
sampled_token, top_16, full_vocab                    our chunked output losses, all rows
sampled_token_whole, top_16_whole, full_vocab_whole  by autograd on whole logits, as the paper compares
authors            as the authors' release: heads run, their logits and every layer, in float32 and at full
                   length, live until the loss of k rows is there
trl                the loss of trl.DistillationTrainer (reverse KL) as installed
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from harness import (
    Row,
    hardware,
    of_arm,
    paired_ratio,
    peak_mb,
    run_in_turn,
    serve,
    watched_memory,
    write,
)
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from oprd.batch import Batch, weigh_rows
from oprd.bridge.artifact import Bridge, Projector
from oprd.capture import backbone
from oprd.comparison import Comparison
from oprd.meters import MemoryMeter
from oprd.settings import ObjectiveSettings
from oprd.teacher import Teacher
from oprd.update import Update

HERE = Path(__file__).parent
PROMPT = 16


@dataclass(frozen=True)
class Shape:
    """The size of the models and of one micro-batch."""

    layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tokens: int
    last: int
    rollouts: int = 1


PRESETS = {
    "quick": Shape(6, 256, 768, 4, 2, 100_000, 512, 128),
    "cpu": Shape(12, 384, 1024, 6, 2, 151_936, 2048, 512),
    "qwen2.5-1.5b": Shape(28, 1536, 8960, 12, 2, 151_936, 16_384, 2000),
}
OURS: dict[str, dict[str, Any]] = {
    "oprd": {"layers": "all"},
    "oprd_last": {"layers": "last"},
    "oprd_bridge": {"layers": "all", "representation_loss": "normalized_mse"},
    "sampled_token": {"representation_weight": "0", "output_loss": "sampled_token"},
    "top_16": {"representation_weight": "0", "output_loss": "top_k"},
    "full_vocab": {"representation_weight": "0", "output_loss": "full_vocab"},
}


def _log_probs(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return student.float().log_softmax(-1), teacher.float().log_softmax(-1)


def sampled_token_whole(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """Eq. 3 and 19, written out."""
    log_p, log_q = (x.gather(-1, tokens[:, None]) for x in _log_probs(student, teacher))
    advantage = (log_p - log_q).detach()
    return advantage + advantage * (log_p - log_p.detach())


def top_16_whole(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """Eq. 5, written out."""
    log_p, log_q = _log_probs(student, teacher)
    support = log_p.topk(16, dim=-1).indices
    log_p, log_q = (x.gather(-1, support).log_softmax(-1) for x in (log_p, log_q))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def full_vocab_whole(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """Eq. 4, written out."""
    log_p, log_q = _log_probs(student, teacher)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


# Float32 copies of [rows, |V|] that are alive at once, as measured on a CPU.
COPIES = {"sampled_token_whole": 4.1, "top_16_whole": 4.1, "full_vocab_whole": 7.1, "authors": 2.1}
WHOLE = {loss.__name__: loss for loss in (sampled_token_whole, top_16_whole, full_vocab_whole)}
ARMS = ("bare", *OURS, *WHOLE, "authors", "trl")
# What `make bench-quick` holds the ratios of one run to: arm, what it is divided by, measure, least, most.
CHECKS = (
    ("oprd", "bare", "seconds", 0.0, 1.10),
    ("oprd", "bare", "transient_mb", 0.0, 1.15),
    ("oprd_bridge", "oprd", "seconds", 0.0, 1.10),
    ("top_16_whole", "oprd", "seconds", 2.5, 1e9),
    ("top_16_whole", "oprd", "transient_mb", 5.0, 1e9),
    ("full_vocab", "oprd", "seconds", 1.5, 1e9),
    ("full_vocab", "oprd", "transient_mb", 2.0, 1e9),
    ("full_vocab", "trl", "seconds", 0.0, 1.05),
    ("full_vocab", "trl", "transient_mb", 0.0, 1.05),
)
LONG = 8192  # response tokens from which an update takes minutes on a CPU: one round
SWEEPS = {
    "length": ("tokens", (512, 1024, 2048, 4096, 8192, 16_384, 32_768)),
    "vocabulary": ("vocabulary", (32_000, 64_000, 151_936, 256_000)),
}


def make_model(shape: Shape, seed: int, device: torch.device, shared: Path | None = None) -> PreTrainedModel:
    """Random weights; those of one seed are mapped from a file in `shared`, so that arms hold them once."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=PROMPT + shape.tokens,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    if shared is not None:
        file = shared / f"{seed}.pt"
        if not file.exists():
            torch.save(model.state_dict(), file)
        model.load_state_dict(torch.load(file, mmap=True), assign=True)
    return model.to(device)


def make_inputs(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name, length in (("prompt", PROMPT), ("completion", shape.tokens)):
        ids = torch.randint(shape.vocabulary, (shape.rollouts, length), generator=generator)
        inputs |= {f"{name}_ids": ids.to(device), f"{name}_mask": torch.ones_like(ids)}
    return inputs


def make_batch(shape: Shape, settings: ObjectiveSettings, device: torch.device) -> Batch:
    inputs = make_inputs(shape, device)
    truncated = torch.zeros(shape.rollouts, dtype=torch.bool)
    return Batch.of(inputs | weigh_rows(inputs, truncated, settings, lambda units: units))


class Arm:
    """One way to do an update."""

    def __init__(self, name: str, shape: Shape, shared: Path | None = None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.name, self.shape = name, shape
        self.student, teacher = (make_model(shape, seed, self.device, shared) for seed in (0, 1))
        self.student.train().gradient_checkpointing_enable({"use_reentrant": False})
        self.teacher = Teacher(teacher)
        settings = ObjectiveSettings(positions=f"last={shape.last}", **OURS.get(name, {}))
        settings.check()
        self.loss: Callable[[], Tensor] = getattr(self, f"_{name}", self._ours)
        if name in OURS:
            self.move(self.device)
            self.update = Update.bind(settings, self.student, None, self.teacher, self.device)  # type: ignore[arg-type]
            if name == "oprd_bridge":
                bridge = self._bridge()
                self.update = replace(self.update, comparison=Comparison(bridge.layer_map, bridge))
        if name in WHOLE:
            self.loss = self._whole
        self.batch = make_batch(shape, settings, self.device)
        self._leave_device()
        if self.device.type == "cpu":
            with watched_memory() as watched:
                self.loss().backward()
            self.transient_mb = peak_mb(watched)
            self._end_step()

    def measure(self) -> dict[str, float]:
        """Seconds and transient megabytes of one update."""
        self.move(self.device)
        memory = MemoryMeter(self.device)
        self._wait()
        memory.start()
        start = time.perf_counter()
        self.loss().backward()
        self._wait()
        seconds = time.perf_counter() - start
        if self.device.type == "cuda":
            self.transient_mb = memory.read()["memory/transient_mb"]
        self._end_step()
        return {"seconds": seconds, "transient_mb": self.transient_mb}

    def move(self, device: torch.device) -> None:
        self.student.to(device)
        self.teacher.model.to(device)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _end_step(self) -> None:
        if self.name in OURS:  # what a training step does once, after its last micro-batch
            self.update.averages.pop(lambda values: values)
            self.update.stopwatch.pop()
            self.update.watch.check()
        self.student.zero_grad(set_to_none=True)
        self._leave_device()

    def _leave_device(self) -> None:
        """Leave an accelerator to the other arms."""
        if self.device.type == "cuda":
            self.move(torch.device("cpu"))
            torch.cuda.empty_cache()

    def _states(self, model: PreTrainedModel) -> Tensor:
        reading = self.batch.student
        output = backbone(model)(
            input_ids=reading.input_ids, attention_mask=reading.attention_mask, use_cache=False
        )
        return output.last_hidden_state

    def _bare(self) -> Tensor:
        with torch.no_grad():
            self._states(self.teacher.model)
        return self._states(self.student)[..., 0].sum()

    def _ours(self) -> Tensor:
        return self.update.loss(self.batch, step=0)

    def _bridge(self) -> Bridge:
        generator = torch.Generator().manual_seed(0)
        width, rank = self.shape.width, 8

        def projector(layer: int) -> Projector:
            student, teacher = (torch.randn(rank, width, generator=generator) / width**0.5 for _ in "st")
            return Projector(layer, student, torch.zeros(rank), teacher, torch.zeros(width))

        return Bridge({layer: projector(layer) for layer in range(1, self.shape.layers + 1)}).to(self.device)

    def _whole(self) -> Tensor:
        reading, rows = self.batch.student, slice(PROMPT - 1, None)
        with torch.no_grad():
            teacher = self.teacher.model(input_ids=reading.input_ids, use_cache=False).logits[:, rows]
        student = self.student(input_ids=reading.input_ids, use_cache=False).logits[:, rows]
        tokens = self.batch.tokens.flatten()
        return WHOLE[self.name](student.flatten(0, 1), teacher.flatten(0, 1), tokens).mean()

    def _authors(self) -> Tensor:
        reading = self.batch.student
        keys = {"input_ids": reading.input_ids, "use_cache": False, "output_hidden_states": True}
        with torch.no_grad():
            teacher_output = self.teacher.model(**keys)
        student_output = self.student(**keys)
        teacher = [state.float() for state in teacher_output.hidden_states[1:]]
        student = [state.float() for state in student_output.hidden_states[1:]]
        mask = reading.rows(self.batch.representation_weights > 0).to(self.device)
        return torch.stack(
            [(s[mask] - t[mask]).square().mean(-1).mean() for s, t in zip(student, teacher, strict=True)]
        ).mean()

    def _trl(self) -> Tensor:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        rows = slice(PROMPT - 1, None)
        with torch.no_grad():
            teacher = self._states(self.teacher.model)[:, rows]
        student = self._states(self.student)[:, rows]
        heads = self.student.lm_head.weight, self.teacher.model.lm_head.weight
        mask = torch.ones(student.shape[:2], device=self.device)
        return _chunked_divergence_loss(student, teacher, *heads, mask, beta=1.0)[0]


def fits(arm: str, shape: Shape) -> bool:
    """Whether an arm's whole logits have room on this machine."""
    needed = COPIES.get(arm, 0) * 4 * shape.rollouts * shape.tokens * shape.vocabulary
    if torch.cuda.is_available():  # where bfloat16 logits stand beside their float32 copies
        return 1.5 * needed < 0.8 * torch.cuda.get_device_properties(0).total_memory
    return needed < 0.6 * psutil.virtual_memory().available


def measure(preset: str, shape: Shape, arms: Sequence[str], repeats: int) -> list[Row]:
    arguments = ["--preset", preset]
    for name in ("tokens", "vocabulary", "rollouts", "last"):
        arguments += [f"--{name}", str(getattr(shape, name))]
    kept = [arm for arm in arms if fits(arm, shape)]
    on_cuda = torch.cuda.is_available()
    repeats = 1 if shape.tokens >= LONG and not on_cuda else repeats
    about = {"preset": preset, "tokens": shape.tokens, "last": shape.last, "vocabulary": shape.vocabulary}
    about |= {"rollouts": shape.rollouts}
    with tempfile.TemporaryDirectory() as shared:
        arguments += ["--shared", shared]
        rows = run_in_turn(__file__, kept, arguments, repeats, warm_up=on_cuda)
    return [about | row | hardware() for row in rows]


def print_table(rows: Sequence[Row]) -> None:
    """Medians, and what an arm costs in units of ours."""
    print(
        "| arm | seconds | ÷ bare | ÷ oprd | transient MB | ÷ bare | ÷ oprd |\n|---|---|---|---|---|---|---|"
    )
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = [arm]
        for key, digits in (("seconds", 2), ("transient_mb", 0)):
            values = of_arm(rows, arm, key)
            cells.append(f"{statistics.median(values):.{digits}f}")
            for base in ("bare", "oprd"):
                below = of_arm(rows, base, key)
                cells.append(
                    "" if not below else "{:.3g} ({:.3g}–{:.3g})".format(*paired_ratio(values, below))
                )
        print("| " + " | ".join(cells) + " |")


def check(rows: Sequence[Row]) -> list[str]:
    """The ratios that left their bounds with their whole interval."""
    broken = []
    for arm, base, key, least, most in CHECKS:
        middle, low, high = paired_ratio(of_arm(rows, arm, key), of_arm(rows, base, key))
        verdict = "ok" if high >= least and low <= most else "BROKEN"
        ratio = f"{middle:.3g} ({low:.3g}–{high:.3g})"
        print(f"{verdict}: {key} of {arm} ÷ {base} = {ratio}, bounds {least:g}–{most:g}")
        broken += [] if verdict == "ok" else [f"{key} of {arm} ÷ {base}"]
    return broken


def plot(rows: Sequence[Row], over: str, path: Path) -> None:
    """Seconds and memory over a swept size, one line per arm."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    labels = {"tokens": "response tokens T", "vocabulary": "vocabulary |V|"}
    for axes, key, label in zip(
        panels, ("seconds", "transient_mb"), ("seconds", "transient MB"), strict=True
    ):
        for arm in dict.fromkeys(row["arm"] for row in rows):
            sizes = sorted({row[over] for row in rows if row["arm"] == arm and key in row})
            medians = [
                statistics.median(of_arm([row for row in rows if row[over] == size], arm, key))
                for size in sizes
            ]
            axes.plot(sizes, medians, marker="o", markersize=3, label=arm if key == "seconds" else None)
        axes.set(xscale="log", yscale="log", xlabel=labels[over], ylabel=label)
        swept = sorted({row[over] for row in rows})
        axes.set_xticks(swept, [f"{size:,}" for size in swept], minor=False)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sweep", choices=SWEEPS)
    parser.add_argument("--sizes", type=int, nargs="+", help="of the sweep")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--check", action="store_true", help="exit 1 if a ratio leaves its bounds")
    parser.add_argument("--shared", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=ARMS, help=argparse.SUPPRESS)
    for name in ("tokens", "vocabulary", "rollouts", "last"):
        parser.add_argument(f"--{name}", type=int)
    given = parser.parse_args()
    sizes = {n: getattr(given, n) for n in ("tokens", "vocabulary", "rollouts", "last") if getattr(given, n)}
    shape = replace(PRESETS[given.preset], **sizes)
    if given.worker:
        serve(Arm(given.worker, shape, given.shared).measure)
        return
    output = (
        given.output
        or HERE / "results" / f"actor_update-{given.preset}{'-' * bool(given.sweep)}{given.sweep or ''}.csv"
    )
    if not given.sweep:
        rows = measure(given.preset, shape, given.arms, given.repeats)
        write(output, rows)
        print_table(rows)
        if given.check and check(rows):
            raise SystemExit(1)
        return
    over, swept = SWEEPS[given.sweep]
    rows = []
    for size in given.sizes or swept:
        rows += measure(given.preset, replace(shape, **{over: size}), given.arms, given.repeats)
        write(output, rows)
    plot(rows, over, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
