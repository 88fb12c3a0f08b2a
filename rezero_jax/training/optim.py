"""From config.optim to one optax transformation with parameter groups, and its schedules.

Every parameter belongs to exactly one group: "alpha" if the parameter is a gate or mixes streams,
by its type; otherwise the group of config.optim.groups whose regular expression matches its path;
otherwise "base".
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from ml_collections import ConfigDict

from rezero_jax.errors import UserError, check_between, choose_from
from rezero_jax.formatting import path_text
from rezero_jax.parameters import Parameter
from rezero_jax.training.state import ModelSpec

OPTIMIZERS = ("adagrad", "adamw", "lamb", "muon", "sgd")
SCHEDULES = ("constant", "cosine", "linear", "multistep", "piecewise")
MUON_MOMENTUM = 0.95
MUON_RMS = 0.2  # root mean square of the entries of Muon's update, about that of Adam's


def make_optimizer(
    config: ConfigDict, total_steps: int, spec: ModelSpec
) -> tuple[optax.GradientTransformation, dict[str, optax.Schedule]]:
    """The optimizer and the learning-rate schedule of each of its groups.

    `config` is config.optim; the schedules span `total_steps` updates. In stacked parameters LAMB's
    trust ratio and Muon's matrix are those of one layer. Raises a UserError if a value is out of
    range, a group has no parameter, or a parameter two groups.
    """
    if config.clip_norm is not None and config.clip_norm <= 0:
        raise UserError(f"optim.clip_norm={config.clip_norm} is not positive; None disables it")
    labels = _labels(config, spec)
    optimizers, schedules = {}, {}
    for name in sorted(set(jax.tree.leaves(labels))):
        settings = _settings(config, name)
        _check_ranges(settings)
        schedules[name] = make_schedule(settings, total_steps)
        optimizers[name] = _one_group(settings, schedules[name], total_steps, spec)
    optimizer = optax.partition(optimizers, labels)
    if rates := _scale_by(spec, lambda parameter: parameter.rate):
        optimizer = optax.chain(optimizer, *rates)
    if config.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return optimizer, schedules


def _settings(config: ConfigDict, name: str) -> ConfigDict:
    """config.optim with the values of a parameter group in it."""
    group = {"base": {}, "alpha": config.alpha, **config.groups}[name]
    return ConfigDict({**config, **{key: v for key, v in group.items() if v is not None}})


def has_same_rates(config: ConfigDict, total: int, other: int, steps: int) -> bool:
    """Whether runs of two lengths have the same rates and momenta in their first `steps` updates.

    `config` is config.optim.
    """

    def rates(total_steps: int) -> Iterator[Any]:
        for name in ("base", "alpha", *config.groups):
            yield make_schedule(_settings(config, name), total_steps)
        if points := config.momentum_points:
            yield _interpolate("optim.momentum_points", points, 1, total_steps)

    def values(schedule: optax.Schedule) -> Array:
        return jax.vmap(lambda step: jnp.asarray(schedule(step)))(jnp.arange(steps))

    return all(
        bool((values(one) == values(two)).all())
        for one, two in zip(rates(total), rates(other), strict=True)
    )


def _check_ranges(settings: ConfigDict) -> None:
    for name in ("learning_rate", "warmup_steps", "weight_decay", "decay_factor"):
        check_between(0, settings[name], math.inf, f"optim.{name}")
    for name in ("momentum", "b1", "b2"):
        if not 0 <= settings[name] < 1:
            raise UserError(f"optim.{name}={settings[name]} is out of range; give 0 to below 1")
    if any(not 0 <= fraction <= 1 for fraction in settings.milestones):
        raise UserError(f"optim.milestones={settings.milestones} are not fractions; give 0 to 1")


def _labels(config: ConfigDict, spec: ModelSpec) -> Any:
    patterns = {}
    for name, group in config.groups.items():
        try:
            patterns[name] = re.compile(group.path)
        except (re.error, TypeError) as error:
            raise UserError(
                f"optim.groups.{name}.path={group.path!r} is not a regular expression ({error}); "
                "correct it"
            ) from None
    matched: set[str] = set()

    def label(path: Any, _: Any) -> str:
        text = path_text(path)
        if spec.parameters[text].kind == "gate":
            return "alpha"
        found = [name for name, pattern in patterns.items() if pattern.search(text)]
        if len(found) > 1:
            raise UserError(
                f"{text} belongs to the optimizer groups {' and '.join(found)}; narrow one path"
            )
        matched.update(found)
        return found[0] if found else "base"

    labels = jax.tree.map_with_path(label, spec.shapes)
    for name in patterns.keys() - matched:
        raise UserError(
            f"optim.groups.{name}.path={patterns[name].pattern!r} matches no parameter; correct it"
        )
    return labels


def _one_group(
    settings: ConfigDict, schedule: optax.Schedule, total_steps: int, spec: ModelSpec
) -> optax.GradientTransformation:
    """The optimizer of one parameter group, whose `settings` are those of config.optim."""
    decay = optax.add_decayed_weights(settings.weight_decay)
    epsilon = 1e-6 if settings.name == "lamb" else 1e-8
    adam = optax.scale_by_adam(settings.b1, settings.b2, epsilon)
    match settings.name:
        case "adagrad":
            # PyTorch divides by sqrt(sum) + 1e-10, optax by sqrt(sum + eps).
            chain = [decay, optax.scale_by_rss(initial_accumulator_value=0.0, eps=1e-20)]
        case "sgd":
            # As in PyTorch, momentum averages gradients that include the decay.
            momentum = optax.trace(settings.momentum, settings.nesterov)
            if points := settings.momentum_points:
                cycle = _interpolate("optim.momentum_points", points, 1, total_steps)
                trace = optax.inject_hyperparams(optax.trace, static_args="nesterov")
                momentum = trace(decay=cycle, nesterov=settings.nesterov)
            chain = [decay, momentum]
        case "adamw":
            chain = [adam, decay]
        case "lamb":
            chain = [adam, decay, _scale_by_layer_trust_ratio(spec)]
        case "muon":
            chain = [_scale_by_muon(spec, adam), decay]
        case other:
            raise choose_from("optimizer", other, OPTIMIZERS)
    if not settings.weight_decay:
        chain.remove(decay)
    if settings.name in ("adamw", "lamb", "muon"):
        # m / (sqrt(v) + s epsilon) of a gradient g equals the update with epsilon of g / s.
        chain = [*_scale_by(spec, lambda parameter: 1 / parameter.epsilon_scale), *chain]
    if settings.name != "sgd":
        chain += _scale_by(spec, lambda parameter: parameter.rate_scale)
    return optax.chain(*chain, optax.scale_by_learning_rate(schedule))


def _scale_by(
    spec: ModelSpec, factor: Callable[[Parameter], float]
) -> list[optax.GradientTransformation]:
    """The transformation that multiplies each parameter's update; none where all factors are 1."""
    factors = {path: factor(parameter) for path, parameter in spec.parameters.items()}
    if set(factors.values()) <= {1}:
        return []

    def scale(path: Any, update: Array, _: Any) -> Array:
        return factors[path_text(path)] * update

    return [_stateless(scale)]


