"""The trainer's rollouts: generation, the teacher's tokens, row weights, metrics, packing."""

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DistillationTrainer

from oprd.folders.recorder import Recorder
from oprd.foundation.errors import UserError
from oprd.foundation.foreign.transformers import checkpointing_restored, old_names_unheard
from oprd.foundation.meters import MemoryMeter
from oprd.foundation.ranks import Ranks
from oprd.models.finite import check_loaded, check_trained, finite_logits
from oprd.models.generation_config import generation_config_aside, options_aside
from oprd.models.lengths import fitting_length, run_readers
from oprd.models.loading import eval_mode
from oprd.models.padding import check_sharded, generation_batches, in_batches
from oprd.models.sharding.fsdp import Sharding
from oprd.models.teacher import Teacher
from oprd.objective.settings import mapping
from oprd.rollouts.engines.staleness import FixedText, check_gap, check_moved_alone, log_prob_gaps
from oprd.rollouts.engines.student import StudentEngine
from oprd.rollouts.intake import prompts_per_step, usable_prompts
from oprd.rollouts.packing import repack
from oprd.rollouts.progress import tokens_shown
from oprd.rollouts.repetition import distinct_share
from oprd.rollouts.rows import RolloutBatch, RolloutInputs, each, on_host, truncated_rollouts, weigh_rows
from oprd.rollouts.translation import Translation
from oprd.text.alignment import AlignedResponse
from oprd.text.rendering import Renderer
from oprd.training.config import OPRDConfig
from oprd.training.step import Update
from oprd.training.supervision import COUNTED_TERMS, SupervisionWatch

logger = logging.getLogger(__name__)


