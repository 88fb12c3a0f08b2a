"""Learning rates and momenta as functions of the step."""

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
    if peak < 0 or warmup < 0:
        raise UserError(
            f"learning_rate={peak} and warmup_steps={warmup} cannot be negative; give 0 or more"
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
            line = interpolate("optim.points", settings.points, total_steps)
            schedule = lambda step: peak * line(step + warmup)  # noqa: E731
        case other:
            raise choose_from("schedule", other, SCHEDULES)
    if not warmup:
        return schedule
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1)
    return optax.join_schedules([rise, schedule], [warmup])


def interpolate(key: str, points: Sequence[Any], total_steps: int) -> Schedule:
    """Linear interpolation between `points` (fraction of the run, value) at a step.

    Args:
      key: the config field that holds the points, for errors.

    Raises:
      UserError: the points are not pairs whose fractions ascend from 0 to 1.
    """
    try:
        fractions = [fraction for fraction, _ in points]
    except TypeError:
        fractions = []
    if not fractions or any(a > b for a, b in pairwise([0, *fractions, 1])):
        raise UserError(
            f"{key}={points} is not a schedule; give pairs (fraction of the run, value), with "
            "fractions ascending from 0 to 1"
        )
    steps = jnp.asarray([round(fraction * total_steps) for fraction in fractions], jnp.float32)
    values = jnp.asarray([point[1] for point in points], jnp.float32)
    return lambda step: jnp.interp(jnp.asarray(step, jnp.float32), steps, values)