def _stateless(scale: Callable[[Any, Array, Array], Array]) -> optax.GradientTransformation:
    """The transformation of each update by `scale(path, update, param)`."""
    return optax.stateless(lambda updates, params: jax.tree.map_with_path(scale, updates, params))


def _scale_by_layer_trust_ratio(spec: ModelSpec) -> optax.GradientTransformation:
    ratio = optax.scale_by_trust_ratio()

    def scale_layer(update: Array, param: Array) -> Array:
        return ratio.update(update, ratio.init(param), param)[0]

    def scale(path: Any, update: Array, param: Array) -> Array:
        is_stacked = spec.parameters[path_text(path)].is_stacked
        return (jax.vmap(scale_layer) if is_stacked else scale_layer)(update, param)

    return _stateless(scale)


def _scale_by_muon(
    spec: ModelSpec, other: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Muon's updates of the trunk's matrices, and the updates by `other` of all other parameters.

    Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon) orthogonalises the Nesterov
    momentum of each matrix, one by one along axes such as a stack's layers. A matrix of n inputs
    and m outputs moves by MUON_RMS sqrt(max(n, m)) times its orthogonal factor, so that one
    learning rate suits both optimizers (arXiv 2502.16982, equation 4).
    """

    def axes_of(path: Any) -> Any:
        return spec.parameters[path_text(path)].matrix_axes

    def kinds(params: Any) -> Any:
        return jax.tree.map_with_path(lambda p, _: "matrix" if axes_of(p) else "other", params)

    def dimensions(params: Any) -> Any:
        numbers = optax.contrib.MuonDimensionNumbers
        return jax.tree.map_with_path(lambda path, _: numbers(*axes_of(path)), params)

    def scale(path: Any, update: Array, _: Any) -> Array:
        sizes = [math.prod(update.shape[axis] for axis in axes) for axes in axes_of(path)]
        return update * (MUON_RMS * math.sqrt(max(sizes)))

    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=MUON_MOMENTUM, weight_dimension_numbers=dimensions),
        _stateless(scale),
    )
    return optax.partition({"matrix": muon, "other": other}, kinds)


def make_schedule(settings: ConfigDict, total_steps: int) -> optax.Schedule:
    """The learning rate of one parameter group as a function of the step, from 0.

    `settings` is config.optim with the group's own values in it; the schedule spans `total_steps`
    updates. A warm-up precedes it: step t has (t + 1) / warmup_steps of the peak rate. Raises a
    UserError if the schedule is unknown, or its points are invalid.
    """
    peak, warmup = settings.learning_rate, settings.warmup_steps
    steps = max(total_steps - warmup, 1)
    match settings.schedule:
        case "constant":
            schedule = optax.constant_schedule(peak)
        case "linear":
            schedule = optax.linear_schedule(peak, 0.0, steps)
        case "cosine":
            schedule = optax.cosine_decay_schedule(peak, steps)
        case "multistep":
            drops = [round(fraction * total_steps) - warmup for fraction in settings.milestones]
            factors = dict.fromkeys(drops, settings.decay_factor)
            schedule = optax.piecewise_constant_schedule(peak, factors)
        case "piecewise":
            line = _interpolate("optim.points", settings.points, math.inf, total_steps)
            schedule = lambda step: peak * line(step + warmup)  # noqa: E731
        case other:
            raise choose_from("schedule", other, SCHEDULES)
    if not warmup:
        return schedule
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1)
    return optax.join_schedules([rise, schedule], [warmup])


def _interpolate(key: str, points: Sequence[Any], limit: float, total_steps: int) -> optax.Schedule:
    """Linear interpolation between `points` (fraction of the run, value below `limit`) at a step.

    `key` is the config field of the points, for errors.
    """
    try:
        fractions, levels = zip(*points, strict=True)
    except (TypeError, ValueError):
        fractions, levels = (), ()
    if not fractions or any(a > b for a, b in pairwise([0, *fractions, 1])):
        raise UserError(
            f"{key}={points} is not a schedule; give pairs (fraction of the run, value), with "
            "fractions ascending from 0 to 1"
        )
    if any(not 0 <= level < limit for level in levels):
        raise UserError(f"{key}={points} has a value outside 0 .. {limit}; correct the value")
    steps = jnp.asarray([round(fraction * total_steps) for fraction in fractions], jnp.float32)
    values = jnp.asarray(levels, jnp.float32)
    return lambda step: jnp.interp(jnp.asarray(step, jnp.float32), steps, values)
