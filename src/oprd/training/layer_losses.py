"""What the student's forward computes at a layer: the representation loss (Eq. 6 or 14) and the anchor's.

Each is an object that `capture` calls with a layer and the student's rows there. It returns the loss of that
layer, so no states are kept, and takes the rows that it compared them with out of `remaining_targets`.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from oprd.foundation.meters import Averages
from oprd.models.finite import FiniteWatch
from oprd.objective.composite import RowLoss, weighted_loss
from oprd.rollouts.rows import SupervisedRows
from oprd.training.anchor import Anchor
from oprd.training.comparison import Comparison, States
from oprd.training.diagnostics import add_representation_cosine


@dataclass(frozen=True)
class RepresentationLoss:
    """Eq. 6, or Eq. 14 through a bridge: Σ_rows weight · loss(student row, teacher row) at one layer."""

    loss: RowLoss
    comparison: Comparison
    remaining_targets: States  # the teacher's rows as they are compared, by student layer
    rows: SupervisedRows
    input_ids: Int[Tensor, "B S"]
    averages: Averages
    watch: FiniteWatch

    def __call__(self, layer: int, states: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
        """The loss of a layer, from the student's states of `rows`."""
        student, teacher = self.comparison.student(layer, states), self.remaining_targets.pop(layer)
        loss, row_losses = weighted_loss(self.loss, student, teacher, self.rows.weights)
        self.watch.add("the representation loss", layer, row_losses, self.rows.mask, self.input_ids)
        self.averages.add(f"loss/representation_layer_{layer}", loss)
        add_representation_cosine(self.averages, layer, student, teacher, self.rows.weights)
        return loss


@dataclass(frozen=True)
class AnchorLoss:
    """Σ_rows weight · ‖d‖² / ‖h_ref‖² at one layer, as `Anchor.rows` defines d."""

    anchor: Anchor
    remaining_targets: States  # the student's own rows before training, by layer
    rows: SupervisedRows
    paired: Bool[Tensor, " N"]
    input_ids: Int[Tensor, "B S"]
    watch: FiniteWatch

    def __call__(self, layer: int, states: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
        """The loss of a layer, from the student's states of `rows`."""
        paired = self.paired.to(states.device)

        def row_loss(student: Tensor, reference: Tensor) -> Tensor:
            return self.anchor.rows(layer, student, reference, paired=paired)

        reference = self.remaining_targets.pop(layer)
        loss, row_losses = weighted_loss(row_loss, states, reference, self.rows.weights)
        self.watch.add("the anchor", layer, row_losses, self.rows.mask, self.input_ids)
        return loss
