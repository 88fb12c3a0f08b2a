"""The fields of a config by dotted name: listed, compared, and set from text."""

import ast
import difflib
import functools
from collections.abc import Iterable
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_dict

from rezero_jax.errors import UserError

# The fields of a section that give one length in different units; at most one of them is set.
LENGTHS = {
    "train": ("steps", "epochs", "examples"),
    "eval": ("every_steps", "every_epochs", "every_examples"),
}


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


def override(config: ConfigDict, texts: Iterable[str]) -> None:
    """Sets fields of a config from texts "a.b=value".

    A length unsets the same length in other units, except where `texts` sets these as well.

    Raises:
      UserError: an unknown key (the sentence names the closest) or a value of another type.
    """
    keys, given = flatten(config.to_dict()), {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--config.{key} has no value; write --config.{key}=VALUE")
        if key not in keys:
            raise _unknown_key(key, sorted(keys))
        *parents, last = key.split(".")
        section = functools.reduce(ConfigDict.get, parents, config)
        assign(section, last, value, shown=f"config.{key}")
        given[key] = section[last]
    for name, fields in LENGTHS.items():
        if any(given.get(f"{name}.{field}") is not None for field in fields):
            for field in fields:
                if f"{name}.{field}" not in given:
                    config[name][field] = None


def assign(section: ConfigDict, key: str, text: str, shown: str) -> None:
    """Sets a field from text, which must be of the field's type.

    Args:
      shown: what the user calls the field.

    Raises:
      UserError: the text is of another type.
    """
    wanted = section.get_type(key)
    may_be_unset = isinstance(
        dict(section.items(preserve_field_references=True))[key], config_dict.FieldReference
    )
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


def _unknown_key(key: str, keys: list[str]) -> UserError:
    section, _, last = key.rpartition(".")
    siblings = {k.removeprefix(f"{section}."): k for k in keys if k.startswith(f"{section}.")}
    # Within a section that exists only the last name can be wrong: what precedes it would make any
    # two keys look alike.
    close = difflib.get_close_matches(last, siblings, n=1)
    close = [siblings[c] for c in close] or (
        [] if siblings else difflib.get_close_matches(key, keys, n=1)
    )
    valid = ", ".join(siblings.values() or keys)
    hint = f'did you mean "{close[0]}"?' if close else f"the keys are {valid}"
    return UserError(f'unknown config key "{key}"; {hint}')
