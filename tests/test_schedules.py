"""The learning rate is a function of the step alone."""

import math
from itertools import pairwise

import pytest

from promptkd.config import OptimizationSection
from promptkd.training.schedules import learning_rate


def rates(num_steps: int, **options) -> list[float]:
    section = OptimizationSection(max_steps=num_steps, **options)
    return [learning_rate(2.0, step, num_steps, section) for step in range(num_steps)]


def test_constant_without_warm_up_never_changes():
    assert rates(5) == [2.0] * 5


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_is_linear_moves_at_once_and_ends_at_the_base_rate(schedule):
    assert rates(10, warmup_steps=4, schedule=schedule)[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_linear_falls_evenly_and_the_last_step_still_moves():
    found = rates(10, warmup_steps=2, schedule="linear")

    assert found[2:] == pytest.approx([2 * (8 - i) / 8 for i in range(8)])
    assert found[-1] > 0


def test_cosine_follows_the_half_wave():
    found = rates(9, warmup_steps=1, schedule="cosine")

    assert found[1:] == pytest.approx([1 + math.cos(math.pi * i / 8) for i in range(8)])
    assert all(later < earlier for earlier, later in pairwise(found[1:]))
    assert found[5] == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_longer_than_the_training_is_only_a_warm_up(schedule):
    assert rates(3, warmup_steps=4, schedule=schedule) == [0.5, 1.0, 1.5]
