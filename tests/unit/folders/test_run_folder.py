"""What of a run folder's settings may differ when it is resumed, and what is another run."""

from dataclasses import fields

import pytest
import yaml

from oprd.bridge.recipe import BridgeArguments
from oprd.folders.deciding import DECIDING
from oprd.folders.run_folder import check_folder, default_settings, resolved_settings, write_resolved
from oprd.foundation.errors import UserError
from oprd.objective.settings import ObjectiveSettings
from oprd.training.config import OPRDConfig
from oprd.training.run_arguments import RunArguments

BATCH = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_processes": 1}
STORED = BATCH | {
    "temperature": 1.0,
    "lora_r": 16,
    "output_loss": "none",
    "bf16": False,
    "lr_scheduler_type": "cosine",
    "vllm_importance_sampling_correction": False,
    "logging_steps": 1,
    "model_name_or_path": "student",
    "dataset_name": "rows.jsonl",
}
INPUTS = {"model_name_or_path": {"weights": "aa", "tokenizer": "bb"}, "dataset_name": {"rows": "cc"}}
# Keys of ours that say how a run is carried out or followed, not what it computes.
HOW = {
    *("max_tokens_per_micro_batch", "padding_free", "keep_attention", "teacher_offload"),
    *("output_chunk_size", "diagnostics_steps", "dry_run", "output_dir"),
    *("accuracy_dataset_name", "accuracy_dataset_split", "accuracy_steps", "accuracy_problems"),
    *("accuracy_samples", "load_best", "stop_on_collapse"),
    *("all_pairs_gib", "vllm_server_base_url", "vllm_gpu_memory_utilization", "trust_remote_code"),
}


@pytest.fixture
def run(tmp_path):
    write_resolved(tmp_path, STORED, INPUTS)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    return tmp_path


def edit(run, change):
    """Rewrite `resolved.yaml` by a function of its content."""
    record = yaml.safe_load((run / "resolved.yaml").read_text())
    change(record)
    (run / "resolved.yaml").write_text(yaml.safe_dump(record))


@pytest.mark.parametrize(
    "changes",
    [
        {"vllm_server_base_url": "http://node:8000"},
        {"vllm_gpu_memory_utilization": 0.5},
        {"vllm_tensor_parallel_size": 2},
        {"vllm_mode": "server"},
        {"padding_free": True},
        {"fsdp": True},
        {"deepspeed": "zero2.json"},
        {"dry_run": True},
        {"teacher_offload": True},
        {"keep_attention": True},
        {"accuracy_steps": 7},
        {"logging_steps": 10},
        {"num_processes": 4, "gradient_accumulation_steps": 1},
        {"num_processes": 2, "per_device_train_batch_size": 1},
    ],
    ids=str,
)
def test_how_a_run_is_carried_out_may_change(run, changes):
    check_folder(run, STORED | changes, INPUTS)


@pytest.mark.parametrize(
    "key", ["vllm_importance_sampling_correction", "temperature", "lora_r", "output_loss", "bf16"]
)
def test_what_a_run_computes_may_not(run, key):
    with pytest.raises(
        UserError, match=f"holds a run with {key}: {STORED[key]}, not 3: choose another output_dir"
    ):
        check_folder(run, STORED | {key: 3}, INPUTS)


@pytest.mark.parametrize("key", BATCH)
def test_nor_may_the_rollouts_of_a_step(run, key):
    more = STORED | {key: 2 * STORED[key]}
    with pytest.raises(UserError, match="a run of 8 rollouts per step, and this would be 16: keep"):
        check_folder(run, more, INPUTS)


def test_every_key_of_ours_either_decides_or_not():
    kinds = (ObjectiveSettings, RunArguments, BridgeArguments)
    ours = {field.name for kind in kinds for field in fields(kind)}
    assert ours == (ours & set(DECIDING)) | HOW, "put a new key into oprd.folders.deciding, or into HOW"
    assert not HOW & set(DECIDING)
    theirs = {field.name for field in fields(OPRDConfig)}
    assert set(DECIDING) <= ours | theirs


# Records of other versions, and damaged ones


@pytest.mark.parametrize("key", STORED)
def test_a_key_that_is_not_recorded_is_told(run, caplog, key):
    edit(run, lambda record: record["settings"].pop(key))
    check_folder(run, STORED, INPUTS)
    assert (f"{key}: {STORED[key]}" in caplog.text) == (key != "logging_steps")


