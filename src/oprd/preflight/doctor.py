"""`oprd doctor RECIPE`: checks a recipe on this machine, and plans the memory, before a run starts."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PreTrainedTokenizerBase

from oprd.folders.run_folder import default_settings, holds_results, output_folder, resolved_settings
from oprd.foundation.meters import MB
from oprd.foundation.ranks import Ranks
from oprd.models.init_kwargs import hub_kwargs, student_kwargs, teacher_kwargs
from oprd.models.lengths import fitting_length, run_readers
from oprd.models.loading import base_model, load_tokenizer, resolve_model
from oprd.objective.settings import mapping
from oprd.preflight.checks import Finding, check_disk, check_engine, check_output, checked
from oprd.preflight.longest import Longest
from oprd.preflight.planning.footprint import ORDER
from oprd.preflight.planning.knobs import Knob, advice, first_knob
from oprd.preflight.planning.machine import Machine
from oprd.preflight.planning.memory_plan import MemoryPlan, plan_memory
from oprd.rollouts.intake import prompts_per_step, settle_steps, usable_prompts
from oprd.rollouts.prompts import load_prompts
from oprd.rollouts.translation import Translation
from oprd.text.rendering import Renderer
from oprd.training.config import OPRDConfig
from oprd.training.run_arguments import RunArguments
from oprd.training.train import prompts_of, rows_streamed, run_inputs

AMPLE = 0.8  # of the free memory: a run that takes less has room, and nothing needs turning


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found."""

    plan: MemoryPlan
    machine: Machine
    knob: Knob | None
    findings: tuple[Finding, ...]

    @property
    def is_well(self) -> bool:
        """Whether nothing that was looked at would make the run fail."""
        return all(finding.is_well for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain values; sizes in 10⁶ bytes."""
        parts = {
            phase: {part: size / MB for part, size in getattr(self.plan, phase).items()}
            for phase in ("rollout", "update")
        }
        return {
            "is_well": self.is_well,
            "findings": [asdict(finding) for finding in self.findings],
            "device": "gpu" if self.machine.is_gpu else self.machine.device.type,
            "ranks": self.machine.ranks,
            "sharded": self.machine.sharded,
            "free_mb": self.machine.free_bytes / MB,
            "rollout_peak_mb": self.plan.rollout_mb,
            "update_peak_mb": self.plan.update_mb,
            "peak_mb": self.plan.peak_mb,
            "parts_mb": parts,
            "first_knob": asdict(self.knob) if self.knob else None,
        }


def examine(
    run: RunArguments,
    config: OPRDConfig,
    ranks: int | None = None,
    gpu_bytes: int | None = None,
    tell: Callable[[Finding], None] = lambda _: None,
) -> Diagnosis:
    """Look at a recipe on this machine, or for other GPUs of `gpu_bytes`; `tell` each finding as it is made.

    What could be turned is planned only where memory is short. Raises `UserError` for what a run would
    refuse.
    """
    findings: list[Finding] = []

    def found(finding: Finding) -> None:
        findings.append(finding)
        tell(finding)

    longest, count = longest_rollout(run, config, ranks or Ranks.launched().count)
    machine = (
        Machine.here(config, ranks)  # beside the prompts
        if gpu_bytes is None
        else Machine.with_gpus(gpu_bytes, config, ranks)
    )
    settle_steps(config, count, machine.ranks)
    folder = output_folder(config)
    settings = resolved_settings(config, run) | {"num_processes": machine.ranks}
    found(Finding("recipe", f"{run.model_name_or_path} learns from {config.teacher_model_name_or_path}"))
    found(Finding("prompts", f"{count}, the longest of {len(longest.prompt_ids)} tokens"))
    found(Finding("rollouts", f"up to {len(longest.response_ids)} tokens after the prompt"))
    if gpu_bytes is None:
        found(checked("engine", lambda: check_engine(config)))
        inputs = run_inputs(run, config, prompts_of(run, config)) if holds_results(folder) else {}
        defaults = default_settings(config, run)
        found(checked("folder", lambda: check_output(folder, settings, inputs, defaults)))
    plan = plan_memory(run.model_name_or_path, config, longest, machine, run.lora)
    if gpu_bytes is None:
        found(checked("disk", lambda: check_disk(folder, config, plan, run.load_best)))
    knob = None
    if plan.peak_mb * MB > AMPLE * machine.free_bytes:
        knob = first_knob(run.model_name_or_path, config, longest, machine, plan, run.lora)
    found(_memory(plan, machine, knob))
    return Diagnosis(plan, machine, knob, tuple(findings))


def longest_rollout(run: RunArguments, config: OPRDConfig, ranks: int = 1) -> tuple[Longest, int]:
    """The longest rollout of a recipe, and how many prompts it can use.

    Raises `UserError` for data, batches or lengths that a run on this number of ranks would refuse.
    """
    tokenizer, ours = _tokenizer(run.model_name_or_path, student_kwargs(config))
    assert config.teacher_model_name_or_path is not None  # or the recipe would have been refused
    teacher, theirs = _tokenizer(config.teacher_model_name_or_path, teacher_kwargs(config))
    translation = Translation(
        tokenizer,
        teacher,
        config.teacher_chat_template,
        config.teacher_tokenization,
        config.teacher_chat_template_kwargs,
    )
    vocabulary = ours.get_text_config().vocab_size
    kwargs = mapping("chat_template_kwargs", config.chat_template_kwargs)
    readers = [Renderer(tokenizer, kwargs, vocabulary=vocabulary)]
    if not translation.is_identity:
        readers.append(translation.renderer(theirs.get_text_config().vocab_size))
    streamed, drops = rows_streamed(run, config, ranks), config.drop_unrenderable_prompts
    place = run.dataset_name, run.dataset_train_split, run.dataset_config
    rows = load_prompts(*place, drops, streamed, answers=False)
    prompts = usable_prompts(rows, readers, config.max_prompt_length, prompts_per_step(config, ranks), drops)
    length = config.max_completion_length
    if length is not None:
        longest = prompts.lengths.max(axis=1).tolist()
        who = run_readers(ours, theirs, longest, are_its_own=translation.aligner is None)
        length = fitting_length(who, length, length == OPRDConfig.max_completion_length)
    return Longest.of(prompts, readers[0], length, teacher, translation), len(prompts.dataset)


def _tokenizer(name: str, given: dict[str, Any]) -> tuple[PreTrainedTokenizerBase, Any]:
    """The tokenizer and the config of a model."""
    shared = hub_kwargs(given)
    located = resolve_model(name, **shared)
    config = AutoConfig.from_pretrained(base_model(located), **shared)
    return load_tokenizer(located, **shared), config


def _memory(plan: MemoryPlan, machine: Machine, knob: Knob | None) -> Finding:
    room = f"{_named(machine)} has {machine.free_bytes / MB:,.0f} MB"
    says = f"{plan.peak_mb:,.0f} MB live on a rank, and {room}"
    if not machine.is_gpu:
        says += " (freed blocks that malloc keeps come on top: oprd train --dry_run measures)"
    fits = plan.peak_mb * MB <= machine.free_bytes
    return Finding(
        "memory", f"{says}: {'it fits' if fits else f'it does not fit; {advice(plan, knob)}'}", fits
    )


def _named(machine: Machine) -> str:
    if machine.device.type == "cpu":
        return "such a GPU" if machine.is_gpu else "this machine"
    return f"this {torch.cuda.get_device_name(machine.device)}"


def show_finding(finding: Finding) -> None:
    """Print one finding."""
    mark = "ok  " if finding.is_well else "BAD "
    Console().print(f"{mark} {finding.about}: {finding.says}", soft_wrap=True, markup=False)


def show_memory(diagnosis: Diagnosis) -> None:
    """Print the memory by part and, where it is nearly all taken, what could be turned."""
    console = Console()
    console.print(memory_table(diagnosis.plan))
    if diagnosis.is_well and diagnosis.knob is not None:
        console.print(f"If memory runs short: {advice(diagnosis.plan, diagnosis.knob)}.", soft_wrap=True)


def memory_table(plan: MemoryPlan) -> Table:
    """MB by part, at the fullest moments of a step's rollouts and of its update."""
    table = Table("MB on one rank, at most", title="Memory plan", title_justify="left")
    for column in ("rollouts", "update"):
        table.add_column(column, justify="right")
    for part in ORDER:
        sizes = [phase.get(part, 0) / MB for phase in (plan.rollout, plan.update)]
        if max(sizes) >= 0.05:
            table.add_row(part, *(f"{size:,.1f}" for size in sizes))
    table.add_section()
    table.add_row("sum", f"{plan.rollout_mb:,.1f}", f"{plan.update_mb:,.1f}")
    return table
