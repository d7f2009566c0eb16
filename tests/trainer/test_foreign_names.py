"""What we override or use of other libraries' private names is there, and used in the modules for it alone.

A name that a new version renames would be overridden by nobody, and nothing would say so.
"""

import ast
import functools
import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from accelerate import Accelerator, cpu_offload
from torch._subclasses import FakeTensorMode
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaModel, PreTrainedModel, Trainer
from transformers.integrations import deepspeed
from trl import DistillationConfig
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import RepeatSampler

import oprd
from oprd.foundation.foreign.accelerate import is_dispatched
from oprd.foundation.foreign.deepspeed import is_partitioned, partition
from oprd.foundation.foreign.sympy import known_bits
from oprd.foundation.foreign.torch import ATTENTION_KERNELS, is_fake, note_rates
from oprd.foundation.foreign.tqdm import open_bars
from oprd.foundation.foreign.transformers import (
    attention_of,
    checkpoint_of,
    checkpointing_restored,
    hands_on_lengths,
    is_recurrent,
    load_report_kept,
    loaded_whole,
    set_checkpoint,
    with_attention,
)
from oprd.foundation.foreign.vllm import keep_linear_weights
from oprd.training.epoch_sampler import EpochSampler
from oprd.training.foreign_trl import taken_as_loaded, training_engines
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
    (Trainer, "_save"): ("output_dir", "state_dict"),
    (Trainer, "_get_output_dir"): ("trial",),
    (VLLMGeneration, "sync_weights"): (),
    (VLLMGeneration, "generate"): ("prompts", "images", "num_generations", "profiler"),
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


# The modules of foreign names

SOURCES = Path(oprd.__file__).parent
FOREIGN = (
    *sorted((SOURCES / "foundation" / "foreign").glob("*.py")),
    SOURCES / "training" / "foreign_trl.py",
)
ELSEWHERE = {  # what other modules may use, by name
    "_replace": "a documented method of named tuples",
    "_VALID_DICT_FIELDS": "OPRDConfig extends this list of the base class, which overrides it",
}


def private_names(path: Path) -> dict[str, int]:
    """Private names that a module uses of anything but `self`, `cls` and `super()`, with a line of each.

    Strings count too, unless they are keys of the mappings or elements of the collections that hold them.
    """
    found: dict[str, int] = {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls", "super()"):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [part for a in node.names for part in f"{node.module or ''}.{a.name}".split(".")]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            names = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
        found |= {n: node.lineno for n in names if n.startswith("_") and not n.startswith("__")}
    return found


def own_names() -> set[str]:
    """The private names that our sources define."""
    own: set[str] = set()
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return own


def test_private_names_of_others_stand_in_the_modules_for_them():
    own, found = own_names(), {}
    for path in SOURCES.rglob("*.py"):
        if path in FOREIGN:
            continue
        used = private_names(path).items()
        found |= {f"{path.name}:{line}": name for name, line in used if name not in own | ELSEWHERE.keys()}
    assert found == {}


def test_each_of_them_says_what_would_end_it():
    for path in FOREIGN:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                told = ast.get_docstring(node) or ""
                assert "ntil" in told or "see `" in told or "ends this" in told, node.name


def test_a_fake_tensor_is_told_from_others():
    with FakeTensorMode():
        assert is_fake(torch.zeros(2))
    assert not is_fake(torch.zeros(2)) and not is_fake(torch.zeros(2, device="meta"))


def test_the_kernels_of_attention_return_its_output_and_a_number_per_row():
    for kernel in ATTENTION_KERNELS:
        output, log_sum, *_ = [str(value.type) for value in kernel._schema.returns]
        assert (output, log_sum) == ("Tensor", "Tensor"), kernel
        assert [argument.name for argument in kernel._schema.arguments][:3] == ["query", "key", "value"]


def test_a_schedule_keeps_its_rates_where_we_set_them():
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([parameter], lr=0.5), 1.0)
    note_rates(schedule, [0.25])
    assert schedule.get_last_lr() == [0.25] and schedule.state_dict()["_last_lr"] == [0.25]


@pytest.fixture
def llama():
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))


def test_a_models_attention_is_known(llama):
    assert attention_of(llama.config) == "sdpa"
    assert (
        attention_of(with_attention(llama.config, "eager")) == "eager"
        and attention_of(llama.config) == "sdpa"
    )
    llama.set_attn_implementation("eager")
    assert attention_of(llama.config) == "eager"


