"""`oprd bridge`: prompts, student rollouts, both models' states of the same text, one fit, one folder.

The folder holds `bridge.safetensors`, `report.json`, three plots and `resolved.yaml`.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from oprd.bridge.artifact import BRIDGE_FILE, Bridge
from oprd.bridge.fitter import BridgeFitter, rows_needed
from oprd.bridge.identity import identity
from oprd.bridge.model_pair import ModelPair
from oprd.bridge.plots import plot_bridge
from oprd.bridge.recipe import BridgeArguments
from oprd.bridge.report import REPORT_FILE, report_is_of, write_report
from oprd.folders.claims import OF_A_RUN, check_foreign
from oprd.folders.fingerprint import model_fingerprints, rows_fingerprint
from oprd.folders.lock import hold
from oprd.folders.run_folder import (
    RESOLVED_FILE,
    Inputs,
    check_folder,
    default_settings,
    resolved_settings,
    write_resolved,
)
from oprd.foundation.errors import UserError
from oprd.foundation.ranks import Ranks, joined_ranks
from oprd.models.forward import StateRequest, read_states
from oprd.models.lengths import fitting_length, run_readers
from oprd.models.trial import try_states
from oprd.objective.selection import Positions
from oprd.objective.terms import TERMS
from oprd.rollouts.generation import Engine, Rollout, Sampling, left_pad
from oprd.rollouts.intake import usable_prompts
from oprd.rollouts.progress import tokens_shown
from oprd.rollouts.prompts import load_prompts
from oprd.rollouts.rows import RolloutBatch, RolloutInputs, each, readable

logger = logging.getLogger(__name__)

READING_KEYS = ("final_norm", "teacher_chat_template", "teacher_tokenization")


def fit_bridge(args: BridgeArguments) -> Path:
    """Fit the bridge of a recipe, or leave a finished one alone; returns its folder.

    Under torchrun every process takes its share of the rollouts, and the first one fits. Raises `UserError`
    for what the user can fix, with nothing written.
    """
    folder = Path(args.output_dir)
    prompts = _rows(args)
    inputs = _inputs_of(args, prompts)
    with joined_ranks() as ranks:
        bridge = _fitted(args, inputs)
        if bridge is not None and report_is_of(folder, bridge):
            logger.warning("%s holds this bridge: nothing to do", folder)
            return folder
        with hold(folder, "oprd bridge", ranks.is_first, lambda refusal: ranks.gather(refusal)[0]):
            bridge = _fitted(args, inputs)  # by a process that has just let go of it
            if bridge is None:
                _fit(args, prompts, inputs, ranks)
            elif ranks.is_first:
                logger.warning("%s/%s is missing or was changed: it is written again", folder, REPORT_FILE)
                write_report(folder, bridge)
    return folder


def _fitted(args: BridgeArguments, inputs: Inputs) -> Bridge | None:
    """The bridge in its folder; raises `UserError` for another's folder, and for a bridge that is damaged."""
    folder = Path(args.output_dir)
    check_foreign(folder, RESOLVED_FILE, ("config.json", *OF_A_RUN))
    check_folder(folder, resolved_settings(args), inputs, default_settings(args))
    if not (folder / BRIDGE_FILE).exists():
        return None
    try:
        return Bridge.load(folder)
    except UserError as error:
        raise UserError(f"{error}: delete {BRIDGE_FILE} and run the same command") from error


def _fit(args: BridgeArguments, prompts: Dataset, inputs: Inputs, ranks: Ranks) -> None:
    folder = Path(args.output_dir)
    pair = ModelPair.load(args, ranks.device)
    engine = pair.engine(args, ranks)
    prompts, longest = _prompts(prompts, args, pair, ranks)
    args.sampling = _fitting_sampling(args, pair, longest)
    _check_rows(args, pair, len(prompts))
    fitter, layer_map = pair.fitter(args)
    try_states("student", pair.student, fitter.student_layers, args.final_norm)
    pair.teacher.try_states(fitter.teacher_layers, args.final_norm, pair.student.device)
    counts = accumulate(fitter, pair, prompts, args, engine, ranks)
    if not ranks.is_first:
        return
    if layer_map is None:
        layer_map = fitter.best_layer_map()
        logger.info("best layer map: %s", ",".join(f"{s}={t}" for s, t in layer_map.pairs))
    bridge = fitter.fit(args.chosen_rank, layer_map=layer_map)
    origin = _origin(args, pair, counts, fitter, engine)
    bridge = replace(bridge, metadata=bridge.metadata | origin)
    write_resolved(folder, resolved_settings(args), inputs)
    write_report(folder, bridge)
    plot_bridge(bridge.metadata, folder)
    bridge.save(folder)


