"""What the keys of OPRD accept, refuse and default to."""

import pytest

from oprd.foundation.errors import UserError
from oprd.objective.settings import ObjectiveSettings
from oprd.training.config import OPRDConfig

CONFIG = {"bf16": False, "use_cpu": True, "report_to": "none"}


def checked(**settings):
    made = ObjectiveSettings(**settings)
    made.check()
    return made


def test_defaults_are_the_papers(tmp_path):
    config = OPRDConfig(output_dir=str(tmp_path), **CONFIG)
    expected = {
        "layers": "all",
        "positions": "last=2000",
        "representation_loss": "mse",
        "representation_weight": "1.0",
        "output_loss": "none",
        "output_top_k": 16,
        "num_generations": 2,
        "temperature": 1.0,
        "student_temperature": 1.0,
        "teacher_temperature": 1.0,
        "max_completion_length": 16384,
        "max_steps": 500,
        "learning_rate": 1e-5,
        "warmup_steps": 0.03,
        "reduction": "rollout",
        "teacher_chat_template": "student",
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert str(config.lr_scheduler_type.value) == "cosine"
    # 8 prompts × 2 rollouts per step
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 16


def test_specs_are_normalised_to_text():
    made = checked(layers=2, representation_weight=1, output_weight=0.5)
    assert (made.layers, made.representation_weight, made.output_weight) == ("2", "1", "0.5")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"representation_loss": "l2"}, r"representation_loss: 'l2' is not one of mse, normalized_mse"),
        ({"output_loss": "topk"}, "output_loss: 'topk' is not one of none, sampled_token"),
        ({"output_support": "both"}, "output_support: 'both' is not one of student, teacher"),
        ({"output_support": "union-intersection"}, "output_support"),
        ({"divergence": "kl"}, "divergence: 'kl' is not one of reverse_kl"),
        ({"reduction": "mean"}, "reduction: 'mean' is not one of rollout, token"),
        ({"teacher_chat_template": "its own"}, "teacher_chat_template"),
        ({"student_temperature": 0}, "student_temperature must be above 0"),
        ({"teacher_temperature": -1.0}, "teacher_temperature must be above 0"),
        ({"num_generations": 0}, "num_generations must be 1 or more, got 0"),
        ({"output_top_k": 0}, "output_top_k must be 1 or more"),
        ({"output_chunk_size": 0}, "output_chunk_size must be 1 or more"),
        ({"diagnostics_steps": -1}, "diagnostics_steps must be 0 or more"),
        ({"max_prompt_length": 0}, "max_prompt_length must be 1 or more"),
        ({"positions": "last=0"}, "positions 'last=0' select no row"),
        ({"output_positions": "first=0"}, "output_positions 'first=0' select no row"),
        ({"positions": "middle"}, "cannot read positions 'middle'"),
        ({"representation_weight": "400=0,0=1"}, "representation_weight='400=0,0=1'.*increase"),
        ({"output_weight": "-1"}, "output_weight='-1'.*0 or more"),
        ({"representation_weight": "0"}, "all weights are zero"),
        (
            {"representation_weight": "0", "output_loss": "top_k", "output_weight": "0"},
            "all weights are zero",
        ),
        ({"representation_weight": "0=0,9=0"}, "all weights are zero"),
        ({"output_loss": "top_k", "output_top_k": 1}, "identically zero at output_top_k: 1"),
        ({"divergence": "jsd"}, "divergence: jsd belongs to output_loss: full_vocab"),
        (
            {"divergence": "forward_kl", "output_loss": "top_k"},
            "top-k and sampled-token losses are reverse KL",
        ),
        ({"student_temperature": float("nan")}, "student_temperature"),
        ({"student_temperature": float("inf")}, "student_temperature"),
    ],
    ids=str,
)
def test_refused(settings, message):
    with pytest.raises(UserError, match=message):
        checked(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"output_loss": "top_k", "output_top_k": 1, "renormalize": False},
        {"output_top_k": 1},
        {"representation_weight": "0", "output_loss": "full_vocab", "divergence": "jsd"},
        {
            "representation_weight": "0=1,400=0",
            "output_loss": "sampled_token",
            "output_weight": "399=0,400=1",
        },
    ],
    ids=str,
)
def test_accepted(settings):
    checked(**settings)


def test_schedules_of_the_terms():
    settings = checked(representation_weight="0=1,4=0")
    assert settings.representation_schedule(1) == 0.75
    assert settings.output_schedule(0) == 0 and not settings.output_schedule.ever_active
    settings = checked(output_loss="full_vocab", output_weight="2")
    assert settings.output_schedule(0) == 2


def test_trls_beta_is_refused(tmp_path):
    with pytest.raises(UserError, match="beta is TRL's name for the divergence; use divergence"):
        OPRDConfig(output_dir=str(tmp_path), beta=0.5, **CONFIG)


def test_config_takes_dictionaries_as_json(tmp_path):
    config = OPRDConfig(
        output_dir=str(tmp_path),
        teacher_chat_template_kwargs='{"enable_thinking": false}',
        chat_template_kwargs='{"enable_thinking": true}',
        **CONFIG,
    )
    assert config.teacher_chat_template_kwargs == {"enable_thinking": False}
    assert config.chat_template_kwargs == {"enable_thinking": True}


def test_no_key_of_trl_is_taken_over_silently():
    """Our keys must not collide with TRL's, apart from the defaults that OPRDConfig restates."""
    from dataclasses import fields

    from trl import DistillationConfig

    ours = {field.name for field in fields(ObjectiveSettings)}
    assert not ours & {field.name for field in fields(DistillationConfig)}
