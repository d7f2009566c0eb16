"""Do a run's longest prompts and responses fit into its models' positions? Checked before any rollout."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from oprd.foundation.errors import UserError
from oprd.models.positions import num_positions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reader:
    """A model of a run, and its longest prompt in its own tokens.

    Responses `are_its_own` if they are as long in its tokens as they were sampled.
    """

    who: str
    config: Any
    longest_prompt: int
    are_its_own: bool = True

    def room(self, length: int) -> int:
        """Tokens left for a response of at most `length` after the longest prompt; may be negative."""
        limit = num_positions(self.config)
        left = length if limit is None else min(limit - self.longest_prompt, length)
        return left if self.are_its_own or left < 1 else length


def run_readers(student: Any, teacher: Any, longest: Sequence[int], are_its_own: bool) -> list[Reader]:
    """Student and teacher, by their configs, and tokens of the longest prompt for one, or for each."""
    return [
        Reader("the student", student, longest[0]),
        Reader("the teacher", teacher, longest[-1], are_its_own),
    ]


def fitting_length(readers: Sequence[Reader], length: int, is_default: bool) -> int:
    """`length`, the longest response, if all `readers` have positions for it after their longest prompt.

    A default, which nobody has chosen, is lowered to what fits, and that is logged. Raises `UserError` for a
    length that was chosen and for a prompt that leaves no position.
    """
    tightest = min(readers, key=lambda reader: reader.room(length), default=None)
    if tightest is None or (room := tightest.room(length)) == length:
        return length
    has = f"{tightest.who} has {num_positions(tightest.config)} positions"
    takes = f"the longest prompt takes {tightest.longest_prompt} of them"
    if room < 1:
        raise UserError(
            f"{has}, and {takes}: none is left for a response; drop long prompts (max_prompt_length)"
        )
    if not is_default:
        raise UserError(
            f"max_completion_length is {length}, but {has}, and {takes}: lower it to {room}, or drop long "
            "prompts (max_prompt_length)"
        )
    logger.info("max_completion_length is %d: %s, and %s", room, has, takes)
    return room
