"""Rollouts that change for the worse, where there are no problems to grade."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

from oprd.training.watch import Watch

WINDOW = 5  # steps whose mean is judged, and compared with that of the first ones


@dataclass(frozen=True)
class Sign:
    """A number by which a student is known to get worse, given its mean at the start and now."""

    name: str
    is_worse: Callable[[float, float], bool]
    words: str  # with {start} and {now}


SIGNS = (
    Sign(
        "rollout/truncated_share",
        lambda start, now: now > 0.5 and now > start + 0.3,
        "{now:.0%} of rollouts do not end, and {start:.0%} did not at the start: lower learning_rate, and "
        "compare how both models end a response",
    ),
    Sign(
        "rollout/mean_length",
        lambda start, now: now < start / 4,
        "responses have {now:.0f} tokens, and had {start:.0f} at the start: read some (log_completions: "
        "true), and lower learning_rate",
    ),
    Sign(
        "rollout/distinct_4",
        lambda start, now: now < start / 2,
        "{now:.0%} of four tokens in a row are new in a rollout, and {start:.0%} were at the start: the "
        "student repeats itself; lower learning_rate",
    ),
    Sign(
        "representation/cosine",
        lambda start, now: now < start - 0.05,
        "the states' cosine is {now:.3f}, and was {start:.3f} at the start: lower learning_rate",
    ),
)


class BehaviourWatch(Watch):
    """Compares the last steps with the first ones, `WINDOW` steps at a time."""

    def __init__(self, patience: int | None) -> None:
        super().__init__(patience)
        self._start: dict[str, list[float]] = {sign.name: [] for sign in SIGNS}
        self._last = {sign.name: deque[float](maxlen=WINDOW) for sign in SIGNS}

    def judge(self, step: int, values: Mapping[str, float]) -> str | None:
        """What has got worse since the start."""
        for name in self._start.keys() & values.keys():
            enough = len(self._start[name]) == WINDOW
            (self._last if enough else self._start)[name].append(values[name])
        if step % WINDOW:
            return None
        worse = []
        for sign in SIGNS:
            if len(self._last[sign.name]) == WINDOW:
                start, now = fmean(self._start[sign.name]), fmean(self._last[sign.name])
                if sign.is_worse(start, now):
                    worse.append(sign.words.format(start=start, now=now))
        return "; ".join(worse)
