"""Vision Transformers in the training loop: groups, norms, mistakes."""

import jax
import pytest

from rezero_jax.errors import UserError
from rezero_jax.formatting import path_text
from rezero_jax.models.build import make_model
from rezero_jax.training.optim import _labels
from rezero_jax.training.state import model_spec
from tests import families


def config(arg="smoke", **fields):
    return families.config(f"vit.py:{arg}", **fields)


def test_matrices_alone_decay_and_gates_are_a_group():
    normed = config("smoke,residual=pre_norm", **{"model.pool": "token"})
    for settings in (normed, config()):
        spec = model_spec(make_model(settings.model, (8, 8, 1), 10)[0])
        labels = jax.tree.leaves_with_path(_labels(settings.optim, spec))
        for (path, label), leaf in zip(labels, jax.tree.leaves(spec.shapes), strict=True):
            name = path_text(path)
            matrix = "kernel" in name or name.endswith("qkv")
            expected = "base" if matrix else "alpha" if "alpha" in name else "vectors"
            assert label == expected, (name, leaf.shape)
        assert settings.optim.groups.vectors.weight_decay == 0
        assert settings.optim.alpha.weight_decay == 0


@pytest.mark.parametrize(("residual", "has_norm"), [("rezero", False), ("pre_norm", True)])
def test_the_final_norm_follows_the_rule_however_it_is_set(residual, has_norm):
    for settings in (
        config(f"smoke,residual={residual}"),
        config(**{"model.residual": residual}),
    ):
        spec = model_spec(make_model(settings.model, (8, 8, 1), 10)[0])
        assert ("norm" in spec.shapes) is has_norm


def test_images_that_are_not_square():
    with pytest.raises(UserError, match=r"model\.name=vit takes square images, not 4 x 16"):
        make_model(config().model, (4, 16, 1), 10)
