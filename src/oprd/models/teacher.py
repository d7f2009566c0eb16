"""The frozen teacher: where it lives, what it reads, and whether it fits the student."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_bitsandbytes_available

from oprd.foundation.errors import UserError
from oprd.models.capture import num_layers
from oprd.models.checks import num_embeddings
from oprd.models.eos import all_ends
from oprd.models.forward import ModelInput, StateReader, StateRequest
from oprd.models.init_kwargs import hub_kwargs
from oprd.models.loading import base_model, load_tokenizer, load_with_tokenizer, resolve_model
from oprd.models.positions import num_positions
from oprd.models.precision import Precision, store_products_in
from oprd.models.sharding.fsdp import Sharding
from oprd.models.trial import try_states
from oprd.text.alignment import same_vocabulary

logger = logging.getLogger(__name__)


class Teacher:
    """A frozen causal language model in eval mode and, where known, its tokenizer."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.reader = StateReader(model)
        self._device: torch.device | None = None

    @classmethod
    def load(cls, name: str, init_kwargs: dict[str, Any], precision: Precision | None = None) -> "Teacher":
        """Load a bundled, local or Hub model to the host, in the dtype of `init_kwargs`, else of `precision`.

        It is dispatched where `init_kwargs` names a `device_map` (`cpu`, `auto` with offloading, …).
        """
        if precision is None or "dtype" in init_kwargs:
            return cls(*load_with_tokenizer(name, **init_kwargs))
        shared = hub_kwargs(init_kwargs)
        config = AutoConfig.from_pretrained(base_model(resolve_model(name, **shared)), **shared)
        dtype = precision.of_teacher(config, "quantization_config" in init_kwargs)
        model, tokenizer = load_with_tokenizer(name, **init_kwargs, dtype=dtype)
        if precision.autocast:
            store_products_in(config.dtype, model)
        return cls(model, tokenizer)

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Teacher":
        """Take a model object, with its tokenizer if it has one."""
        try:
            name = model.config.name_or_path
            return cls(model, load_tokenizer(name) if name else None)
        except UserError:
            return cls(model)

    def place(self, device: torch.device, sharding: Sharding | None = None, offload: bool = False) -> None:
        """Spread the model over ranks, or move it to `device`; offloaded, weights come there block by block.

        A quantised or dispatched model stays as it was loaded. Raises `UserError` where FSDP meets a
        `device_map`.
        """
        if getattr(self.model, "is_quantized", False):
            if sharding is not None:
                logger.warning("the teacher is quantised and not sharded: every rank holds all of it")
            return
        if hasattr(self.model, "hf_device_map"):
            if sharding is not None:
                raise UserError("FSDP places the teacher: leave device_map out of teacher_model_init_kwargs")
        elif sharding is not None:
            sharding.shard(self.reader, offload)
            self._device = device
        elif offload:
            # Parameters do not survive a move to cpu:0, which a rank without an accelerator calls its device.
            cpu_offload(self.model, device if device.type != "cpu" else torch.device("cpu"))
        else:
            self.model.to(device)

    @property
    def width(self) -> int:
        """Hidden width d_T."""
        return self.model.config.get_text_config().hidden_size

    @property
    def num_layers(self) -> int:
        """Depth L_T."""
        return num_layers(self.model)

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding, padding included."""
        return num_embeddings(self.model)

    def room(self, prompt_mask: Tensor) -> list[int] | None:
        """Positions left for a response to each of the prompts; None without a limit."""
        limit = num_positions(self.model.config)
        return None if limit is None else (limit - prompt_mask.sum(-1)).tolist()

    def check_ids(self, student: PreTrainedModel) -> None:
        """Raise `UserError` if the student may sample ids that this teacher has no embedding for."""
        ours, theirs = num_embeddings(student), self.vocabulary
        if ours > theirs:
            raise UserError(
                f"teacher_tokenization: student feeds the teacher the student's {ours} ids, and its "
                f"vocabulary has {theirs}: use teacher_tokenization: own"
            )

    @torch.no_grad()
    def read(
        self, model_input: ModelInput, requests: Sequence[StateRequest], padding_free: bool | None = None
    ) -> list[dict[int, Tensor]]:
        """`read_states` on the teacher's own device, under the autocast that the student computes under.

        A teacher in bfloat16 throughout computes as it is in a float16 run: autocast does not mix the two.
        """
        device = self._device_for(model_input.input_ids.device)
        # No supervised row reads an id that only the student's padded embedding has.
        ids = model_input.input_ids.clamp(max=self.vocabulary - 1)
        model_input = replace(model_input, input_ids=ids)
        with self._autocast(model_input.input_ids.device):
            return self.reader(model_input.to(device), requests, padding_free)

    def try_states(self, layers: Sequence[int], final_norm: bool, device: torch.device) -> None:
        """`trial.try_states` as `read` computes them for a student on `device`; raises `UserError`."""
        with self._autocast(device):
            try_states("teacher", self.model, layers, final_norm)

    def _device_for(self, students: torch.device) -> torch.device:
        """The device on which the teacher reads what a student on that device wrote."""
        device = self._device or self.model.get_input_embeddings().weight.device
        # Of an offloaded one accelerate's hooks bring weights and inputs together.
        return students if device.type == "meta" else device

    def _autocast(self, students: torch.device) -> AbstractContextManager:
        kind, dtype = students.type, self.model.get_input_embeddings().weight.dtype
        half, is_on = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        is_on = is_on and dtype in (torch.float32, half)
        return torch.autocast(self._device_for(students).type, half, enabled=is_on)


def quantization(kind: str) -> BitsAndBytesConfig:
    """How bitsandbytes is to hold a teacher: `8bit` or `4bit`; raises `UserError` without it."""
    if not is_bitsandbytes_available():
        raise UserError(f"teacher_quantization: {kind} needs bitsandbytes: pip install bitsandbytes")
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def check_widths(student_width: int, student_layers: int, teacher: Teacher) -> None:
    """Refuse another width, warn about another depth: both are what a bridge is for."""
    if student_width != teacher.width:
        raise UserError(
            f"the student is {student_width} wide and the teacher {teacher.width}: their states cannot be "
            "compared directly; fit a bridge (oprd bridge) or set representation_weight: 0"
        )
    if student_layers != teacher.num_layers:
        logger.warning(
            "the student has %d layers and the teacher %d: layers are paired by relative depth (Eq. 11) "
            "without a bridge, which assumes that both models share their coordinates",
            student_layers,
            teacher.num_layers,
        )


def shared_vocabulary(
    student: PreTrainedModel, student_tokenizer: PreTrainedTokenizerBase, teacher: Teacher
) -> int:
    """Size of the vocabulary both models define, when the teacher can read the student's ids.

    Models of one family may pad it differently (152,064 against 151,936); then it is the shared
    prefix. Raises `UserError` when ids do not mean the same tokens.
    """
    sizes = [m.config.get_text_config().vocab_size for m in (student, teacher.model)]
    if teacher.tokenizer is None:
        if sizes[0] != sizes[1]:
            raise UserError(
                f"the student has {sizes[0]} tokens and the teacher {sizes[1]}, and the teacher came without "
                "a tokenizer to compare them by: give the teacher as a folder or a name"
            )
        return sizes[0]
    if not same_vocabulary(student_tokenizer, teacher.tokenizer):
        ours, theirs = student_tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
        raise UserError(
            f"student and teacher have different vocabularies ({len(ours.items() ^ theirs.items())} entries "
            "differ), so this output loss is not defined, nor is a comparison of states without a bridge: "
            "use a teacher of the same tokenizer, or a bridge (oprd bridge), and as output_loss none, top_k, "
            "full_vocab or sampled_text"
        )
    return min(sizes)


def differing_ends(
    student: PreTrainedModel, student_tokenizer: PreTrainedTokenizerBase, teacher: Teacher
) -> list[int]:
    """What ends a response of either model, where both have one vocabulary and other ends; else nothing.

    A base model may end with `<|endoftext|>` and its chat variant with `<|im_end|>`. A student that learns
    the teacher's end goes on behind it, unless its responses end there too.
    """
    theirs = teacher.tokenizer
    if theirs is None or not same_vocabulary(student_tokenizer, theirs):
        return []
    ours, others = all_ends(student, student_tokenizer), all_ends(teacher.model, theirs)
    if set(ours) == set(others) or not others:
        return []
    logger.info(
        "the student ends a response with %s and the teacher with %s: rollouts end at any of these, and "
        "output losses take them as one token",
        ", ".join(map(repr, student_tokenizer.convert_ids_to_tokens(ours))),
        ", ".join(map(repr, theirs.convert_ids_to_tokens(others))),
    )
    known = min(num_embeddings(student), teacher.vocabulary)
    return [index for index in dict.fromkeys([*ours, *others]) if index < known]
