"""The numbers that every key may have: one table, checked before anything is loaded or written."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oprd.foundation.errors import UserError


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`; an open end is not part of it."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        low = f"above {self.low:.12g}" if self.low_open else f"{self.low:.12g} or more"
        if self.high == math.inf:
            return f"{low} and finite" if self.low_open else low
        return f"{low} and {'below' if self.high_open else 'at most'} {self.high:.12g}"


COUNT = Range(1)
AMOUNT = Range(0)
POSITIVE = Range(0, low_open=True)
SHARE = Range(0, 1)
SHARE_ABOVE_0 = Range(0, 1, low_open=True)
SHARE_BELOW_1 = Range(0, 1, high_open=True)
SEED = Range(0, 2**32 - 1)  # NumPy's
PORT = Range(1, 65535)

RANGES = {
    # Optimiser and schedule
    "learning_rate": AMOUNT,  # 0 measures and trains nothing
    "weight_decay": AMOUNT,
    "adam_beta1": SHARE_BELOW_1,
    "adam_beta2": SHARE_BELOW_1,
    "adam_epsilon": POSITIVE,
    "max_grad_norm": AMOUNT,
    "warmup_steps": AMOUNT,
    "label_smoothing_factor": SHARE,
    "neftune_noise_alpha": AMOUNT,
    # Steps and batches
    "max_steps": COUNT,
    "num_train_epochs": AMOUNT,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "eval_accumulation_steps": COUNT,
    "max_tokens_per_micro_batch": COUNT,
    "output_chunk_size": COUNT,
    "batch_size": COUNT,
    "pad_to_multiple_of": COUNT,
    "seed": SEED,
    "data_seed": SEED,
    # What is recorded and kept
    "logging_steps": POSITIVE,
    "save_steps": POSITIVE,
    "save_total_limit": AMOUNT,
    "eval_steps": POSITIVE,
    "eval_delay": AMOUNT,
    "diagnostics_steps": AMOUNT,
    "accuracy_steps": COUNT,
    "accuracy_problems": COUNT,
    "accuracy_samples": COUNT,
    "stop_on_collapse": COUNT,
    "num_completions_to_print": COUNT,
    # Processes and devices
    "dataloader_num_workers": AMOUNT,
    "dataloader_prefetch_factor": COUNT,
    "ddp_timeout": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "torch_empty_cache_steps": COUNT,
    "all_pairs_gib": AMOUNT,
    # Rollouts
    "num_generations": COUNT,
    "num_prompts": COUNT,
    "samples": COUNT,
    "max_prompt_length": COUNT,
    "max_completion_length": COUNT,
    "max_new_tokens": COUNT,
    "max_tool_calling_iterations": COUNT,
    "temperature": POSITIVE,
    "top_p": SHARE_ABOVE_0,
    "top_k": AMOUNT,
    "min_p": SHARE,
    "repetition_penalty": POSITIVE,
    "vllm_server_port": PORT,
    "vllm_group_port": PORT,
    "vllm_server_timeout": POSITIVE,
    "vllm_gpu_memory_utilization": SHARE_ABOVE_0,
    "vllm_max_model_length": COUNT,
    "vllm_tensor_parallel_size": COUNT,
    # Objective
    "bridge_rank": COUNT,
    "teacher_extrapolation": POSITIVE,
    "output_top_k": COUNT,
    "student_temperature": POSITIVE,
    "teacher_temperature": POSITIVE,
    "vllm_importance_sampling_clip_max": POSITIVE,
    # Adapters
    "lora_r": COUNT,
    "lora_alpha": POSITIVE,
    "lora_dropout": SHARE_BELOW_1,
    # A bridge's fit
    "max_rank": COUNT,
    "holdout": SHARE_BELOW_1,
}
# Where a temperature of 0 is greedy decoding.
EVALUATION_RANGES = RANGES | {"temperature": AMOUNT}


def check_ranges(settings: Mapping[str, Any], ranges: Mapping[str, Range] = RANGES, within: str = "") -> None:
    """Raise `UserError` for the first value outside its range, or that is no number; None passes.

    `within` names the key whose mapping these settings are.
    """
    for key, allowed in ranges.items():
        value = settings.get(key)
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or value not in allowed:
            raise UserError(f"{within}{key} must be {allowed}, got {value}")
