"""The keys that OPRD adds to TRL's, their defaults (the paper's where it names them) and their checks."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch

from oprd.foundation.errors import UserError
from oprd.foundation.ranges import check_ranges
from oprd.objective.composite import Reduction, Schedule
from oprd.objective.custom_loss import NAMES, named_loss
from oprd.objective.output_space import Divergence, Support
from oprd.objective.selection import Positions
from oprd.objective.terms import ANCHOR, OUTPUT, REPRESENTATION

Baseline = Literal["none", "kl"]
Emphasis = Literal["uniform", "importance", "gap"]
OUTPUT_LOSSES = ("none", "sampled_token", "sampled_text", "top_k", "top_k_authors", "full_vocab")
EXTRAPOLATED_OUTPUTS = ("sampled_token", "full_vocab")
TEACHER_TEMPLATES = ("student", "own")
QUANTIZATIONS = ("none", "8bit", "4bit")
TEACHER_TOKENIZATIONS = ("own", "student")


STRINGS = (
    "layers",
    "positions",
    "output_positions",
    "representation_weight",
    "output_weight",
    "anchor_weight",
)


def key(default: Any, text: str) -> Any:
    """A recipe key: its default and its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class ObjectiveSettings:
    """What is matched, where, how strongly; mixed into `OPRDConfig`."""

    layers: str = key("all", "all | last | even | odd | every=4 | 1,14,28 | 14=18,28=36 (student=teacher).")
    positions: str = key("last=2000", "Response rows of the representation loss: all | last=k | first=k.")
    bridge: str | None = key(
        None, "A fitted bridge (file, or folder of oprd bridge) to compare states through."
    )
    bridge_rank: int | None = key(None, "Use only the first n directions of the bridge.")
    representation_loss: str | None = key(
        None,
        " | ".join(NAMES)
        + " | module:function (yours, a value per row); default mse, with a bridge normalized_mse.",
    )
    representation_weight: str = key("1.0", "μ of Eq. 7: a number, or a schedule such as 0=1.0,400=0.")
    teacher_extrapolation: float = key(
        1.0, "λ: targets h_T + (λ − 1)(h_T − h_B) beyond the teacher (RIDE), 1.15 to 1.35; 1 is the teacher."
    )
    reference_model_name_or_path: str | None = key(
        None, "Whose states h_B are: what the teacher was trained from; default: the student as it starts."
    )
    anchor_weight: str = key(
        "0", "Weight of the loss that keeps what a bridge leaves free near the initial student."
    )
    row_weights: Emphasis = key(
        "uniform",
        "uniform | importance: earlier rows count more (IW-OPD) | gap: rows of a large state loss do.",
    )
    output_loss: str = key("none", " | ".join(OUTPUT_LOSSES) + ".")
    output_weight: str = key("1.0", "Weight of the output loss: a number or a schedule.")
    output_baseline: Baseline = key(
        "none", "Of sampled_token: none, or kl, which is subtracted from the advantage (vOPD)."
    )
    output_top_k: int = key(16, "Support size k of the top-k losses.")
    output_support: Support = key("student", " | ".join(get_args(Support)) + ".")
    output_positions: str = key("all", "Response rows of the output loss: all | last=k | first=k.")
    renormalize: bool = key(True, "Renormalise both distributions on the top-k support (Eq. 5).")
    divergence: Divergence = key("reverse_kl", "For full_vocab: " + " | ".join(get_args(Divergence)) + ".")
    student_temperature: float = key(1.0, "Divides the student's logits in output losses.")
    teacher_temperature: float = key(1.0, "Divides the teacher's logits in output losses.")
    reduction: Reduction = key("rollout", "rollout: mean of rollout means (Eq. 6); token: mean of all rows.")
    num_generations: int = key(2, "Rollouts per prompt; batch sizes count rollouts.")
    mask_truncated_completions: bool = key(False, "Leave truncated rollouts out of the loss.")
    max_tokens_per_micro_batch: int | None = key(
        None, "Pack rollouts of similar length into micro-batches of at most this many padded tokens."
    )
    padding_free: bool | None = key(
        None,
        "Pack a micro-batch into one sequence without padding; default: with flash attention only.",
    )
    keep_attention: bool = key(
        False,
        "With gradient checkpointing, keep the student's attention outputs instead of recomputing them, "
        "for about as much memory again as the checkpoints take.",
    )
    max_prompt_length: int | None = key(None, "Drop (never cut) prompts of more tokens than this.")
    drop_unrenderable_prompts: bool = key(
        False, "Drop and count prompts that are malformed or that a chat template refuses; default: stop."
    )
    final_norm: bool = key(True, "Take the last layer after the final norm, as hidden_states[L].")
    teacher_chat_template: str = key(
        "student", "student: the teacher reads the student's ids; own: its template."
    )
    teacher_tokenization: str = key(
        "own",
        "With another tokenizer: own, the teacher reads the text; student, it is fed the student's ids "
        "(the authors' way, a baseline).",
    )
    teacher_chat_template_kwargs: dict | str | None = key(None, "Arguments of the teacher's chat template.")
    teacher_offload: bool = key(
        False, "Keep the teacher's weights in host memory; a block's come to the device when it runs."
    )
    teacher_quantization: str = key("none", " | ".join(QUANTIZATIONS) + ": load it with bitsandbytes.")
    output_chunk_size: int = key(256, "Rows of logits in memory at a time, in output losses.")
    vllm_importance_sampling_correction: bool = key(
        False, "Weight tokens by min(π_trainer/π_engine, clip_max); for output_loss: sampled_token only."
    )
    vllm_importance_sampling_clip_max: float = key(3.0, "Upper limit of these weights.")
    diagnostics_steps: int = key(0, "Log entropies, overlap and cosines every n steps; 0 = never.")

    def check(self) -> None:
        """Normalise specs to strings, fill in defaults, and refuse contradictions."""
        if self.representation_loss is None:
            self.representation_loss = "normalized_mse" if self.bridge else "mse"
        for name in STRINGS:
            setattr(self, name, str(getattr(self, name)))
        self.representation_loss = named_loss(self.representation_loss)
        one_of("output_loss", self.output_loss, OUTPUT_LOSSES)
        one_of("row_weights", self.row_weights, get_args(Emphasis))
        one_of("output_baseline", self.output_baseline, get_args(Baseline))
        one_of("output_support", self.output_support, get_args(Support))
        one_of("divergence", self.divergence, get_args(Divergence))
        one_of("reduction", self.reduction, get_args(Reduction))
        one_of("teacher_chat_template", self.teacher_chat_template, TEACHER_TEMPLATES)
        one_of("teacher_quantization", self.teacher_quantization, QUANTIZATIONS)
        one_of("teacher_tokenization", self.teacher_tokenization, TEACHER_TOKENIZATIONS)
        check_ranges({key.name: getattr(self, key.name) for key in fields(ObjectiveSettings)})
        if self.bridge_rank is not None and self.bridge is None:
            raise UserError("bridge_rank is set, but there is no bridge: name one, or leave bridge_rank out")
        if self.anchor_schedule.ever_active and self.bridge is None:
            raise UserError("anchor_weight needs a bridge, and there is no bridge: drop it")
        self._check_extrapolation()
        Positions.parse(self.positions)
        Positions.parse(self.output_positions, "output_positions")
        self._check_weights()
        self._check_output()

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The weight of every term over steps."""
        return {
            REPRESENTATION: self.representation_schedule,
            OUTPUT: self.output_schedule,
            ANCHOR: self.anchor_schedule,
        }

    @property
    def representation_schedule(self) -> Schedule:
        """μ of Eq. 7 over steps."""
        return Schedule.parse(self.representation_weight, "representation_weight")

    @property
    def anchor_schedule(self) -> Schedule:
        """Weight of the anchor over steps."""
        return Schedule.parse(self.anchor_weight, "anchor_weight")

    @property
    def output_schedule(self) -> Schedule:
        """Weight of the output loss over steps; zero when there is none."""
        schedule = Schedule.parse(self.output_weight, "output_weight")
        return Schedule(((0, 0.0),)) if self.output_loss == "none" else schedule

    def _check_weights(self) -> None:
        schedules = [self.representation_schedule, self.output_schedule]
        if not any(schedule.ever_active for schedule in schedules):
            raise UserError(
                "all weights are zero, so nothing would be trained: raise representation_weight, or set "
                "output_loss with an output_weight above 0"
            )

    def _check_extrapolation(self) -> None:
        if self.teacher_extrapolation == 1:
            if self.reference_model_name_or_path is not None:
                raise UserError(
                    "reference_model_name_or_path is read by teacher_extrapolation, which is 1: set "
                    "teacher_extrapolation: 1.25, or leave the reference out"
                )
            return
        if self.bridge is not None:
            raise UserError(
                "teacher_extrapolation needs models of one origin, and a bridge joins two of different "
                "origin: leave one of them out"
            )
        if self.output_schedule.ever_active and self.output_loss not in EXTRAPOLATED_OUTPUTS:
            raise UserError(
                f"teacher_extrapolation is defined for output_loss: {' and '.join(EXTRAPOLATED_OUTPUTS)}, "
                f"and output_loss is {self.output_loss}: change it, or leave teacher_extrapolation out"
            )

    def _check_output(self) -> None:
        if self.output_loss == "top_k" and self.output_top_k == 1 and self.renormalize:
            raise UserError(
                "a renormalised top-k loss is identically zero at output_top_k: 1; raise it, set "
                "renormalize: false, or use output_loss: sampled_token"
            )
        if self.output_baseline != "none" and self.output_loss != "sampled_token":
            raise UserError(
                f"output_baseline: {self.output_baseline} belongs to output_loss: sampled_token, and "
                f"output_loss is {self.output_loss}: leave it out"
            )
        if self.divergence != "reverse_kl" and self.output_loss != "full_vocab":
            raise UserError(
                f"divergence: {self.divergence} belongs to output_loss: full_vocab, and output_loss is "
                f"{self.output_loss}; top-k and sampled-token losses are reverse KL"
            )


def one_of(name: str, value: str, allowed: Any) -> None:
    """Raise `UserError` unless a key's value is an allowed one."""
    if value not in allowed:
        raise UserError(f"{name}: {value!r} is not one of {', '.join(allowed)}")


def check_dtype(name: str, init_kwargs: Mapping[str, Any] | None) -> None:
    """Raise `UserError` if the `dtype` among arguments of `from_pretrained` is no floating dtype of torch."""
    dtype = (init_kwargs or {}).get("dtype", "auto")
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise UserError(f"{name}: dtype is {dtype!r}: use auto, float32, bfloat16 or float16")


def mapping(name: str, value: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """A key's mapping, which a flag writes as JSON; empty for None. Raises `UserError` for anything else."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value or {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: {value!r:.80} is not JSON ({error})") from error
    if not isinstance(parsed, Mapping):
        raise UserError(f"{name}: {value!r} is not a mapping of arguments")
    return dict(parsed)