class RolloutTrainer(DistillationTrainer):
    """TRL's trainer, extended between its rollouts and the update: teacher inputs, row weights, packing."""

    args: OPRDConfig
    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase
    vllm_generation: Any
    eos_token_ids: list[int]
    memory: MemoryMeter
    update: Update
    translation: Translation
    renderer: Renderer
    teacher: Teacher
    train_dataset: Any
    eval_dataset: Any
    sharding: Sharding | None
    engine: StudentEngine | None
    fixed_text: FixedText
    recorder: Recorder
    supervision: SupervisionWatch
    _buffered_inputs: Any
    _longest_prompts: list[int]

    @property
    def _prompts_per_step(self) -> int:
        return prompts_per_step(self.args, self.accelerator.num_processes)

    def _check_prompts(self) -> None:
        """Keep what all templates can render; from now on `renderer` is how the student reads prompts."""
        vocabulary = self.model.config.get_text_config().vocab_size
        tools = {"tools": self.tools, "chat_template": self.chat_template} if self.tools else {}
        kwargs = mapping("chat_template_kwargs", self.chat_template_kwargs) | tools
        self.renderer = Renderer(self._tokenizer, kwargs, vocabulary=vocabulary)
        readers = [self.renderer]
        if not self.translation.is_identity:
            kwargs = self._tool_kwargs(self.translation)
            readers.append(self.translation.renderer(self.teacher.vocabulary, **kwargs))
        self._longest_prompts = [0] * len(readers)
        needed = self._prompts_per_step
        self.train_dataset = self._usable(self.train_dataset, readers, self.args.max_prompt_length, needed)
        held_out = self.eval_dataset
        named = held_out.items() if isinstance(held_out, dict) else ()
        usable = {name: self._usable(rows, readers) for name, rows in named}
        self.eval_dataset = usable or self._usable(held_out, readers)

    def _usable(
        self, dataset: Any, readers: list[Renderer], longest: int | None = None, needed: int = 1
    ) -> Any:
        """The rows of a dataset that can be rolled out; a stream, and what is no dataset, as it is."""
        if not isinstance(dataset, Dataset):
            return dataset
        args = self.args
        drops, ranks = args.drop_unrenderable_prompts, Ranks(args.process_index, args.world_size)
        usable = usable_prompts(dataset, readers, longest, needed, drops, ranks)
        found = usable.lengths.max(axis=1).tolist()
        self._longest_prompts = list(map(max, self._longest_prompts, found))
        if self.tools and isinstance(usable.dataset[0]["prompt"], str):
            raise UserError("tools need chat prompts, and these are text: give them as messages")
        return usable.dataset

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and warn of steps that supervised nothing; no callback of transformers comes as late."""
        result = super().train(*args, **kwargs)
        self.supervision.tell()
        return result

    def _check_models(self) -> None:
        """Raise `UserError` for weights that are not finite, or a model that cannot be sharded."""
        check_loaded(self.model, "the student")
        check_loaded(self.teacher.model, "the teacher")
        if self.sharding is not None:
            check_sharded((self.model, self.teacher.model))

    def _prepare_rollouts(self) -> None:
        """Fit the default length of responses to both models' positions; log what rollouts set aside.

        Raises `UserError` for lengths that do not fit.
        """
        configs = self.model.config, self.teacher.model.config
        who = run_readers(*configs, self._longest_prompts, are_its_own=self.translation.aligner is None)
        asked = self.generation_config.max_new_tokens
        length = (
            fitting_length(who, asked, asked == type(self.args).max_completion_length) if asked else asked
        )
        if length != asked:
            self.args.max_completion_length = self.max_completion_length = length
            self.generation_config.max_new_tokens = self.generation_kwargs["max_new_tokens"] = length
            if self.use_vllm:
                self.vllm_generation.max_completion_length = length
        if aside := options_aside(self.model, self.generation_kwargs):
            options = ", ".join(f"{name} {str(value)[:40]}" for name, value in aside.items())
            logger.info(
                "rollouts follow the recipe; not used from the student's generation config: %s", options
            )

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """The ids that were checked before the run; until TRL leaves a turn open that is to be continued."""
        return self.renderer(prompts), None, {}

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's responses, drawn from the student's own distribution, in batches that leave it unchanged.

        Until TRL takes a function that generates.
        """
        turn = super()._generate_single_turn
        shown = tokens_shown(self.recorder.bar, "rollouts", self.model, self.max_completion_length)
        with checkpointing_restored(self.model), shown, old_names_unheard():
            if self.use_vllm:
                return turn(prompt_ids, *args, **kwargs)
            batches = generation_batches(self.model, prompt_ids)
            if self.args.pad_to_multiple_of and len(generation_batches(self.model, [[0], [0, 0]])) > 1:
                self.pad_to_multiple_of = None  # such a model is given no padding at all
            with (
                self.whole_student(),
                generation_config_aside(self.model),
                finite_logits(self.model, f"step {self.state.global_step + 1}: the student"),
            ):
                return in_batches(
                    batches, lambda batch: turn([prompt_ids[i] for i in batch], *args, **kwargs)
                )

    def whole_student(self) -> AbstractContextManager[None]:
        """Within it the student is unsharded, so that every rank generates at its own pace."""
        return nullcontext() if self.sharding is None else self.sharding.whole(self.model)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        """TRL's rollouts, with the weight of every row, counted over ranks and the whole window.

        Until TRL has a hook for what is made of rollouts before they are split into micro-batches.
        """
        with self.update.stopwatch.part("rollout"), self.memory.rollout():
            batch = on_host(cast(RolloutInputs, super()._generate_and_score_completions(inputs)))
        if self.engine is not None:
            batch |= self._read_engine(self.engine, batch)
        prompts, completions = (
            [row["prompt"] for row in inputs],
            (batch["completion_ids"], batch["completion_mask"]),
        )
        tools = self._tool_kwargs(self.translation)
        read, aligned = self.translation.read(prompts, *completions, self.teacher.room, **tools)
        batch |= read
        batch |= self._row_weights(batch)
        if self.model.training:
            self._describe(batch, aligned)
            self._observe(batch)
        return batch

    def _read_engine(self, engine: StudentEngine, batch: RolloutInputs) -> RolloutInputs:
        """The engine's log-probs of the sampled tokens, after a check that it holds the student's weights."""
        drawn, device = engine.take(), self.accelerator.device
        if engine.unchecked:
            with self.update.stopwatch.part("check"), eval_mode(self.model), self.accelerator.autocast():
                gaps = log_prob_gaps(self.model_wrapped, drawn, device)
                moved = self.fixed_text.moved_alone(engine, self.model_wrapped, drawn, device)
            self.update.averages.add("rollout/logprob_gap", gaps.sum(), len(gaps))
            found = torch.stack([gaps.mean(), gaps.new_tensor(moved)])[None]
            gap, moved = self.accelerator.gather(found).amax(0).tolist()  # every rank stops, or none
            if math.isnan(gap):
                check_trained(self.model, self.state.global_step)
            dtypes = (engine.dtype, self.model.dtype, _computed_in(self.args))
            check_gap(gap, dtypes, self.state.global_step + 1)
            check_moved_alone(moved, dtypes, self.state.global_step + 1)
            engine.unchecked = False
        width = batch["completion_ids"].shape[1]
        return {} if self.tools else {"engine_log_probs": drawn.padded(width, device)}

    def _prepare_inputs(self, generation_batch: Any) -> list[RolloutBatch]:  # type: ignore[override]
        """The micro-batches of the next backward: one, or with a token budget as many as it takes.

        TRL would split a window into equal numbers of rollouts; until it takes a function that splits. What
        it gives goes to `compute_loss` alone.
        """
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            return [RolloutBatch.of(inputs)]
        if isinstance(inputs, dict):  # of a window that has just been rolled out
            window, budget = self._buffered_inputs, self.args.max_tokens_per_micro_batch
            parts = [[part] for part in window] if budget is None else repack(window, budget, self._most)
            self._buffered_inputs = [list(map(RolloutBatch.of, micro_batches)) for micro_batches in parts]
            inputs = self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]
        return inputs

    def _most(self, count: int) -> int:
        counts = torch.tensor([count], device=self.accelerator.device)
        return int(self.accelerator.gather(counts).max())

    def _row_weights(self, batch: RolloutInputs) -> RolloutInputs:
        truncated = truncated_rollouts(batch, self.eos_token_ids)
        vocabulary = self.update.output.vocabulary
        return weigh_rows(
            batch, truncated, self.args, self._sum_over_ranks, vocabulary, self.update.output.shared
        )

    def _describe(self, batch: RolloutInputs, aligned: list[AlignedResponse]) -> None:
        averages, lengths = self.update.averages, batch["completion_mask"].sum(-1).float()
        truncated = truncated_rollouts(batch, self.eos_token_ids)
        left_out = truncated.sum() * self.args.mask_truncated_completions
        averages.add("rollout/mean_length", lengths.sum(), len(lengths))
        averages.add("rollout/truncated_share", truncated.sum(), len(lengths))
        averages.add("rollout/left_out", left_out)
        distinct = distinct_share(batch["completion_ids"].cpu(), batch["completion_mask"])
        averages.add("rollout/distinct_4", distinct.sum(), len(distinct))
        if aligned:
            paired, rows = sum(len(a.rows) for a in aligned), sum(a.num_rows for a in aligned)
            averages.add("rollout/coverage", paired, rows)
            averages.add("rollout/invalid_utf8", sum(a.invalid_utf8 for a in aligned))
            averages.add("rollout/collapsed_alignment", sum(a.collapsed for a in aligned), len(aligned))
        for term in COUNTED_TERMS:
            if self.args.schedules[term].ever_active:
                averages.add(f"rollout/{term}_rows", (batch[f"{term}_weights"] > 0).sum())  # type: ignore[literal-required]

    def _observe(self, batch: RolloutInputs) -> None:
        every = self.args.diagnostics_steps
        if every and (self.state.global_step + 1) % every == 0:
            size = self.args.per_device_train_batch_size
            first = RolloutBatch.of(each(batch, lambda _, value: value[:size] if value.ndim else value))
            with self.update.stopwatch.part("diagnostics"), torch.no_grad():
                self._through(self.model_wrapped, self.update.observe, first)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")

    def _through(self, model: torch.nn.Module, function: Callable[..., Any], batch: RolloutBatch) -> Any:
        """`function(batch, step)` inside the wrapper's forward, where DDP and FSDP have the weights ready."""
        unwrapped = self.accelerator.unwrap_model(model)
        # TRL's redirection goes past the forward that accelerate wrapped in autocast.
        with self.accelerator.autocast():
            return self._forward_redirection(model, unwrapped, function, batch, self.state.global_step)

    def _tool_kwargs(self, translation: Translation) -> dict[str, Any]:
        """Template arguments by which the teacher's prompts show the tools."""
        if not self.tools:
            return {}
        return {"tools": self.tools} | (
            {} if translation.own_template else {"chat_template": self.chat_template}
        )


def _computed_in(args: Any) -> torch.dtype:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
