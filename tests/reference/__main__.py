"""Writes the arrays of the names on the command line."""

import sys
from pathlib import Path

import numpy as np

from tests.reference import all_references
from tests.reference.make_resnet import packed

for name in sys.argv[1:]:
    arrays = all_references(name)
    path = Path(__file__).with_name(f"{name}.npz")
    np.savez_compressed(path, **(packed(arrays) if name == "resnet" else arrays))
