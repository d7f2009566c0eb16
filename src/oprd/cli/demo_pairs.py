"""The bundled pairs that `oprd demo` shows, and the arms it compares on each.

Learning rates were tuned per arm over one grid (docs/log.md).
"""

from dataclasses import dataclass, field
from typing import Any

Keys = dict[str, Any]

STUDENT, TASK = "tiny:student", "tiny"

SHARED: Keys = {
    "positions": "all",
    "num_generations": 1,
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 64,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "report_to": "none",
    "save_strategy": "no",
    "diagnostics_steps": 5,
}
BRIDGE: Keys = {
    "num_prompts": 512,
    "max_completion_length": 64,
    "batch_size": 64,
    "dtype": "float32",
}
LABELS = {
    "student": "student, untouched",
    "teacher": "teacher",
    "oprd": "OPRD",
    "opd_sampled_token": "OPD, sampled token",
    "opd_top_k": "OPD, top-16",
    "bridge": "OPRD through a bridge",
    "bridge_then_opd": "bridge, then OPD",
    "bridge_then_text": "bridge, then OPD over the text",
    "opd_sampled_text": "OPD over the text",
    "bridge_authors": "bridge, student ids fed to the teacher",
}
SAMPLED_TOKEN: Keys = {"representation_weight": "0", "output_loss": "sampled_token", "learning_rate": 2e-4}
SAMPLED_TEXT: Keys = {"representation_weight": "0", "output_loss": "sampled_text", "learning_rate": 1e-4}


@dataclass(frozen=True)
class Pair:
    """A teacher for the bundled student, the bridges to fit, and the runs to compare.

    An arm names its bridge by its key in `bridges`, and a step of its schedules may be a share of the run:
    `0=1,75%=1,75%+=0` is on until 75% of the steps are done. `after` holds the keys of another run, of half
    the steps, that goes before; the optimiser then starts afresh.
    """

    teacher: str
    arms: dict[str, Keys]
    bridges: dict[str, Keys] = field(default_factory=dict)


THROUGH: Keys = {"bridge": "fit", "learning_rate": 1e-3}
# The output weight keeps the gradient's norm where it was: Adam remembers it across the switch.
THEN_OPD: Keys = {
    "representation_weight": "0=1,75%=1,75%+=0",
    "output_loss": "sampled_token",
    "output_weight": "0=0,75%=0,75%+=0.01",
}
# Rank 64 of what both models share, and an anchor: across tokenizers a quarter of the rows has no partner.
ACROSS: Keys = {"method": "rrr", "rank": "64"}
ANCHORED: Keys = {"anchor_weight": "1"}
FED_IDS: Keys = {"teacher_tokenization": "student"}

PAIRS = {
    "same": Pair(
        "tiny:teacher",
        {
            "oprd": {"representation_loss": "relative_mse", "layers": "all", "learning_rate": 2e-3},
            "opd_sampled_token": SAMPLED_TOKEN,
            "opd_top_k": {"representation_weight": "0", "output_loss": "top_k", "learning_rate": 2e-4},
        },
    ),
    "bridge": Pair(
        "tiny:bridge-teacher",
        {
            "bridge": THROUGH,
            "bridge_then_opd": THROUGH | THEN_OPD,
            "opd_sampled_token": SAMPLED_TOKEN | {"learning_rate": 1e-4},
        },
        bridges={"fit": {}},
    ),
    "tokenizer": Pair(
        "tiny:tokenizer-teacher",
        {
            "bridge": THROUGH | ANCHORED,
            "bridge_then_text": SAMPLED_TEXT | {"after": THROUGH | ANCHORED},
            "opd_sampled_text": SAMPLED_TEXT,
            "bridge_authors": THROUGH | ANCHORED | FED_IDS | {"bridge": "fit_authors"},
        },
        bridges={"fit": ACROSS, "fit_authors": ACROSS | FED_IDS},
    ),
}
