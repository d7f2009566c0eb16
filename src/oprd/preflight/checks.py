"""What could stop a run besides memory: its step, its engine, its folder, its disk."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import is_bitsandbytes_available

from oprd.folders.checkpoints import last_whole_checkpoint
from oprd.folders.claims import check_final, is_done
from oprd.folders.run_folder import Inputs
from oprd.folders.whole import check_writable
from oprd.foundation.errors import UserError
from oprd.foundation.meters import MB
from oprd.models.teacher import quantization
from oprd.preflight.planning.memory_plan import MemoryPlan
from oprd.rollouts.engines.vllm import check_training


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and what was found; a run that is not well would fail."""

    about: str
    says: str
    is_well: bool = True


def checked(about: str, look: Callable[[], str]) -> Finding:
    """What `look` says, or the `UserError` it raises."""
    try:
        return Finding(about, look())
    except UserError as error:
        return Finding(about, str(error), False)


def check_engine(config: Any) -> str:
    """Who rolls out; raises `UserError` where that, or what quantises the teacher, is not installed."""
    if config.teacher_quantization != "none":
        quantization(config.teacher_quantization)
    if any(kind in config.optim for kind in ("8bit", "paged")) and not is_bitsandbytes_available():
        raise UserError(f"optim: {config.optim} needs bitsandbytes: pip install bitsandbytes")
    if not config.use_vllm:
        return "rollouts by Hugging Face's generate"
    check_training(config.vllm_mode, config.vllm_enable_sleep_mode)
    return f"rollouts by vLLM, {config.vllm_mode}"


def check_output(folder: Path, settings: dict[str, Any], inputs: Inputs, defaults: dict[str, Any]) -> str:
    """What a run of `settings`, resolved, would find in `folder`; raises `UserError` for another run's."""
    if is_done(folder, settings, inputs, defaults):
        return f"{folder} holds the finished run: nothing would be done"
    check_final(folder, last_whole_checkpoint(folder))
    check_writable(folder)
    return f"{folder} {'holds this run, which would resume' if folder.exists() else 'can be written'}"


def check_disk(folder: Path, config: Any, plan: MemoryPlan, keeps_best: bool = False) -> str:
    """What a run leaves in `folder`, at most; raises `UserError` if the disk has less."""
    kept, limit = _checkpoints(config), config.save_total_limit
    if limit:
        kept = min(kept, limit + 1)  # the oldest goes when the next one is whole
    each = plan.model_bytes if config.save_only_model else plan.checkpoint_bytes
    needed = kept * each + plan.final_bytes + keeps_best * plan.model_bytes
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    says = f"{kept} checkpoints of {each / MB:,.0f} MB and the model, of {free / MB:,.0f} MB that are free"
    if needed > free:
        raise UserError(f"{says}, do not fit: set save_total_limit, or save less often (save_steps)")
    return says


def _checkpoints(config: Any) -> int:
    if config.save_strategy == "no":
        return 0
    if config.save_strategy != "steps" or config.max_steps <= 0:
        return 1
    every = config.save_steps if config.save_steps >= 1 else config.save_steps * config.max_steps
    return -(-config.max_steps // max(int(every), 1))
