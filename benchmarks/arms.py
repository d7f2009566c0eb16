"""The ways to do one actor update that benchmarks/actor_update.py compares, and what they hold in memory.

bare               both backbones and a scalar of the student's last state: the limit
oprd, oprd_last    ours, all layers or the last one
oprd_kept          as oprd; checkpointed blocks keep what attention returns (keep_attention: true)
oprd_bridge        ours, all layers through a bridge of rank 8
sampled_token, top_16, full_vocab                    our chunked output losses
sampled_token_whole, top_16_whole, full_vocab_whole  by autograd on whole logits, as the paper compares
authors            as the authors' release: heads run, their logits and every layer, in float32 and at full
                   length, live until the loss of k rows is there
trl                the loss of trl.DistillationTrainer (reverse KL) as installed

Rows: `paper`, representation losses on the last k rows and output losses on all; `last` and `all`, every loss
on the same rows. An output loss on the last k rows projects these alone, whoever wrote it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from harness import peak_mb, watched_memory
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2Config

from oprd.bridge.artifact import Bridge, Projector
from oprd.foundation.meters import MB, MemoryMeter
from oprd.models.capture import backbone
from oprd.models.loading import load_model
from oprd.models.teacher import Teacher
from oprd.objective.settings import ObjectiveSettings
from oprd.preflight.planning.footprint import Footprint
from oprd.preflight.planning.rehearsal import hold_references
from oprd.rollouts.rows import RolloutBatch, weigh_rows
from oprd.training.comparison import Comparison
from oprd.training.step import Update
from oprd.training.training_pair import TrainingPair

CPU = torch.device("cpu")
PROMPT = 16
LONG = 8192  # response tokens from which an update takes minutes on a CPU


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
    dtype: torch.dtype = torch.float32  # on a CPU; on CUDA it is bfloat16
    rows: str = "paper"
    model: str = ""  # a folder or a Hub name: its weights in place of random ones, for student and teacher

    @property
    def representation_rows(self) -> int:
        """Response rows of a representation loss, from the last one back."""
        return self.tokens if self.rows == "all" else self.last

    @property
    def output_rows(self) -> int:
        """Response rows of an output loss, from the last one back."""
        return self.last if self.rows == "last" else self.tokens


def shape_of(model: str) -> Shape:
    """The shape of a real model; 4 rollouts of 256 tokens, the last 64 of them for states."""
    config = AutoConfig.from_pretrained(model)
    return Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocabulary=config.vocab_size,
        tokens=256,
        last=64,
        rollouts=4,
        model=model,
    )


ROWS = ("paper", "all", "last")
PRESETS = {
    "quick": Shape(6, 256, 768, 4, 2, 100_000, 512, 128),
    "cpu": Shape(12, 384, 1024, 6, 2, 151_936, 2048, 512),
    "qwen2.5-1.5b": Shape(28, 1536, 8960, 12, 2, 151_936, 16_384, 2000, dtype=torch.bfloat16),
}
OURS: dict[str, dict[str, Any]] = {
    "oprd": {"layers": "all"},
    "oprd_last": {"layers": "last"},
    "oprd_kept": {"layers": "all", "keep_attention": True},
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


WHOLE = {loss.__name__: loss for loss in (sampled_token_whole, top_16_whole, full_vocab_whole)}
LARGE = (*WHOLE, "authors")  # arms that may have no room
ARMS = ("bare", *OURS, *WHOLE, "authors", "trl")


def make_model(shape: Shape, seed: int, device: torch.device, shared: Path | None = None) -> PreTrainedModel:
    """Random weights, or those of the shape's model; of one seed they are mapped from a file in `shared`, so
    that arms hold them once."""
    dtype = torch.bfloat16 if device.type == "cuda" else shape.dtype
    file = shared / f"{'model' if shape.model else seed}.pt" if shared else None
    if shape.model and not (file and file.exists()) and device.type != "meta":
        model = load_model(shape.model, dtype=dtype)
    else:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_config(shape)).to(dtype)
    if file is not None:
        if not file.exists():
            torch.save(model.state_dict(), file)
        model.load_state_dict(torch.load(file, mmap=True), assign=True)
        model.tie_weights()
    return model.to(device)


def _config(shape: Shape) -> PreTrainedConfig:
    if shape.model:
        return AutoConfig.from_pretrained(shape.model)
    return Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=PROMPT + shape.tokens,
    )


def make_shapes(shape: Shape, footprint: Footprint) -> PreTrainedModel:
    """The same model as fake tensors, held by `footprint`."""
    with torch.device("meta"):
        model = make_model(shape, 0, torch.device("meta"))
    with footprint.shapes:
        model.to_empty(device=CPU)
    footprint.hold_model("weights", model)
    return model


def make_inputs(shape: Shape, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name, length in (("prompt", PROMPT), ("completion", shape.tokens)):
        ids = torch.randint(shape.vocabulary, (shape.rollouts, length), generator=generator)
        inputs |= {f"{name}_ids": ids.to(device), f"{name}_mask": torch.ones_like(ids)}
    return inputs


def make_batch(shape: Shape, settings: ObjectiveSettings, device: torch.device) -> RolloutBatch:
    inputs = make_inputs(shape, device)
    truncated = torch.zeros(shape.rollouts, dtype=torch.bool)
    return RolloutBatch.of(inputs | weigh_rows(inputs, truncated, settings, lambda units: units))


class Arm:
    """One way to do an update, on real weights or, with a `footprint`, on shapes that it counts."""

    def __init__(
        self, name: str, shape: Shape, shared: Path | None = None, footprint: Footprint | None = None
    ) -> None:
        on_cuda = torch.cuda.is_available() and footprint is None
        self.device = torch.device("cuda") if on_cuda else CPU
        self.name, self.shape = name, shape
        self.student, teacher = (
            make_shapes(shape, footprint) if footprint else make_model(shape, seed, self.device, shared)
            for seed in (0, 1)
        )
        self.student.train().gradient_checkpointing_enable({"use_reentrant": False})
        self.teacher = Teacher(teacher)
        settings = ObjectiveSettings(
            positions=f"last={shape.representation_rows}",
            output_positions=f"last={shape.output_rows}",
            **OURS.get(name, {}),
        )
        settings.check()
        self.loss: Callable[[], Tensor] = getattr(self, f"_{name}", self._ours)
        if name in OURS:
            pair = TrainingPair(self.student, None, self.teacher, self.device)  # type: ignore[arg-type]
            self.update = Update.bind(settings, pair)
            self.update.freeze_unreached()
            if name == "oprd_bridge":
                bridge = self._bridge()
                self.update = replace(self.update, comparison=Comparison(bridge.layer_map, bridge))
            if footprint is not None:
                hold_references(self.update, footprint)
        if name in WHOLE:
            self.loss = self._whole
        self.batch = make_batch(shape, settings, self.device)
        self.transient_mb: float | None = None
        self._leave_device()

    def measure(self) -> dict[str, float]:
        """Seconds and transient megabytes of one update."""
        if self.device.type == "cpu" and self.transient_mb is None:
            self.transient_mb = self._allocated_mb()
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
        assert self.transient_mb is not None
        return {"seconds": seconds, "transient_mb": self.transient_mb}

    def _allocated_mb(self) -> float:
        """What torch allocates in an update of its own, which warms up; if that is long, on shapes."""
        if self.shape.tokens >= LONG:
            return counted_mb(self.name, self.shape)
        with watched_memory() as watched:
            self.loss().backward()
        self._end_step()
        return peak_mb(watched)

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
        model_input = self.batch.student
        output = backbone(model)(
            input_ids=model_input.input_ids, attention_mask=model_input.attention_mask, use_cache=False
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
        rows = self.shape.output_rows
        keys = {"input_ids": self.batch.student.input_ids, "use_cache": False, "logits_to_keep": rows}
        with torch.no_grad():
            teacher = self.teacher.model(**keys).logits
        student = self.student(**keys).logits
        tokens = self.batch.tokens[:, -rows:].flatten()
        return WHOLE[self.name](student.flatten(0, 1), teacher.flatten(0, 1), tokens).mean()

    def _authors(self) -> Tensor:
        model_input = self.batch.student
        keys = {"input_ids": model_input.input_ids, "use_cache": False, "output_hidden_states": True}
        with torch.no_grad():
            teacher_output = self.teacher.model(**keys)
        student_output = self.student(**keys)
        teacher = [state.float() for state in teacher_output.hidden_states[1:]]
        student = [state.float() for state in student_output.hidden_states[1:]]
        rows = model_input.rows(self.batch.representation_weights > 0).to(self.device).nonzero(as_tuple=True)
        return torch.stack(
            [(s[rows] - t[rows]).square().mean(-1).mean() for s, t in zip(student, teacher, strict=True)]
        ).mean()

    def _trl(self) -> Tensor:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        rows = slice(-self.shape.output_rows, None)
        with torch.no_grad():
            teacher = self._states(self.teacher.model)[:, rows]
        student = self._states(self.student)[:, rows]
        heads = self.student.lm_head.weight, self.teacher.model.lm_head.weight
        mask = torch.ones(student.shape[:2], device=self.device)
        return _chunked_divergence_loss(student, teacher, *heads, mask, beta=1.0)[0]


@cache
def counted_mb(name: str, shape: Shape) -> float:
    """Transient megabytes of an update on a CPU, run on fake tensors."""
    if torch.cuda.is_available():
        shape = replace(shape, dtype=torch.bfloat16)
    footprint = Footprint(CPU)
    arm = Arm(name, shape, footprint=footprint)
    before = footprint.live.total()
    parts = footprint.peak_of(lambda: arm.loss().backward())
    return (sum(parts.values()) - before) / MB
