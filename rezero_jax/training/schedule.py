"""Learning rates and momenta as functions of the step."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from rezero_jax.errors import UserError, choose_from

Schedule = Callable[[Any], Any]

SCHEDULES = ("constant", "cosine", "linear", "multistep", "piecewise")


def make_schedule(settings: ConfigDict, total_steps: int) -> Schedule:
    """The learning rate of one parameter group as a function of the step, from 0.

    A warm-up precedes the schedule: step t has the rate (t + 1) / warmup_steps of the peak, so that
    the first update already has a rate above zero.

    Args:
      settings: config.optim with the group's own values in it.
      total_steps: updates in the run, which the schedule spans.

    Raises:
      UserError: the schedule is unknown, or its rate, warm-up or points are invalid.
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    for name in ("learning_rate", "warmup_steps", "decay_factor"):
        if settings[name] < 0:
            raise UserError(f"optim.{name}={settings[name]} is negative; give 0 or more")
    if any(not 0 <= fraction <= 1 for fraction in settings.milestones):
        raise UserError(
            f"optim.milestones={settings.milestones} are not fractions of the run; give 0 to 1"
        )
    steps = max(total_steps - warmup, 1)
    match settings.schedule:
        case "constant":
            schedule = optax.constant_schedule(peak)
        case "linear":
            schedule = optax.linear_schedule(peak, 0.0, steps)
        case "cosine":
            schedule = optax.cosine_decay_schedule(peak, steps)
        case "multistep":
            drops = {
                round(fraction * total_steps) - warmup: settings.decay_factor
                for fraction in settings.milestones
            }
            schedule = optax.piecewise_constant_schedule(peak, drops)
        case "piecewise":
            line = interpolate("optim.points", settings.points, math.inf, total_steps)
            schedule = lambda step: peak * line(step + warmup)  # noqa: E731
        case other:
            raise choose_from("schedule", other, SCHEDULES)
    if not warmup:
        return schedule
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1)
    return optax.join_schedules([rise, schedule], [warmup])


def interpolate(key: str, points: Sequence[Any], limit: float, total_steps: int) -> Schedule:
    """Linear interpolation between `points` (fraction of the run, value) at a step.

    Args:
      key: the config field of the points, for errors.
      limit: every value is in 0 .. limit, the limit excluded.

    Raises:
      UserError: the points are not pairs whose fractions ascend from 0 to 1, or a value is outside
        its range.
    """
    try:
        fractions = [fraction for fraction, _ in points]
    except (TypeError, ValueError):
        fractions = []
    if not fractions or any(a > b for a, b in pairwise([0, *fractions, 1])):
        raise UserError(
            f"{key}={points} is not a schedule; give pairs (fraction of the run, value), with "
            "fractions ascending from 0 to 1"
        )
    if any(not 0 <= value < limit for _, value in points):
        raise UserError(f"{key}={points} has a value outside 0 .. {limit}; correct the value")
    steps = jnp.asarray([round(fraction * total_steps) for fraction in fractions], jnp.float32)
    values = jnp.asarray([point[1] for point in points], jnp.float32)
    return lambda step: jnp.interp(jnp.asarray(step, jnp.float32), steps, values)
