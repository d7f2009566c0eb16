"""What benchmarks/study.py compares: pairs of models, and for each the ways to distil one into the other.

An arm is a recipe and the keys that it changes. The recipes of a pair agree in prompts, batch and steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

Keys = Mapping[str, str]
TOKENS = {"representation_weight": "0", "diagnostics_steps": "10"}
HAND_OVER = {"representation_weight": "0=1,23=1,24=0", "output_weight": "0=0,23=0,24=1"}
CROSSFADE = {"layers": "last", "representation_weight": "0=1,10=0", "output_weight": "0=0,10=1"}
LONG = {"max_steps": "120"}


@dataclass(frozen=True)
class Arm:
    """A way to distil. `bridge` names one of the pair's; `rate_of` the arm whose learning rate it takes.

    With `sft` it is supervised fine-tuning on the teacher's samples instead, in as many steps.
    """

    recipe: str
    keys: Keys = field(default_factory=dict)
    bridge: str | None = None
    rate_of: str | None = None
    sft: bool = False


@dataclass(frozen=True)
class Pair:
    """A student, a teacher and the arms; `main` are those with a second seed.

    `student` and `teacher` stand in place of the recipes', and `bridges` are the keys by which a bridge's fit
    differs from recipes/laptop/qwen-bridge.yaml.
    """

    arms: Mapping[str, Arm]
    main: tuple[str, ...]
    bridges: Mapping[str, Keys] = field(default_factory=dict)
    student: str | None = None
    teacher: str | None = None


def _of(recipe: str, **arms: Keys) -> dict[str, Arm]:
    return {name: Arm(f"recipes/laptop/{recipe}.yaml", keys) for name, keys in arms.items()}


_OUTPUTS: dict[str, Keys] = {
    "sampled_token": TOKENS | {"output_loss": "sampled_token"},
    "top_16": TOKENS | {"output_loss": "top_k"},
    "full_vocab": TOKENS | {"output_loss": "full_vocab"},
}
_THROUGH, _TEXT = "recipes/laptop/through-qwen-bridge.yaml", "recipes/laptop/qwen-text.yaml"
_SPANS = {"output_loss": "sampled_text"}
_QWEN = {
    "text": Arm(_TEXT),
    "top_16": Arm(_TEXT, {"output_loss": "top_k"}),
    "bridge": Arm(_THROUGH, bridge="own"),
    "bridge_last": Arm(_THROUGH, {"layers": "last"}, "own"),
    "bridge_then_text": Arm(_THROUGH, _SPANS | HAND_OVER, "own"),
    "crossfade": Arm(_THROUGH, _SPANS | CROSSFADE, "own"),
    "authors": Arm(_THROUGH, {"teacher_tokenization": "student", "anchor_weight": "0"}, "authors"),
    "bridge_long": Arm(_THROUGH, LONG, "own", rate_of="bridge"),
    "bridge_long_no_anchor": Arm(_THROUGH, LONG | {"anchor_weight": "0"}, "own", rate_of="bridge"),
    "bridge_last_long": Arm(_THROUGH, LONG | {"layers": "last"}, "own", rate_of="bridge_last"),
}
_BRIDGES: dict[str, Keys] = {"own": {}, "authors": {"teacher_tokenization": "student", "rank": "4"}}

PAIRS = {
    "same-origin": Pair(
        _of(
            "same-origin",
            oprd={},
            **_OUTPUTS,
            oprd_mse={"representation_loss": "mse"},
            oprd_cosine={"representation_loss": "cosine"},
            oprd_last={"layers": "last"},
            oprd_upper={"layers": ",".join(map(str, range(16, 31)))},
            oprd_first_rows={"positions": "first=8"},
            oprd_last_rows={"positions": "last=8"},
            composite={"output_loss": "sampled_token"},
            ride={"teacher_extrapolation": "1.25"},
            phf={"representation_loss": "phf"},
            oprd_gap={"row_weights": "gap"},
            oprd_importance={"row_weights": "importance"},
            sampled_token_kl=TOKENS | {"output_loss": "sampled_token", "output_baseline": "kl"},
        )
        | {"sft": Arm("recipes/laptop/same-origin.yaml", sft=True)},
        main=("oprd", "sampled_token", "top_16"),
    ),
    "pruned": Pair(
        _of("pruned", oprd={}, **_OUTPUTS, oprd_last={"layers": "20=30"}),
        main=("oprd", "top_16"),
    ),
    "qwen-smollm2": Pair(_QWEN, ("text", "top_16", "bridge"), _BRIDGES),
    "qwen-gemma": Pair(_QWEN, ("text", "top_16", "bridge"), _BRIDGES, student="google/gemma-3-270m"),
}
