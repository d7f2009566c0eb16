"""Does the frozen bridge still fit the student as it moves: alignment of fresh rollouts, step by step."""

import logging
from collections import deque
from collections.abc import Sequence

from oprd.bridge.artifact import Bridge

logger = logging.getLogger(__name__)

WINDOW = 10  # measured steps that the running mean covers
MARGIN = 0.01  # of cosine, which the noise of ten steps stays within


class DriftMonitor:
    """Compares the cosine of fresh rollouts through a bridge with what held-out rows had at the fit."""

    def __init__(self, bridge: Bridge, layers: Sequence[int]) -> None:
        reports = bridge.metadata.get("layers", {})
        levels = [reports.get(str(layer), {}).get("cosine_at_rank") for layer in layers]
        known = [level for level in levels if level is not None]
        self.level = sum(known) / len(known) if len(known) == len(levels) else None
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._below = False

    def resume(self, records: Sequence[dict[str, float]]) -> None:
        """Take up the window where a stopped run left it, from its lines of `metrics.jsonl`."""
        known = [record["representation/cosine"] for record in records if "representation/cosine" in record]
        self._recent.extend(known)
        self._below = self._is_below()

    def _is_below(self) -> bool:
        if self.level is None or len(self._recent) < WINDOW:
            return False
        return sum(self._recent) / WINDOW < self.level - MARGIN

    def observe(self, step: int, values: dict[str, float]) -> dict[str, float]:
        """The running mean and the held-out level, if this step has a cosine; warns when it falls below."""
        if self.level is None or "representation/cosine" not in values:
            return {}
        self._recent.append(values["representation/cosine"])
        mean = sum(self._recent) / len(self._recent)
        was_below, self._below = self._below, self._is_below()
        if self._below and not was_below:
            logger.warning(
                "step %d: through the bridge, fresh rollouts have cosine %.3f, below the %.3f of held-out "
                "rows at the fit: the student has drifted; fit a new bridge, or end its schedule earlier",
                step,
                mean,
                self.level,
            )
        return {"bridge/alignment": mean, "bridge/held_out_alignment": self.level}
