"""From config.optim to one optax transformation with parameter groups.

Every parameter belongs to exactly one group: "alpha" if the parameter is a gate or mixes streams,
by its type; otherwise the group of config.optim.groups whose regular expression matches its path;
otherwise "base".
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import Array
from ml_collections import ConfigDict

from rezero_jax.errors import UserError, choose_from
from rezero_jax.formatting import path_text
from rezero_jax.training.schedule import Schedule, interpolate, make_schedule
from rezero_jax.training.state import ModelSpec, Parameter

OPTIMIZERS = ("adagrad", "adamw", "lamb", "muon", "sgd")
MUON_MOMENTUM = 0.95
MUON_RMS = 0.2  # root mean square of the entries of Muon's update, about that of Adam's


def make_optimizer(
    config: ConfigDict, total_steps: int, spec: ModelSpec
) -> tuple[optax.GradientTransformation, dict[str, Schedule]]:
    """The optimizer and the learning-rate schedule of each of its groups.

    In stacked parameters LAMB's trust ratio and Muon's matrix are those of one layer.

    Args:
      config: config.optim.
      total_steps: updates in the run, which the schedules span.
      spec: the model's.

    Raises:
      UserError: an optimizer, schedule, rate or clip_norm is invalid, the path of a group matches
        no parameter, or a parameter matches two groups.
    """
    if config.clip_norm is not None and config.clip_norm <= 0:
        raise UserError(
            f"optim.clip_norm={config.clip_norm} is not positive; None disables clipping"
        )
    for name in ("momentum", "b1", "b2"):
        if not 0 <= config[name] < 1:
            raise UserError(f"optim.{name}={config[name]} is out of range; give 0 to below 1")
    labels = _labels(config, spec)
    groups = {"base": config, "alpha": config.alpha, **config.groups}
    optimizers, schedules = {}, {}
    for name in sorted(set(jax.tree.leaves(labels))):
        settings = config.copy_and_resolve_references()
        for key, value in groups[name].items():
            if value is not None and key not in ("alpha", "groups", "path"):
                settings[key] = value
        schedules[name] = make_schedule(settings, total_steps)
        optimizers[name] = _one_group(settings, schedules[name], total_steps, spec)
    optimizer = optax.partition(optimizers, labels)
    if rates := _scale_by(spec, lambda parameter: parameter.rate):
        optimizer = optax.chain(optimizer, *rates)
    if config.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return optimizer, schedules


def _labels(config: ConfigDict, spec: ModelSpec) -> Any:
    """A tree like the parameters with the name of each one's group."""
    patterns = {name: group.path for name, group in config.groups.items()}
    for name, pattern in patterns.items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(
                f"optim.groups.{name}.path={pattern!r} is not a regular expression ({error}); "
                "correct it"
            ) from None
    matched: set[str] = set()

    def label(path: Any, _: Any) -> str:
        text = path_text(path)
        parameter = spec.parameters[text]
        if parameter.is_gate or parameter.is_stream_weight:
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
            f"optim.groups.{name}.path={patterns[name]!r} matches no parameter of this model; "
            "correct the regular expression"
        )
    return labels


def _one_group(
    settings: ConfigDict, schedule: Schedule, total_steps: int, spec: ModelSpec
) -> optax.GradientTransformation:
    """The optimizer of one parameter group, whose `settings` are those of config.optim."""
    if settings.weight_decay < 0:
        raise UserError(f"optim.weight_decay={settings.weight_decay} is negative; give 0 or more")
    decay = optax.add_decayed_weights(settings.weight_decay)
    match settings.name:
        case "adagrad":
            # PyTorch divides by sqrt(sum) + 1e-10, optax by sqrt(sum + eps).
            chain = [decay, optax.scale_by_rss(initial_accumulator_value=0.0, eps=1e-20)]
        case "sgd":
            # As in PyTorch, momentum averages gradients that include the decay.
            if settings.momentum_points:
                points = settings.momentum_points
                cycle = interpolate("optim.momentum_points", points, 1, total_steps)
                trace = optax.inject_hyperparams(optax.trace, static_args="nesterov")
                momentum = trace(decay=cycle, nesterov=settings.nesterov)
            else:
                momentum = optax.trace(settings.momentum, settings.nesterov)
            chain = [decay, momentum]
        case "adamw":
            chain = [optax.scale_by_adam(settings.b1, settings.b2, eps=1e-8), decay]
        case "lamb":
            adam = optax.scale_by_adam(settings.b1, settings.b2, eps=1e-6)
            chain = [adam, decay, _scale_by_layer_trust_ratio(spec)]
        case "muon":
            adam = optax.scale_by_adam(settings.b1, settings.b2, eps=1e-8)
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
    if all(value == 1 for value in factors.values()):
        return []

    def scale(updates: Any, _: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, update: factors[path_text(path)] * update, updates
        )

    return [optax.stateless(scale)]


def _scale_by_layer_trust_ratio(spec: ModelSpec) -> optax.GradientTransformation:
    """LAMB's trust ratio, per layer in stacked parameters."""
    ratio = optax.scale_by_trust_ratio()

    def scale(update: Array, param: Array) -> Array:
        return ratio.update(update, ratio.init(param), param)[0]

    def scale_leaf(path: Any, update: Array, param: Array) -> Array:
        is_stacked = spec.parameters[path_text(path)].is_stacked
        return (jax.vmap(scale) if is_stacked else scale)(update, param)

    return optax.stateless(
        lambda updates, params: jax.tree.map_with_path(scale_leaf, updates, params)
    )


def _scale_by_muon(
    spec: ModelSpec, other: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Muon's updates of the trunk's matrices, and the updates by `other` of all other parameters.

    Keller Jordan's Muon (https://kellerjordan.github.io/posts/muon) orthogonalises the Nesterov
    momentum of each matrix; along axes that are neither inputs nor outputs, such as a stack's
    layers, one by one. A matrix of n inputs and m outputs moves by MUON_RMS sqrt(max(n, m)) times
    its orthogonal factor, so that one learning rate and one weight decay suit both optimizers
    (arXiv 2502.16982, equation 4).
    """

    def axes_of(path: Any) -> Any:
        return spec.parameters[path_text(path)].matrix_axes

    def kinds(params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: "matrix" if axes_of(path) else "other", params
        )

    def dimensions(params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: optax.contrib.MuonDimensionNumbers(*axes_of(path)), params
        )

    def scale(path: Any, update: Array) -> Array:
        sizes = [math.prod(update.shape[axis] for axis in axes) for axes in axes_of(path)]
        return update * (MUON_RMS * math.sqrt(max(sizes)))

    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=MUON_MOMENTUM, weight_dimension_numbers=dimensions),
        optax.stateless(lambda updates, params: jax.tree.map_with_path(scale, updates)),
    )
    return optax.partition({"matrix": muon, "other": other}, kinds)
