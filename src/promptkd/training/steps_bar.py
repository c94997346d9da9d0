"""The bar of a run's steps, and a forecast of the run, said as soon as its first steps show it."""

import time
from collections.abc import Callable
from typing import Any

from promptkd.bars import progress_bar
from promptkd.numbers import duration
from promptkd.training.forecast import Forecast, Measured, Schedule, forecast

MEASURED_STEPS = 3
"""The first takes longer than later ones, so that at least two others are measured."""


class StepsBar:
    """Shows a run's steps, and forecasts the whole run by its beginning.

    A run that goes on from a checkpoint measures no evaluation before its steps and forecasts
    nothing; the bar knows how long the rest takes.

    Args:
        name: what the bar is called.
        schedule: of the whole run.
        done: steps that were taken before.
        say: is told the forecast; None where another rank talks.
    """

    def __init__(self, name: str, schedule: Schedule, done: int, say: Callable[[str], None] | None):
        shown = {"unit": "step", "desc": name, "disable": say is None}
        self._bar = progress_bar(total=schedule.max_steps, initial=done, **shown)
        self._schedule = schedule
        self._say = say
        self._forecast: Forecast | None = None
        self._begun = self._last = time.monotonic()
        self._evaluation = 0.0
        self._steps: list[float] = []
        self._measures = done == 0

    def __enter__(self) -> "StepsBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def evaluated(self) -> None:
        """The evaluation before the first step is done."""
        self._evaluation = self._lap()

    def stepped(self, row: dict[str, Any]) -> None:
        """A step is done, with this line of metrics."""
        self._bar.update()
        self._bar.set_postfix(loss=f"{row['loss']:.3f}", length=f"{row['response_length']:.0f}")
        if not self._measures:
            return
        self._steps.append(self._lap())
        if len(self._steps) == min(MEASURED_STEPS, self._schedule.max_steps):
            self._measures = False
            self._tell()

    def took(self) -> dict[str, float]:
        """Seconds of this process's part of the run, and of the whole as they were forecast."""
        seconds = {"seconds_taken": time.monotonic() - self._begun}
        return seconds | ({"seconds_forecast": self._forecast.seconds} if self._forecast else {})

    def _tell(self) -> None:
        first, *later = self._steps
        measured = Measured(
            seconds_start=first,
            seconds_step=sum(later) / max(1, len(later)),
            seconds_evaluation=self._evaluation,
            seconds_checkpoint=0.0,  # none was written yet
            bytes_checkpoint=1,
            bytes_student=0,
        )
        self._forecast = forecast(measured, self._schedule)
        if self._say:
            self._say(
                f"forecast: {duration(self._forecast.seconds)}, of which "
                f"{self._schedule.max_steps} steps of {measured.seconds_step:.1f} s and "
                f"{duration(self._forecast.seconds_evaluations)} of evaluations; saving aside"
            )

    def _lap(self) -> float:
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        return elapsed
