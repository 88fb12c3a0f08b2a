"""From config.optim to one optax transformation with parameter groups.

Every parameter belongs to exactly one group: "alpha" if it is a gate or mixes streams, by its
type; else the group of config.optim.groups whose regular expression its path matches; else "base".
"""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from ml_collections import ConfigDict

from rezero_jax.errors import UserError, choose_from
from rezero_jax.training.muon import scale_by_muon
from rezero_jax.training.state import ModelSpec, path_text

Schedule = Callable[[Any], Any]

OPTIMIZERS = ("adagrad", "adamw", "lamb", "muon", "sgd")
SCHEDULES = ("constant", "cosine", "linear", "multistep", "piecewise")


def make_optimizer(
    config: ConfigDict, total_steps: int, spec: ModelSpec
) -> tuple[optax.GradientTransformation, dict[str, Schedule]]:
    """The optimizer and the learning-rate schedule of each of its groups.

    LAMB's trust ratio is that of each layer where parameters are stacked, and so is Muon's matrix.

    Args:
      config: config.optim.
      total_steps: updates in the run, which the schedules span.
      spec: the model's.

    Raises:
      UserError: an optimizer, schedule, rate or clip_norm is invalid, the path of a group matches
        no parameter, or a parameter matches two groups.
    """
    if config.clip_norm is not None and config.clip_norm <= 0:
        raise UserError(f"optim.clip_norm={config.clip_norm} is not positive; None clips nothing")
    labels = _labels(config, spec)
    groups = {"base": config, "alpha": config.alpha, **config.groups}
    rules, schedules = {}, {}
    for name in sorted(set(jax.tree.leaves(labels))):
        settings = config.copy_and_resolve_references()
        for key, value in groups[name].items():
            if value is not None and key not in ("alpha", "groups", "path"):
                settings[key] = value
        schedules[name] = _schedule(settings, total_steps)
        rules[name] = _rule(settings, schedules[name], total_steps, spec)
    optimizer = optax.partition(rules, labels)
    if spec.rates:
        optimizer = optax.chain(optimizer, _scale_by_path(spec.rates))
    if config.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return optimizer, schedules


def _labels(config: ConfigDict, spec: ModelSpec) -> Any:
    patterns = {name: group.path for name, group in config.groups.items()}
    matched: set[str] = set()

    def label(path: Any, _: Any) -> str:
        text = path_text(path)
        if text in spec.alpha_paths | spec.mix_paths:
            return "alpha"
        found = [name for name, pattern in patterns.items() if re.search(pattern, text)]
        if len(found) > 1:
            raise UserError(
                f"the parameter {text} belongs to the optimizer groups {' and '.join(found)}; "
                "narrow the path of one of them"
            )
        matched.update(found)
        return found[0] if found else "base"

    labels = jax.tree.map_with_path(label, spec.shapes)
    for name in patterns.keys() - matched:
        raise UserError(
            f"optim.groups.{name}.path={patterns[name]!r} matches no parameter of this model"
        )
    return labels


def _schedule(settings: ConfigDict, total_steps: int) -> Schedule:
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
            line = _through("optim.points", settings.points, total_steps)
            schedule = lambda step: peak * line(step + warmup)  # noqa: E731
        case other:
            raise choose_from("schedule", other, SCHEDULES)
    if not warmup:
        return schedule
    # The first update of a warm-up is not wasted on a rate of zero: step t has rate (t+1)/warmup.
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1)
    return optax.join_schedules([rise, schedule], [warmup])


def _through(key: str, points: Sequence[Any], total_steps: int) -> Schedule:
    """Straight lines through `points` (fraction of the run, value), as a function of the step."""
    try:
        fractions = [fraction for fraction, _ in points]
    except TypeError:
        fractions = []
    if not fractions or any(a > b for a, b in pairwise([0, *fractions, 1])):
        raise UserError(
            f"{key}={points} is no schedule; give pairs (fraction of the run, value), with "
            "fractions ascending from 0 to 1"
        )
    steps = jnp.asarray([round(fraction * total_steps) for fraction in fractions], jnp.float32)
    values = jnp.asarray([point[1] for point in points], jnp.float32)
    return lambda step: jnp.interp(jnp.asarray(step, jnp.float32), steps, values)


def _rule(
    settings: ConfigDict, schedule: Schedule, total_steps: int, spec: ModelSpec
) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(settings.weight_decay)
    match settings.name:
        case "adagrad":
            # PyTorch's constants: it divides by sqrt(sum) + 1e-10, optax by sqrt(sum + eps).
            parts = [decay, optax.scale_by_rss(initial_accumulator_value=0.0, eps=1e-20)]
        case "sgd":
            # PyTorch's order: the decay is part of the gradient that momentum averages.
            if settings.momentum_points:
                cycle = _through("optim.momentum_points", settings.momentum_points, total_steps)
                trace = optax.inject_hyperparams(optax.trace, static_args="nesterov")
                momentum = trace(decay=cycle, nesterov=settings.nesterov)
            else:
                momentum = optax.trace(settings.momentum, settings.nesterov)
            parts = [decay, momentum]
        case "adamw":
            parts = [optax.scale_by_adam(settings.b1, settings.b2, eps=1e-8), decay]
        case "lamb":
            adam = optax.scale_by_adam(settings.b1, settings.b2, eps=1e-6)
            parts = [adam, decay, _scale_by_layer_trust_ratio(spec.stacked_paths)]
        case "muon":
            adam = optax.scale_by_adam(settings.b1, settings.b2, eps=1e-8)
            parts = [scale_by_muon(spec.matrix_axes, adam), decay]
        case other:
            raise choose_from("optimizer", other, OPTIMIZERS)
    if not settings.weight_decay:
        parts.remove(decay)
    if spec.epsilon_scales and settings.name in ("adamw", "lamb", "muon"):
        # m / (sqrt(v) + s epsilon) of a gradient g is what epsilon gives of g / s.
        parts.insert(0, _scale_by_path({p: 1 / s for p, s in spec.epsilon_scales.items()}))
    if spec.rate_scales and settings.name != "sgd":
        parts.append(_scale_by_path(spec.rate_scales))
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


def _scale_by_path(factors: Mapping[str, float]) -> optax.GradientTransformation:
    def scaled(updates: Any, _: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, leaf: factors.get(path_text(path), 1.0) * leaf, updates
        )

    return optax.stateless(scaled)


def _scale_by_layer_trust_ratio(stacked_paths: frozenset[str]) -> optax.GradientTransformation:
    ratio = optax.scale_by_trust_ratio()

    def scale(update: Array, param: Array) -> Array:
        return ratio.update(update, ratio.init(param), param)[0]

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def leaf(path: Any, update: Array, param: Array) -> Array:
            return (jax.vmap(scale) if path_text(path) in stacked_paths else scale)(update, param)

        return jax.tree.map_with_path(leaf, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
