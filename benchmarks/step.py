"""What does a whole training step cost, rollouts excluded, beside TRL's?

    python benchmarks/step.py --preset 100m   # 100 M parameters, |V| = 151,936: results/step-100m.csv
    python benchmarks/step.py --preset tiny   # the bundled pair

Both trainers run their own loop, from batching to optimiser and log, on the same rollouts and models. Seconds
are wall time. Memory is what torch holds on a CPU at most, over what it held before the step; it is not the
first one, so that the optimiser's state is there.
oprd        OPRDTrainer, all layers, last k rows
full_vocab  OPRDTrainer with TRL's objective, the exact reverse KL of all rows
trl         trl.DistillationTrainer, the exact reverse KL of all rows
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from datasets import Dataset
from harness import hardware, of_arm, paired_ratio, peak_mb, run_in_turn, serve, watched_memory, write
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from oprd import OPRDConfig, OPRDTrainer
from oprd.models.loading import load_model, load_tokenizer

HERE = Path(__file__).parent
ARMS = ("oprd", "full_vocab", "trl")
WATCHED = 2  # the step whose memory is looked at; with the first one it warms up for those that are timed
SHARED: dict[str, Any] = {
    "max_steps": 10_000,
    "learning_rate": 1e-6,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "logging_steps": 1,
}


@dataclass(frozen=True)
class Preset:
    """Rollouts per step in micro-batches, their length, and how many rows OPRD supervises."""

    rollouts: int
    micro_batch: int
    tokens: int
    last: int


PRESETS = {"tiny": Preset(32, 32, 41, 41), "100m": Preset(4, 2, 512, 128)}


def make_models(preset: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    if preset == "tiny":
        student, teacher = (load_model(f"tiny:{m}", dtype="float32") for m in ("student", "teacher"))
        return student, teacher
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=151_936,
            hidden_size=448,
            intermediate_size=1344,
            num_hidden_layers=12,
            num_attention_heads=7,
            num_key_value_heads=7,
            tie_word_embeddings=True,
        )
        models.append(Qwen2ForCausalLM(config))
    return models[0], models[1]


class Pause(TrainerCallback):
    """Stops after every step until the next is asked for, and reports its cost without its rollouts.

    The second step, whose memory is watched, takes longer for it.
    """

    def __init__(self) -> None:
        self.ask: Queue[None] = Queue()
        self.tell: Queue[dict[str, float]] = Queue()
        self.rollout_seconds = 0.0
        self._steps, self._watched = 0, watched_memory()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.ask.get()
        self._steps += 1
        if self._steps == WATCHED:
            self._watched.start()
        self._start, self.rollout_seconds = time.perf_counter(), 0.0

    def on_log(self, *_: Any, **__: Any) -> None:  # the last thing of a step
        if self._steps:
            took = {"seconds": time.perf_counter() - self._start - self.rollout_seconds}
            if self._steps == WATCHED:
                self._watched.stop()
                took["transient_mb"] = peak_mb(self._watched)
            self.tell.put(took)


def make_trainer(arm: str, preset: Preset, name: str, pause: Pause) -> Any:
    student, teacher = make_models(name)
    shape: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": preset.micro_batch,
        "gradient_accumulation_steps": preset.rollouts // preset.micro_batch,
        "max_completion_length": preset.tokens,
        "gradient_checkpointing": name != "tiny",
    }
    data = Dataset.from_dict({"prompt": [f"Compute {i}+{i}." for i in range(512)]})
    keys = {
        "train_dataset": data,
        "processing_class": load_tokenizer("tiny:student"),
        "callbacks": [pause],
    }
    if arm == "trl":
        config = DistillationConfig(beta=1.0, **SHARED, **shape)
        trainer = DistillationTrainer(model=student, teacher_model=teacher, args=config, **keys)
    else:
        loss = {} if arm == "oprd" else {"representation_weight": "0", "output_loss": "full_vocab"}
        config = OPRDConfig(positions=f"last={preset.last}", num_generations=1, **loss, **SHARED, **shape)
        trainer = OPRDTrainer(model=student, teacher_model=teacher, args=config, **keys)
    give_rollouts(trainer, preset, pause)
    return trainer


def give_rollouts(trainer: Any, preset: Preset, pause: Pause) -> None:
    """Completions of one length in place of sampled ones, and the time that making a batch of them takes."""
    generator, generate = torch.Generator().manual_seed(0), trainer._generate_and_score_completions
    ids = torch.randint(10, 200, (preset.rollouts, preset.tokens), generator=generator).tolist()
    trainer._generate_single_turn = lambda prompts, *_, **__: ids[: len(prompts)]

    def timed(inputs: Any) -> Any:
        start = time.perf_counter()
        batch = generate(inputs)
        pause.rollout_seconds += time.perf_counter() - start
        return batch

    trainer._generate_and_score_completions = timed


def work(arm: str, name: str) -> None:
    pause = Pause()
    trainer = make_trainer(arm, PRESETS[name], name, pause)

    def train() -> None:
        try:
            trainer.train()
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    threading.Thread(target=train, daemon=True).start()

    def step() -> dict[str, float]:
        pause.ask.put(None)
        return pause.tell.get()

    memory: dict[str, float] = {}

    def measure() -> dict[str, float]:
        if not memory:
            memory["transient_mb"] = [step() for _ in range(WATCHED)][-1]["transient_mb"]
        return step() | memory

    serve(measure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="100m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", choices=ARMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker, given.preset)
        return
    rows = run_in_turn(__file__, ARMS, ["--preset", given.preset], given.repeats, warm_up=False)
    rows = [{"preset": given.preset} | row | hardware() for row in rows]
    write(given.output or HERE / "results" / f"step-{given.preset}.csv", rows)
    print("| arm | seconds a step | ÷ oprd | transient MB | ÷ oprd |\n|---|---|---|---|---|")
    for arm in ARMS:
        cells = [arm]
        for key, digits in (("seconds", 3), ("transient_mb", 0)):
            values = of_arm(rows, arm, key)
            cells.append(f"{statistics.median(values):,.{digits}f}")
            cells.append("{:.3g} ({:.3g}–{:.3g})".format(*paired_ratio(values, of_arm(rows, "oprd", key))))
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
