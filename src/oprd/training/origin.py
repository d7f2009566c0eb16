"""Are student and teacher of one origin? The first step warns if their states look unrelated."""

import logging
from collections.abc import Mapping

logger = logging.getLogger(__name__)

ONE_ORIGIN = 0.2  # mean cosine of states: near 1 after training from one start, near 0 between strangers


def warn_of_another_origin(step: int, values: Mapping[str, float]) -> dict[str, float]:
    """Warn, after step 1, of states that are compared directly and have nothing in common."""
    cosine = values.get("representation/cosine")
    if step == 1 and cosine is not None and cosine < ONE_ORIGIN:
        logger.warning(
            "step 1: student and teacher states have a mean cosine of %.2f, so the models do not share their "
            "coordinates; a direct comparison needs a teacher that was trained from the student, or "
            "from its start: fit a bridge (oprd bridge), or use an output loss",
            cosine,
        )
    return {}
