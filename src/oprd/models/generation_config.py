"""A model's own generation config: its makers' sampling advice, which rollouts here ignore."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

# What it names besides how tokens are drawn.
NO_SAMPLING = {
    *(
        "eos_token_id",
        "pad_token_id",
        "bos_token_id",
        "decoder_start_token_id",
        "max_length",
        "max_new_tokens",
    ),
    *(
        "use_cache",
        "cache_implementation",
        "transformers_version",
        "output_attentions",
        "output_hidden_states",
    ),
}
OFF_AT_ONE = {  # other options are off at 0, false or none
    *("temperature", "top_p", "typical_p", "repetition_penalty", "encoder_repetition_penalty"),
    *("length_penalty", "num_beams", "num_beam_groups", "num_return_sequences"),
}


@contextmanager
def generation_config_aside(model: Any) -> Iterator[None]:
    """Within it `generate` cannot fill in what it was not given from the model's own config.

    Nor does a mixture of experts compute its routers' loss, which transformers 5.23 cannot while it decodes.
    """
    owner = getattr(model, "get_base_model", lambda: model)()
    kept, routers = owner.generation_config, getattr(owner.config, "output_router_logits", None)
    owner.generation_config = GenerationConfig()
    if routers:
        owner.config.output_router_logits = False
    try:
        yield
    finally:
        owner.generation_config = kept
        if routers:
            owner.config.output_router_logits = routers


def options_aside(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options by which a model's generation config draws tokens in another way than `given`."""
    options = model.generation_config.to_diff_dict()
    return {
        name: value
        for name, value in sorted(options.items())
        if not name.startswith("_") and name not in NO_SAMPLING and given.get(name) != value
        if value and not (name in OFF_AT_ONE and value == 1)
    }
