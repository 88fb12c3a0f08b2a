"""The stored numbers of PyTorch, timm and torchscale are the ones that the scripts make."""

import importlib

import numpy as np
import pytest

from tests.families import stored


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "packages", "rtol"),
    [
        ("mlp", ["torch"], 1e-4),
        ("resnet", ["torch"], 2e-5),  # the file keeps 16 significant bits
        ("transformer", ["torch", "rezero"], 1e-5),
        ("vit", ["torch", "timm"], 1e-4),
        ("schemes", ["torch", "timm", "torchscale"], 1e-4),
    ],
)
def test_the_stored_numbers_are_what_the_script_makes(name, packages, rtol):
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed")
    fresh = importlib.import_module("tests.reference").all_references(name)
    kept = stored(name)
    assert fresh.keys() == kept.keys()
    atol = 1e-9 if name == "resnet" else 1e-6
    for key, value in fresh.items():
        np.testing.assert_allclose(value, kept[key], rtol=rtol, atol=atol, err_msg=key)
