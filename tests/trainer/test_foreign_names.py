"""What we override or use of TRL's, transformers', accelerate's and torch's private names is there.

A name that a new version renames would be overridden by nobody, and nothing would say so.
"""

import functools
import inspect
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from transformers import Trainer
from trl.trainer.utils import RepeatSampler

from oprd.training.epoch_sampler import EpochSampler
from oprd.training.trainer import OPRDTrainer

SEVERAL = ("args", "kwargs")
OVERRIDDEN = {  # a method that we define, and the parameters that the libraries' own has
    "_get_train_sampler": ("dataset",),
    "create_model_card": ("model_name", "dataset_name", "tags"),
    "train": ("resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
    "_run_epoch": (
        *("model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch"),
        *("trial", "ignore_keys_for_eval", "start_time", "resume_from_checkpoint"),
        *("epochs_trained", "steps_trained_in_current_epoch"),
    ),
    "save_model": ("output_dir", "_internal_call"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_best_model": (),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_rng_state": ("checkpoint",),
    "_save_checkpoint": ("model", "trial"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "prediction_step": ("model", "inputs", "prediction_loss_only", "ignore_keys"),
    "_get_grad_norm": ("model", "grad_norm"),
    "_tokenize_prompts": ("prompts",),
    "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields", "has_tool_images"),
    "_generate_and_score_completions": ("inputs",),
    "_prepare_inputs": ("generation_batch",),
}
USED = {  # a method that we call
    (GradientState, "_set_sync_gradients"): ("sync_gradients",),
    (Trainer, "_save"): ("output_dir", "state_dict"),
    (Trainer, "_get_output_dir"): ("trial",),
    (RepeatSampler, "__init__"): (
        *("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed"),
    ),
}
SET = [  # what the libraries' trainer has set when it is made, and we read or set
    *("_tokenizer", "_is_vlm", "_metrics", "_step", "_buffered_inputs", "_forward_redirection"),
    *("generation_config", "generation_kwargs", "chat_template", "chat_template_kwargs", "tools"),
    *("shuffle_dataset", "use_vllm", "max_completion_length", "pad_to_multiple_of", "model_wrapped"),
]


def is_ours(cls: type) -> bool:
    return cls.__module__.startswith("oprd.")


def overridden(cls: type) -> dict[str, Any]:
    """By name, the libraries' own of each method that our classes define again."""
    found = {}
    theirs = [base for base in cls.__mro__ if not is_ours(base)]
    for name in {
        name for base in cls.__mro__ if is_ours(base) for name, v in vars(base).items() if callable(v)
    }:
        own = next((vars(base)[name] for base in theirs if name in vars(base)), None)
        if own is not None and not name.startswith("__"):
            found[name] = own
    return found


def parameters(function: Any) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(function).parameters if name not in ("self", *SEVERAL))


def test_each_override_has_the_signature_that_we_know():
    found = {name: parameters(own) for name, own in overridden(OPRDTrainer).items()}
    assert found == OVERRIDDEN


@pytest.mark.parametrize(("owner", "name"), USED, ids=lambda value: getattr(value, "__name__", value))
def test_each_private_method_that_is_called_takes_what_we_give(owner, name):
    assert parameters(getattr(owner, name)) == USED[owner, name]


def test_the_trainer_has_what_we_read_of_it(make_trainer):
    values = vars(make_trainer())
    assert [name for name in SET if name not in values] == []


def test_each_override_is_called(make_trainer, monkeypatch, tmp_path, dataset):
    """In a run that packs, evaluates, saves and is resumed; those of sharded runs have tests of their own."""
    called = set()
    for name in OVERRIDDEN:
        owner = next(base for base in OPRDTrainer.__mro__ if name in vars(base))
        own = vars(owner)[name]

        def spied(*args: Any, own: Any = own, name: str = name, **kwargs: Any) -> Any:
            called.add(name)
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, name, functools.wraps(own)(spied))
    settings = {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    }
    held_out = dataset.select(range(4))
    make_trainer(**settings, extra={"eval_dataset": held_out}).train()
    make_trainer(**settings | {"max_steps": 3}, extra={"eval_dataset": held_out}).train(True)
    assert OVERRIDDEN.keys() - called == set()


def test_the_sampler_is_seeded_by_epoch():
    """TRL's sampler draws from `generator`, which ours seeds anew."""
    epoch, settings = [0], {"mini_repeat_count": 1, "batch_size": 2, "shuffle": True, "seed": 3}
    sampler = EpochSampler(epoch=lambda: epoch[0], data_source=list(range(8)), **settings)
    first, again = list(sampler), list(sampler)
    epoch[0] = 1
    assert first == again != list(sampler)


def test_a_schedule_keeps_its_rates_where_we_set_them():
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([parameter], lr=0.5), 1.0)
    schedule._last_lr = [0.25]
    assert schedule.get_last_lr() == [0.25]
