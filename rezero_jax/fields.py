"""The fields of a config by dotted name: listed, compared, set from text and checked."""

import ast
import functools
from collections.abc import Iterable
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_dict

from rezero_jax.errors import UserError, choose_from

# The fields of a section that give one length in different units; at most one of them is set.
LENGTHS = {
    "train": ("steps", "epochs", "examples"),
    "eval": ("every_steps", "every_epochs", "every_examples"),
}
LARGEST = 2**31 - 1  # of int32
LARGEST_FLOAT = 3.4e38  # of float32, rounded down


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """A nested dict as {"a.b": leaf}."""
    return flatten_dict(tree, sep=".")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One text "key: old -> new" for each leaf in which two nested dicts differ."""
    flat_old, flat_new = flatten(old), flatten(new)
    return [
        f"{key}: {flat_old.get(key, 'absent')} -> {flat_new.get(key, 'absent')}"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
    ]


def check_numbers(config: ConfigDict) -> None:
    """Checks that every number of a config is finite and fits JAX's default dtypes.

    Other bounds are checked where the field is used. The seed may be larger, see data.Order.

    Raises:
      UserError: a number is not, or a tuple contains something else than numbers.
    """
    for key, value in flatten(config.to_dict()).items():
        for number in jax.tree.leaves(value):
            if isinstance(value, tuple) and not isinstance(number, int | float):
                raise UserError(f"{key}={value} contains {number!r}; give numbers alone")
            most = LARGEST if isinstance(number, int) else LARGEST_FLOAT
            if isinstance(number, int | float) and not abs(number) <= most and key != "seed":
                raise UserError(f"{key}={number} is not finite or too large; give at most {most}")


def override(config: ConfigDict, texts: Iterable[str]) -> None:
    """Sets fields of a config from texts "a.b=value".

    A length unsets the same length in other units, unless `texts` sets these as well.

    Raises:
      UserError: an unknown key (the sentence names the closest) or a value of another type.
    """
    keys, given = flatten(config.to_dict()), {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--config.{key} has no value; write --config.{key}=VALUE")
        section, _, last = key.rpartition(".")
        if key not in keys:
            siblings = [k for k in keys if k.startswith(f"{section}.")]
            raise choose_from("config key", key, siblings or keys)
        parent = functools.reduce(ConfigDict.get, section.split(".") if section else (), config)
        assign(parent, last, value, shown=f"config.{key}")
        given[key] = parent[last]
    for name, fields in LENGTHS.items():
        if any(given.get(f"{name}.{field}") is not None for field in fields):
            for field in fields:
                if f"{name}.{field}" not in given:
                    config[name][field] = None


def assign(section: ConfigDict, key: str, text: str, shown: str) -> None:
    """Sets a field from text, which must be of the field's type, or None for an optional field.

    Args:
      shown: what the user calls the field.

    Raises:
      UserError: the text is of another type.
    """
    wanted = section.get_type(key)
    values = dict(section.items(preserve_field_references=True))
    may_be_unset = isinstance(values[key], config_dict.FieldReference)
    try:
        if may_be_unset and text.strip().lower() == "none":
            value = None
        else:
            value = text if wanted is str else ast.literal_eval(text.strip().capitalize())
            if wanted is tuple and not isinstance(value, tuple):
                value = (value,)
            if value is None or (isinstance(value, bool) and wanted is not bool):
                raise ValueError
        section[key] = value
    except (TypeError, ValueError, SyntaxError):
        kind = {"int": "a whole number", "float": "a number", "bool": "True or False"}
        name = kind.get(wanted.__name__, f"a {wanted.__name__}")
        raise UserError(f"{shown} takes {name}, not {text!r}") from None