def test_what_classes_say_of_themselves_is_known(llama):
    assert {"_is_stateful", "_supports_attention_backend"} <= vars(PreTrainedModel).keys()
    recurrent = MambaModel(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=4))
    assert is_recurrent(recurrent) and not hands_on_lengths(recurrent)
    assert hands_on_lengths(llama.model) and not is_recurrent(llama.model)


def test_blocks_run_through_what_is_set(llama):
    """By the very call that our function of it relies on: the block, then all it is given."""
    block = llama.model.layers[0]
    assert not block.gradient_checkpointing
    calls = []

    def through(function: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(function)
        return function(*args, **kwargs)

    with checkpointing_restored(llama):
        llama.train().gradient_checkpointing_enable({"use_reentrant": False})
        assert checkpoint_of(block).keywords == {"use_reentrant": False}
        set_checkpoint(block, through)
        llama(input_ids=torch.ones(1, 2, dtype=torch.long))
    assert len(calls) == 1 and not block.gradient_checkpointing


def test_a_deepspeed_config_is_forgotten_and_known_again():
    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = stands = lambda: None
    try:
        with loaded_whole():
            assert deepspeed._hf_deepspeed_config_weak_ref is None
        assert deepspeed._hf_deepspeed_config_weak_ref is stands
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def test_the_table_of_weights_that_do_not_fit_is_kept_out_of_the_log(llama, tmp_path, caplog):
    llama.save_pretrained(tmp_path)
    with load_report_kept() as rows, pytest.raises(RuntimeError), caplog.at_level(logging.INFO):
        LlamaForCausalLM.from_pretrained(tmp_path, vocab_size=17)
    assert "has the shape [16, 16] in the file and [17, 16] in the model" in " ".join(rows)
    assert "LOAD REPORT" not in caplog.text


def test_a_dispatched_model_is_known(llama):
    assert not is_dispatched(llama)
    cpu_offload(llama, torch.device("cpu"))
    assert is_dispatched(llama) and is_dispatched(llama.get_output_embeddings())


def test_gradients_are_told_to_wait_by_a_public_name():
    """Under DeepSpeed; `Accelerator.sync_gradients` sets what `accelerator.backward` reads."""
    accelerator = Accelerator(cpu=True)
    before = accelerator.sync_gradients
    accelerator.sync_gradients = False
    assert accelerator.gradient_state.sync_gradients is False
    accelerator.sync_gradients = before


def test_a_partitioned_weight_is_known():
    weight = torch.nn.Parameter(torch.zeros(0))
    assert not is_partitioned(weight) and partition(weight) is weight
    weight.ds_id, weight.ds_tensor = 3, torch.ones(2)
    assert is_partitioned(weight) and partition(weight) is weight.ds_tensor


def test_bars_that_are_open_are_found():
    with tqdm(total=1, disable=False) as bar:
        assert bar in open_bars()
    assert bar not in open_bars()


def test_the_bits_that_are_known_of_a_number():
    assert known_bits(sympy.N(sympy.pi, 30)) > 90
    zero = sympy.N(sympy.sin(1) ** 2 + sympy.cos(1) ** 2 - 1, 30)
    assert zero == 0 or known_bits(zero) < 20


def test_vllm_has_the_switch_that_is_set():
    kernels = pytest.importorskip("vllm._custom_ops")
    assert isinstance(kernels._supports_onednn, bool)
    keep_linear_weights()
    assert kernels._supports_onednn is False


def test_trl_makes_its_engine_of_the_name_that_is_replaced(monkeypatch):
    assert "LLM(" in inspect.getsource(VLLMGeneration)
    monkeypatch.setattr(vllm_generation, "LLM", kept := object(), raising=False)
    with training_engines():
        assert callable(vllm_generation.LLM)
    assert vllm_generation.LLM is kept


def test_the_arguments_of_loading_come_back(tmp_path):
    settings = DistillationConfig(
        str(tmp_path), model_init_kwargs={"dtype": "float32"}, use_cpu=True, bf16=False
    )
    with taken_as_loaded(settings):
        assert settings.model_init_kwargs is None
    assert settings.model_init_kwargs == {"dtype": "float32"}


def test_the_names_of_mappings_among_a_configs_keys():
    assert {"model_init_kwargs", "lr_scheduler_kwargs"} <= set(DistillationConfig._VALID_DICT_FIELDS)
