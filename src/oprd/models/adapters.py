"""LoRA and DoRA students through peft: the keys of a recipe, and adapters merged into a model of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import PreTrainedTokenizerBase

from oprd.foundation.errors import UserError, writing
from oprd.foundation.ranges import check_ranges
from oprd.models.loading import commit_of, load_model

MERGED_FOLDER = "merged"
EVERY = "all-linear"  # peft's name for all but the LM head


def _key(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class AdapterArguments:
    """Adapters in place of all weights, under TRL's keys."""

    use_peft: bool = _key(False, "Train LoRA adapters and leave the model's own weights alone.")
    lora_r: int = _key(16, "Rank of the adapters.")
    lora_alpha: int = _key(32, "Adapters are scaled by lora_alpha / lora_r.")
    lora_dropout: float = _key(0.0, "Dropout in front of the adapters.")
    lora_target_modules: list[str] | None = _key(None, "Modules to adapt; default: all-linear.")
    use_rslora: bool = _key(False, "Scale by lora_alpha / √lora_r.")
    use_dora: bool = _key(False, "DoRA: magnitudes of their own beside the low-rank directions.")

    @property
    def lora(self) -> LoraConfig | None:
        """What peft is asked for; raises `UserError` for values that no adapter can have."""
        if not self.use_peft:
            changed = [f.name for f in fields(AdapterArguments) if getattr(self, f.name) != f.default]
            if changed:
                raise UserError(f"{changed[0]} is of adapters, and use_peft is false: set use_peft: true")
            return None
        check_ranges(vars(self))
        named = self.lora_target_modules or [EVERY]
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=EVERY if named == [EVERY] else named,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )


def note_commit(model: PeftModel, revision: str | None) -> None:
    """Let saved adapters name the commit of the Hub's model that they are trained on: they fit no other."""
    for config in model.peft_config.values():
        assert config.base_model_name_or_path is not None
        config.revision = commit_of(config.base_model_name_or_path, revision)


def save_merged(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    trust_remote_code: bool = False,
    ends: Sequence[int] = (),
) -> None:
    """Save what the adapters in `folder` make of their model in `folder/merged`, in float32.

    `ends` are the ids that end its responses, where these are others than its model's files list.
    """
    merged = load_model(str(folder), trust_remote_code=trust_remote_code)
    if ends:
        merged.generation_config.eos_token_id = list(ends)
    with writing(folder / MERGED_FOLDER):
        merged.save_pretrained(folder / MERGED_FOLDER)
        tokenizer.save_pretrained(folder / MERGED_FOLDER)
