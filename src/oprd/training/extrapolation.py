"""The reference that targets are extrapolated from, bound to a run's models (RIDE)."""

from dataclasses import dataclass, replace

from torch import Tensor

from oprd.foundation.errors import UserError
from oprd.models.capture import num_layers
from oprd.models.forward import ModelInput, StateRequest
from oprd.models.initial_student import InitialStudent
from oprd.models.lm_head import Head
from oprd.models.teacher import Teacher
from oprd.objective.composite import RowLoss
from oprd.objective.extrapolation import extrapolate
from oprd.objective.settings import ObjectiveSettings
from oprd.text.alignment import same_vocabulary
from oprd.training.comparison import States
from oprd.training.training_pair import TrainingPair


@dataclass(frozen=True)
class Extrapolation:
    """h* = h_T + (λ − 1)(h_T − h_B): λ is the `factor`, h_B the state of the `reference` on the same text."""

    factor: float
    reference: Teacher | InitialStudent

    @classmethod
    def of(cls, settings: ObjectiveSettings, pair: TrainingPair) -> "Extrapolation | None":
        """With the pair's reference, else the student as it is now; None for λ = 1. Raises `UserError`."""
        if settings.teacher_extrapolation == 1:
            return None
        theirs = pair.teacher.tokenizer
        if theirs is not None and not same_vocabulary(pair.tokenizer, theirs):
            raise UserError(
                "teacher_extrapolation needs models of one origin, and the teacher has another tokenizer: "
                "leave it out"
            )
        reference = pair.reference or InitialStudent(pair.student)
        (width, depth), found = (
            (model.config.get_text_config().hidden_size, num_layers(model))
            for model in (pair.teacher.model, reference.model)
        )
        if found != (width, depth):
            raise UserError(
                f"teacher_extrapolation: the teacher is {width} wide with {depth} layers, the reference "
                f"{found[0]} wide with {found[1]}: name the model that the teacher was trained from as "
                "reference_model_name_or_path"
            )
        return cls(settings.teacher_extrapolation, reference)

    def read(
        self, model_input: ModelInput, requests: dict[str, StateRequest], padding_free: bool | None
    ) -> dict[str, States]:
        """By term, the reference's states at the rows that the teacher is read at."""
        states = self.reference.read(model_input, list(requests.values()), padding_free)
        return dict(zip(requests, states, strict=True))

    def onto(self, request: StateRequest, reference: States) -> StateRequest:
        """A request of the teacher's states that gets h* in their place; it uses `reference` up."""

        def beyond(layer: int, teacher: Tensor) -> Tensor:
            return extrapolate(teacher, reference.pop(layer), self.factor)

        return replace(request, transform=beyond)

    def scaled(self, loss: RowLoss) -> RowLoss:
        """λ⁻² · loss, so that steps stay about as long as those towards the teacher."""

        def scaled_loss(student: Tensor, target: Tensor) -> Tensor:
            return loss(student, target) / self.factor**2

        return scaled_loss

    def head(self, vocabulary: int) -> Head:
        """The reference's LM head."""
        return Head.of(self.reference.model, vocabulary)
