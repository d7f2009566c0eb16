"""The two models of a bridge recipe, what draws and renders for them, and the fitter of their layers."""

import logging
import math

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oprd.bridge.fitter import BridgeFitter
from oprd.bridge.recipe import BridgeArguments
from oprd.foundation.errors import UserError
from oprd.foundation.ranks import Ranks
from oprd.models.capture import num_layers
from oprd.models.eos import eos_token_ids
from oprd.models.finite import check_loaded
from oprd.models.loading import load_with_tokenizer, resolve_model
from oprd.models.teacher import Teacher
from oprd.objective.selection import LayerMap
from oprd.rollouts.engines.choose import choose_engine
from oprd.rollouts.generation import Engine
from oprd.rollouts.translation import Translation
from oprd.text.rendering import Renderer

logger = logging.getLogger(__name__)

GIB = 2**30


class ModelPair:
    """Student, teacher and their tokenizers, on one device, reading only."""

    def __init__(
        self,
        student: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        teacher: Teacher,
        translation: Translation,
    ) -> None:
        self.student, self.tokenizer = student.eval(), tokenizer
        self.teacher, self.translation = teacher, translation

    @classmethod
    def load(cls, args: BridgeArguments, device: torch.device) -> "ModelPair":
        """The models that a recipe names."""
        shared = {"trust_remote_code": args.trust_remote_code}
        student, tokenizer = load_with_tokenizer(args.model_name_or_path, dtype=args.dtype, **shared)
        student.to(device)  # type: ignore[arg-type]  # transformers' type of `to` lacks its `self`
        teacher = Teacher.load(args.teacher_model_name_or_path, {"dtype": args.dtype} | shared)
        teacher.place(device)
        translation = Translation(
            tokenizer,
            teacher.tokenizer,
            args.teacher_chat_template,
            args.teacher_tokenization,
            args.teacher_template_kwargs,
            eos_token_ids(student, tokenizer),
        )
        check_loaded(student, "the student")
        check_loaded(teacher.model, "the teacher")
        if translation.feeds_foreign_ids:
            teacher.check_ids(student)
        return cls(student, tokenizer, teacher, translation)

    def engine(self, args: BridgeArguments, ranks: Ranks) -> Engine:
        """The engine that generates the student's rollouts; in-process vLLM works with one process only."""
        shared = {"trust_remote_code": args.trust_remote_code}
        located = resolve_model(args.model_name_or_path, **shared)
        chosen = args.engine, args.vllm_server_base_url
        if ranks.count > 1 and args.vllm_server_base_url is None:
            if args.engine == "vllm":
                raise UserError("engine: vllm works in one process only: use a server or engine: hf")
            chosen = "hf", None
        share = args.vllm_gpu_memory_utilization
        return choose_engine(*chosen, self.student, self.tokenizer, located, share, shared)

    def renderer(self, args: BridgeArguments) -> Renderer:
        """How the student reads prompts."""
        vocabulary = self.student.get_input_embeddings().num_embeddings
        return Renderer(self.tokenizer, args.template_kwargs, vocabulary=vocabulary)

    def fitter(self, args: BridgeArguments) -> tuple[BridgeFitter, LayerMap | None]:
        """A fitter for the layers asked for, and their map unless the rows are to choose it."""
        depths = num_layers(self.student), self.teacher.num_layers
        best = args.layers.strip() == "best"
        layer_map = LayerMap.parse("all" if best else args.layers, *depths)
        teacher_layers = range(1, depths[1] + 1)
        widths = self.student.config.get_text_config().hidden_size, self.teacher.width
        if args.chosen_rank != "auto" and args.chosen_rank > widths[1]:
            raise UserError(f"rank {args.chosen_rank} is above the teacher's width {widths[1]}: lower it")
        crossed = len(layer_map.pairs) * depths[1] * math.prod(widths) * 8 * 2 / GIB
        affordable = crossed <= args.all_pairs_gib
        if best and not affordable:
            raise UserError(
                f"layers: best compares all layers, which needs {crossed:.3g} GiB, and all_pairs_gib "
                f"is {args.all_pairs_gib:g}: raise it, or name the layers"
            )
        if not affordable:
            logger.info("CKA of paired layers only: all layers would take %.3g GiB (all_pairs_gib)", crossed)
        fitter = BridgeFitter(
            layer_map,
            holdout=args.holdout,
            all_pairs=affordable,
            teacher_layers=tuple(teacher_layers) if affordable else (),
            **vars(args.fit_settings),
        )
        return fitter, None if best else layer_map
