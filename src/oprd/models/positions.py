"""How many tokens a model has positions for, by its config."""

from collections.abc import Mapping
from typing import Any

NAMES = ("max_position_embeddings", "max_seq_len", "seq_length")  # the last two: MPT, ChatGLM
# Rotary embeddings that reach `factor` times as far; others (llama3, longrope) declare where they end.
STRETCHED = ("linear", "dynamic", "yarn")


def num_positions(config: Any) -> int | None:
    """The positions of a model with this config; None where nothing in it ends (ALiBi, recurrence)."""
    config = config.get_text_config()
    declared = next((size for name in NAMES if (size := getattr(config, name, None))), None)
    is_trained_length = config.attribute_map.get(NAMES[0]) == "context_length"  # of RWKV, which is recurrent
    if declared is None or declared < 0 or getattr(config, "alibi", False) or is_trained_length:
        return None
    return min((_reach(rope, declared) for rope in _ropes(config)), default=declared)


def _ropes(config: Any) -> list[Mapping[str, Any]]:
    """The rotary embeddings of a config: one, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [one for one in rope.values() if isinstance(one, Mapping)]
    return nested or [rope]


def _reach(rope: Mapping[str, Any], declared: int) -> int:
    """Positions of a rotary embedding in a model that declares `declared` of them."""
    if rope.get("rope_type") not in STRETCHED:
        return declared
    unstretched = rope.get("original_max_position_embeddings") or declared
    return max(declared, int(unstretched * (rope.get("factor") or 1)))