def accumulate(
    fitter: BridgeFitter,
    pair: ModelPair,
    prompts: Dataset,
    args: BridgeArguments,
    engine: Engine,
    ranks: Ranks,
) -> Counter[str]:
    """Roll out every prompt and give the fitter both models' states; returns what was counted.

    Batches go to the ranks round-robin. In the end every rank has the moments of all batches.
    """
    counts: Counter[str] = Counter()
    total = len(prompts) * args.num_generations
    with tqdm(
        total=total, desc="bridge", unit="rollout", dynamic_ncols=True, disable=not ranks.is_first
    ) as progress:
        for number, (texts, rendered) in enumerate(_batches(prompts, pair, args)):
            if number % ranks.count == ranks.index:
                first = number * args.batch_size
                with tokens_shown(progress, "rollouts", pair.student, args.max_completion_length):
                    # To the seed vLLM adds 0, 1, …
                    rollouts = engine.generate(rendered, args.sampling, args.seed + first)
                ids = torch.arange(first, first + len(rollouts))
                counts.update(_update(fitter, pair, texts, rollouts, ids, args))
                if number == ranks.index:  # twice what the first ones have would be a surprise
                    _check_rows(args, pair, len(prompts), 2 * fitter.num_rows / len(rollouts))
            progress.update(len(texts))
    if ranks.count > 1:
        fitter.gather()
    total_counts: Counter[str] = Counter()
    for here in ranks.gather(counts):
        total_counts.update(here)  # a sum of counters would drop what was never seen
    return total_counts


def _check_rows(
    args: BridgeArguments, pair: ModelPair, num_prompts: int, rows_per_rollout: float | None = None
) -> None:
    """Raise `UserError` if the rollouts cannot have the rows that the fit needs.

    A rollout is taken to have `rows_per_rollout` paired rows, or else as many as the recipe lets it have.
    """
    longest = Positions.parse(args.positions).mask(
        torch.ones(1, args.sampling.max_new_tokens, dtype=torch.bool)
    )
    each = float(longest.sum()) if rows_per_rollout is None else rows_per_rollout
    widest = max(pair.student.config.get_text_config().hidden_size, pair.teacher.width)
    rows, needed = int(num_prompts * args.num_generations * each), rows_needed(widest)
    if rows < needed:
        raise UserError(
            f"{num_prompts} prompts × {args.num_generations} rollouts of {each:.0f} rows are {rows} rows, "
            f"and states {widest} wide need at least {needed}: raise num_prompts, num_generations or "
            "max_completion_length"
        )


def _inputs_of(args: BridgeArguments, prompts: Dataset) -> Inputs:
    """Fingerprints of what a bridge is fitted from, by the keys that name it."""
    names = ("model_name_or_path", "teacher_model_name_or_path")
    trusted = args.trust_remote_code
    models = {key: model_fingerprints(getattr(args, key), trust_remote_code=trusted) for key in names}
    return models | {"dataset_name": {"rows": rows_fingerprint(prompts)}}


def _rows(args: BridgeArguments) -> Dataset:
    place = args.dataset_name, args.dataset_train_split, args.dataset_config
    return load_prompts(*place, args.drop_unrenderable_prompts, answers=False)


def _prompts(
    prompts: Dataset, args: BridgeArguments, pair: ModelPair, ranks: Ranks
) -> tuple[Dataset, list[int]]:
    """The prompts to roll out, and the longest that the dataset has for each reader."""
    drops = args.drop_unrenderable_prompts
    readers = [pair.renderer(args)]
    if not pair.translation.is_identity:
        readers.append(pair.translation.renderer(pair.teacher.vocabulary))
    usable = usable_prompts(prompts, readers, args.max_prompt_length, drop_unrenderable=drops, ranks=ranks)
    prompts = usable.dataset
    if len(prompts) < args.num_prompts:
        logger.warning("the dataset has %d prompts, fewer than num_prompts: all are used", len(prompts))
    chosen = prompts.shuffle(seed=args.seed).select(range(min(args.num_prompts, len(prompts))))
    return chosen, usable.lengths.max(axis=1).tolist()


