"""What of a run folder's settings may differ when it is resumed, and what is another run."""

import pytest

from oprd.errors import UserError
from oprd.folder.run import check_folder, write_resolved

STORED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_processes": 1}


@pytest.fixture
def run(tmp_path):
    write_resolved(tmp_path, STORED)
    return tmp_path


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
        {"num_processes": 4, "gradient_accumulation_steps": 1},
        {"num_processes": 2, "per_device_train_batch_size": 1},
    ],
    ids=str,
)
def test_how_a_run_is_carried_out_may_change(run, changes):
    check_folder(run, STORED | changes)


@pytest.mark.parametrize(
    "key", ["vllm_importance_sampling_correction", "temperature", "lora_r", "output_loss", "bf16"]
)
def test_what_a_run_computes_may_not(run, key):
    with pytest.raises(UserError, match=f"holds a run with {key}: None, not 3: choose another output_dir"):
        check_folder(run, STORED | {key: 3})


@pytest.mark.parametrize("key", STORED)
def test_nor_may_the_rollouts_of_a_step(run, key):
    more = STORED | {key: 2 * STORED[key]}
    with pytest.raises(UserError, match="a run of 8 rollouts per step, and this would be 16: keep"):
        check_folder(run, more)
