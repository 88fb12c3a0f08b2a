"""Data sets by keywords, for tests."""

from typing import Any

from ml_collections import ConfigDict

from rezero_jax import data
from rezero_jax.config import base_config


def section(name: str, data_dir: str | None = None, **fields: Any) -> ConfigDict:
    """config.data of a data set, its other fields by default."""
    config = base_config().data
    config.update({"name": name, "dir": data_dir, **fields})
    return config


def load(
    name: str, data_dir: str | None = None, *, seed: int = 0, **fields: Any
) -> data.Dataset | data.Text:
    """The data set of such a section."""
    return data.load(section(name, data_dir, **fields), seed)