def _fitting_sampling(args: BridgeArguments, pair: ModelPair, longest: Sequence[int]) -> Sampling:
    """The recipe's sampling, its default length lowered to what both models have positions for."""
    configs = pair.student.config, pair.teacher.model.config
    who = run_readers(*configs, longest, are_its_own=pair.translation.aligner is None)
    asked = args.max_completion_length
    length = fitting_length(who, asked, is_default=asked == BridgeArguments.max_completion_length)
    return replace(args.sampling, max_new_tokens=length)


def _batches(
    prompts: Dataset, pair: ModelPair, args: BridgeArguments
) -> Iterator[tuple[list[Any], list[list[int]]]]:
    """Prompts, each as often as it is rolled out, as they are and as the student's token ids."""
    render = pair.renderer(args)
    repeated = [prompt for prompt in prompts["prompt"] for _ in range(args.num_generations)]
    for start in range(0, len(repeated), args.batch_size):
        texts = repeated[start : start + args.batch_size]
        yield texts, render(texts)


@torch.no_grad()
def _update(
    fitter: BridgeFitter,
    pair: ModelPair,
    prompts: list[Any],
    rollouts: list[Rollout],
    rollout_ids: torch.Tensor,
    args: BridgeArguments,
) -> dict[str, int]:
    """Give the fitter the paired rows of one batch of rollouts; returns counts."""
    inputs, counts = _inputs(pair, prompts, rollouts)
    supervised = inputs["completion_mask"].bool()
    if "teacher_rows" in inputs:
        supervised &= inputs["teacher_rows"] >= 0
    else:
        supervised &= readable(inputs["completion_ids"], pair.teacher.vocabulary)
    mask = Positions.parse(args.positions).mask(supervised)
    weights = cast(RolloutInputs, {f"{term}_weights": mask.float() for term in TERMS})
    batch = RolloutBatch.of(inputs | weights)
    requests = [
        StateRequest(fitter.student_layers, mask, args.final_norm),
        StateRequest(fitter.teacher_layers, batch.on_teacher(mask), args.final_norm),
    ]
    (student,) = read_states(pair.student, batch.student, requests[:1])
    (teacher,) = pair.teacher.read(batch.teacher, requests[1:])
    fitter.update(student, teacher, rollout_ids.repeat_interleave(mask.sum(-1).cpu()))
    return counts


def _inputs(
    pair: ModelPair, prompts: list[Any], rollouts: list[Rollout]
) -> tuple[RolloutInputs, dict[str, int]]:
    """The padded tensors that a batch is read from, as TRL's trainer would give them, and counts."""
    device, pad = pair.student.device, pair.tokenizer.pad_token_id or 0
    responses = [torch.tensor(rollout.response_ids) for rollout in rollouts]
    prompt_ids, prompt_mask = left_pad([rollout.prompt_ids for rollout in rollouts], pad)
    inputs: RolloutInputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": pad_sequence(responses, batch_first=True, padding_value=pad),
        "completion_mask": pad_sequence([torch.ones_like(r) for r in responses], batch_first=True),
    }
    counts = {
        "rollouts": len(rollouts),
        "rows": sum(map(len, responses)),
        "truncated": sum(rollout.truncated for rollout in rollouts),
    }
    completions = inputs["completion_ids"], inputs["completion_mask"]
    read, aligned = pair.translation.read(prompts, *completions, pair.teacher.room)
    inputs |= read
    if aligned:
        counts["paired_rows"] = sum(len(response.rows) for response in aligned)
        counts["invalid_utf8"] = sum(response.invalid_utf8 for response in aligned)
        counts["collapsed_alignment"] = sum(response.collapsed for response in aligned)
    return each(inputs, lambda _, tensor: tensor.to(device)), counts


def _origin(
    args: BridgeArguments, pair: ModelPair, counts: Counter[str], fitter: BridgeFitter, engine: Engine
) -> dict[str, Any]:
    """Where a bridge comes from: models, text, settings, and how alike all layers are."""
    paired = counts["paired_rows"] if "paired_rows" in counts else counts["rows"]
    return {
        "student": identity(pair.student, pair.tokenizer) | {"name": args.model_name_or_path},
        "teacher": identity(pair.teacher.model, pair.teacher.tokenizer)
        | {"name": args.teacher_model_name_or_path},
        "reading": {name: getattr(args, name) for name in READING_KEYS}
        | {"chat_template_kwargs": args.template_kwargs}
        | {"teacher_chat_template_kwargs": args.teacher_template_kwargs},
        "data": {"dataset": args.dataset_name, "coverage": paired / counts["rows"], **counts}
        | {"engine": engine.name},
        "settings": resolved_settings(args),
        "cka": {f"{s}={t}": value for (s, t), value in fitter.cka().items()},
    }
