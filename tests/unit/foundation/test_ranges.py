"""What numbers the keys take: one table for recipes, flags and Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oprd.bridge.recipe import BridgeArguments
from oprd.evaluation.problems import EvalSettings
from oprd.foundation.errors import UserError
from oprd.foundation.ranges import EVALUATION_RANGES, RANGES, Range, check_ranges
from oprd.rollouts.generation import Sampling
from oprd.training.config import OPRDConfig
from oprd.training.train import RunArguments

BRIDGE = {name: "tiny" for name in ("model_name_or_path", "teacher_model_name_or_path", "dataset_name")}


def config(tmp_path, **settings):
    return OPRDConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none", **settings)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("learning_rate", -1, "0 or more"),
        ("learning_rate", math.nan, "0 or more"),
        ("weight_decay", -1, "0 or more"),
        ("adam_beta1", 1.0, "0 or more and below 1"),
        ("adam_beta2", -0.1, "0 or more and below 1"),
        ("adam_epsilon", 0.0, "above 0 and finite"),
        ("max_grad_norm", -1, "0 or more"),
        ("warmup_steps", -1, "0 or more"),
        ("warmup_steps", math.inf, "0 or more"),
        ("max_steps", 0, "1 or more"),
        ("max_steps", -5, "1 or more"),
        ("num_train_epochs", -1, "0 or more"),
        ("num_train_epochs", math.nan, "0 or more"),
        ("temperature", 0, "above 0 and finite"),
        ("temperature", math.inf, "above 0 and finite"),
        ("temperature", math.nan, "above 0 and finite"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", -1, "above 0 and at most 1"),
        ("top_p", 1.5, "above 0 and at most 1"),
        ("top_k", -1, "0 or more"),
        ("min_p", 1.1, "0 or more and at most 1"),
        ("repetition_penalty", 0, "above 0 and finite"),
        ("dataloader_num_workers", -1, "0 or more"),
        ("seed", -1, "0 or more and at most 4294967295"),
        ("seed", 2**70, "0 or more and at most 4294967295"),
        ("logging_steps", 0, "above 0 and finite"),
        ("save_steps", 0, "above 0 and finite"),
        ("save_total_limit", -1, "0 or more"),
        ("pad_to_multiple_of", "0", "1 or more"),
        ("vllm_gpu_memory_utilization", 1.5, "above 0 and at most 1"),
        ("vllm_server_port", 70000, "1 or more and at most 65535"),
    ],
)
def test_training(tmp_path, key, value, allowed):
    with pytest.raises(UserError, match=f"^{key} must be {allowed}, got"):
        config(tmp_path, **{key: value})


def test_keys_of_generation_kwargs_too(tmp_path):
    with pytest.raises(UserError, match=r"^generation_kwargs: top_p must be above 0 and at most 1, got -1$"):
        config(tmp_path, generation_kwargs={"top_p": -1})


@pytest.mark.parametrize("value", ["hello", [1], 3])
def test_arguments_that_are_no_mapping(tmp_path, value):
    with pytest.raises(UserError, match=r"^model_init_kwargs: .* is not"):
        config(tmp_path, model_init_kwargs=value)


@pytest.mark.parametrize("dtype", ["bloat16", "int8", "nn", 3])
@pytest.mark.parametrize("key", ["model_init_kwargs", "teacher_model_init_kwargs"])
def test_dtypes(tmp_path, key, dtype):
    with pytest.raises(UserError, match=rf"^{key}: dtype is {dtype!r}: use auto, float32"):
        config(tmp_path, **{key: {"dtype": dtype}})
    for good in ("auto", "bfloat16", torch.float32):
        assert getattr(config(tmp_path, **{key: {"dtype": good}}), key) == {"dtype": good}


@pytest.mark.parametrize(
    ("key", "value"),
    [("holdout", 1.0), ("temperature", -0.1), ("top_p", 0), ("seed", -1), ("all_pairs_gib", math.nan)],
)
def test_bridges(key, value):
    with pytest.raises(UserError, match=f"^{key} must be"):
        BridgeArguments(output_dir="x", **BRIDGE | {key: value})


def test_temperature_0_is_greedy_outside_training():
    assert Sampling(temperature=0).temperature == 0
    assert BridgeArguments(output_dir="x", temperature=0.0, **BRIDGE).sampling.temperature == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sampling(temperature=math.inf),
        lambda: Sampling(top_p=math.nan),
        lambda: Sampling(max_new_tokens=0),
        lambda: EvalSettings(samples=0),
        lambda: EvalSettings(seed=-1),
        lambda: RunArguments(use_peft=True, lora_alpha=0).lora,
        lambda: RunArguments(use_peft=True, lora_dropout=1.0).lora,
    ],
)
def test_evaluation_and_adapters(make):
    with pytest.raises(UserError, match="must be"):
        make()


@pytest.mark.parametrize("value", ["fast", True, [1]], ids=str)
def test_what_is_no_number(value):
    with pytest.raises(UserError, match="learning_rate must be 0 or more, got"):
        check_ranges({"learning_rate": value})


def test_what_is_not_set_passes():
    check_ranges({"min_p": None})
    check_ranges({"unknown": -1})


def test_every_default_is_within_its_range(tmp_path):
    check_ranges(vars(config(tmp_path)) | vars(RunArguments()))
    check_ranges(vars(BridgeArguments(output_dir="x", **BRIDGE)), EVALUATION_RANGES)


def test_every_key_of_the_table_is_some_setting():
    used = vars(OPRDConfig).keys() | vars(RunArguments()).keys() | vars(EvalSettings()).keys()
    used |= OPRDConfig.__dataclass_fields__.keys() | vars(Sampling()).keys()
    assert RANGES.keys() <= used | BridgeArguments.__dataclass_fields__.keys()


@given(st.floats(), st.sampled_from([Range(0), Range(0, 1, low_open=True), Range(0, 1, high_open=True)]))
def test_no_range_holds_what_is_not_finite(value, allowed):
    assert (value in allowed) == (
        math.isfinite(value)
        and (value > 0 or (value == 0 and not allowed.low_open))
        and (value < allowed.high or (value == allowed.high and not allowed.high_open))
    )