def test_a_key_that_the_older_version_did_not_have_was_at_its_default(run, caplog):
    edit(run, lambda record: record["versions"].update(transformers="5.0.0"))
    new = STORED | {"min_p": 0.1}
    with pytest.raises(UserError, match=r"holds a run with min_p: None, not 0\.1"):
        check_folder(run, new, INPUTS, {"min_p": None})
    check_folder(run, new, INPUTS, {"min_p": 0.1})
    check_folder(run, STORED | {"a_new_key_of_transformers": 3}, INPUTS, {})
    assert "was last run with transformers 5.0.0 (now " in caplog.text
    assert "min_p" not in caplog.text


def test_unknown_keys_are_told(run, caplog):
    edit(run, lambda record: record["settings"].update(zeal=3, yarn=1))
    check_folder(run, STORED, INPUTS)
    (said,) = caplog.messages
    assert said.endswith("has keys that are not known here and not compared: yarn, zeal")


def test_names_of_enumerations_as_they_used_to_be_written(run):
    edit(run, lambda record: record["settings"].update(lr_scheduler_type="SchedulerType.COSINE"))
    check_folder(run, STORED, INPUTS)
    with pytest.raises(UserError, match="lr_scheduler_type: cosine, not linear"):
        check_folder(run, STORED | {"lr_scheduler_type": "linear"}, INPUTS)


@pytest.mark.parametrize(
    "content",
    [
        *("", "settings: [1", "settings: 3", "a: 1", "settings: {}", "- 1", "settings: {}\nversions: 1"),
        *("settings: {1: 2}\nversions: {}", "settings: {}\nversions: {null: 2}", "[" * 10**5),
        *("settings: {}\nversions: {}\ninputs: {1: {a: b}}", "settings: !!python/tuple []\nversions: {}"),
    ],
    ids=range(12),
)
def test_a_damaged_record(run, content):
    (run / "resolved.yaml").write_text(content)
    with pytest.raises(UserError, match=r"resolved\.yaml is damaged, so what that run computes is not known"):
        check_folder(run, STORED, INPUTS)


def test_a_record_that_is_no_text(run):
    (run / "resolved.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is damaged"):
        check_folder(run, STORED, INPUTS)


@pytest.mark.parametrize("content", [None, "", "settings: [1"])
def test_a_folder_where_nothing_was_trained_becomes_any_run(run, content):
    (run / "metrics.jsonl").write_text("")
    if content is not None:
        (run / "resolved.yaml").write_text(content)
    check_folder(run, STORED | {"temperature": 3, "num_processes": 7}, INPUTS)


def test_defaults_are_those_of_the_dataclasses(tmp_path):
    config = OPRDConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, optim="sgd")
    assert default_settings(config, RunArguments())["optim"] == "adamw_torch_fused"
    assert resolved_settings(config)["optim"] == "sgd"
    assert resolved_settings(config)["lr_scheduler_type"] == "cosine"


# What the keys name


def changed(key, **parts):
    return INPUTS | {key: INPUTS[key] | parts}


@pytest.mark.parametrize(
    ("key", "part"),
    [("model_name_or_path", "weights"), ("model_name_or_path", "tokenizer"), ("dataset_name", "rows")],
)
def test_what_was_replaced_in_place_is_refused(run, key, part):
    was = INPUTS[key][part]
    with pytest.raises(
        UserError, match=rf"whose {key}: {STORED[key]} has been changed since \({part}: {was}, now zz\)"
    ):
        check_folder(run, STORED, changed(key, **{part: "zz"}))


def test_the_same_content_may_have_another_name(run):
    check_folder(run, STORED | {"model_name_or_path": "copy", "dataset_name": "copy.jsonl"}, INPUTS)
    with pytest.raises(UserError, match="with model_name_or_path: student, not copy"):
        check_folder(run, STORED | {"model_name_or_path": "copy"}, changed("model_name_or_path", weights="z"))


def test_a_record_without_fingerprints_compares_names(run, caplog):
    edit(run, lambda record: record.pop("inputs"))
    check_folder(run, STORED, INPUTS)
    assert "has no fingerprints of dataset_name, model_name_or_path: only names are compared" in caplog.text
    with pytest.raises(UserError, match="with model_name_or_path: student, not copy"):
        check_folder(run, STORED | {"model_name_or_path": "copy"}, INPUTS)
