"""The residual networks: parity with PyTorch, identity, scan and unroll, parameter counts."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from rezero_jax import ResNet
from rezero_jax.errors import UserError
from rezero_jax.models.resnet.blocks import RULES
from rezero_jax.training.state import model_spec

CIFAR = functools.partial(ResNet.cifar, 14, num_classes=5, width=2, scan=True)
PREACT = functools.partial(ResNet.preact, 18, num_classes=5, width=1, scan=True)
PREACT50 = functools.partial(ResNet.preact, 50, num_classes=5, width=1, scan=True)
CASES = {
    "cifar_residual": functools.partial(CIFAR, residual="residual"),
    "cifar_zero_gamma": functools.partial(CIFAR, residual="zero_gamma"),
    "cifar_gated": functools.partial(CIFAR, residual="gated"),
    "cifar_rezero": functools.partial(CIFAR, residual="rezero"),
    "cifar_skipinit": functools.partial(CIFAR, residual="skipinit"),
    "cifar_fixup": functools.partial(CIFAR, residual="fixup"),
    "cifar_rezero_no_norm": functools.partial(CIFAR, residual="rezero", batch_norm=False),
    "cifar_rezero_subsample": functools.partial(CIFAR, residual="rezero", variant="notebook"),
    "preact_residual": functools.partial(PREACT, residual="residual"),
    "preact_gated": functools.partial(PREACT, residual="gated"),
    "preact_rezero": functools.partial(PREACT, residual="rezero"),
    "preact_skipinit": functools.partial(PREACT, residual="skipinit"),
    "preact_fixup": functools.partial(PREACT, residual="fixup"),
    "preact_rezero_no_norm": functools.partial(PREACT, residual="rezero", batch_norm=False),
    "preact_rezero_imagenet": functools.partial(PREACT, residual="rezero", stem="imagenet"),
    "preact50_rezero": functools.partial(PREACT50, residual="rezero"),
    "preact50_fixup": functools.partial(PREACT50, residual="fixup"),
}


@functools.cache
def stored():
    """The arrays of resnet.npz; tests/reference/make_resnet.py says how they are packed."""
    path = Path(__file__).parent / "reference" / "resnet.npz"
    with np.load(path, allow_pickle=False) as file:
        layout = json.loads(file["layout"].item())
        values = np.ascontiguousarray(file["values"].T).view("<f4").ravel()
    arrays, start = {}, 0
    for name, dtype, shape in layout:
        end = start + math.prod(shape)
        arrays[name] = values[start:end].reshape(shape).astype(dtype)
        start = end
    return arrays


def part(arrays, prefix):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def nested(flat):
    paths = {tuple(int(p) if p.isdigit() else p for p in k.split("/")): v for k, v in flat.items()}
    return traverse_util.unflatten_dict(jax.tree.map(jnp.asarray, paths))


def flat(tree):
    return {"/".join(map(str, k)): v for k, v in traverse_util.flatten_dict(tree).items()}


def assert_close(ours, theirs, rtol, atol):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.guarantee("PyTorch parity")
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] if c.startswith("preact50") else []) for c in CASES],
)
def test_same_as_pytorch_in_training_and_evaluation(case):
    arrays = part(stored(), f"{case}/")
    structure = model_spec(lambda rngs: CASES[case](rngs=rngs))
    params, stats = nested(part(arrays, "params/")), nested(part(arrays, "stats/"))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, structure.shapes)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == structure.parameter_count

    @functools.partial(jax.grad, has_aux=True)
    def gradient(params, stats, images, labels):
        model = structure.model(params, stats)
        logits = model(images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        return losses.mean(), (logits, losses.mean(), stats)

    optimizer = optax.chain(
        optax.add_decayed_weights(5e-4), optax.trace(0.9), optax.scale_by_learning_rate(0.05)
    )
    opt_state = optimizer.init(params)
    gradient = jax.jit(gradient)
    for i in range(3):
        images, labels = jnp.asarray(arrays["images"][i]), jnp.asarray(arrays["labels"][i])
        grads, (logits, loss, stats) = gradient(params, stats, images, labels)
        if i == 0:
            np.testing.assert_allclose(logits, arrays["logits"], rtol=2e-5, atol=5e-6)
            np.testing.assert_allclose(loss, arrays["loss"], rtol=2e-5)
            assert_close(flat(grads), part(arrays, "grads/"), rtol=1e-4, atol=5e-6)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert_close(flat(params), part(arrays, "params_after/"), rtol=1e-4, atol=1e-5)
    assert_close(flat(stats), part(arrays, "stats_after/"), rtol=1e-4, atol=1e-5)
    model = structure.model(params, stats)
    model.eval()
    logits = model(jnp.asarray(arrays["images"][0]))
    np.testing.assert_allclose(logits, arrays["eval_logits"], rtol=1e-4, atol=1e-5)


def test_the_stored_numbers_are_what_the_script_makes():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from tests.reference.make_resnet import all_references

    fresh, kept = all_references(), stored()
    assert fresh.keys() == kept.keys()
    for name, value in fresh.items():  # the file keeps 16 significant bits
        np.testing.assert_allclose(value, kept[name], rtol=2e-5, atol=1e-9, err_msg=name)


COUNTS = {  # (with BatchNorm and no gates, with BatchNorm and gates, fixup, without BatchNorm)
    ("cifar", 20): (269_818, 269_827, 268_393, 269_043),
    ("cifar", 32): (464_250, 464_265, 461_959, 463_033),
    ("cifar", 44): (658_682, 658_703, 655_525, 657_023),
    ("cifar", 56): (853_114, 853_141, 849_091, 851_013),
    ("cifar", 110): (1_728_058, 1_728_112, 1_720_138, 1_723_968),
    ("preact", 18): (11_171_146, 11_171_154, 11_164_411, 11_169_170),
    ("preact", 34): (21_279_306, 21_279_322, 21_265_195, 21_273_626),
    ("preact", 50): (23_509_066, 23_509_082, 23_467_851, 23_494_298),
}
COLUMNS = {"residual": 0, "zero_gamma": 0, "gated": 1, "rezero": 1, "fixup": 2, "skipinit": 3}
COLUMNS["rezero_channel"] = 0  # and a gate for each channel of each block's output
CHANNELS = {
    ("cifar", depth): (depth - 2) // 6 * (16 + 32 + 64) for depth in (20, 32, 44, 56, 110)
} | {
    ("preact", 18): 2 * 64 * 15,
    ("preact", 34): 64 * (3 * 1 + 4 * 2 + 6 * 4 + 3 * 8),
    ("preact", 50): 256 * (3 * 1 + 4 * 2 + 6 * 4 + 3 * 8),
}


@pytest.mark.parametrize("rule", [*RULES, "rezero without BatchNorm"])
@pytest.mark.parametrize(("family", "depth"), COUNTS)
def test_parameter_counts(family, depth, rule):
    if (family, rule) == ("preact", "zero_gamma"):
        pytest.skip("pre-activation blocks have no zero_gamma")
    name, _, bare = rule.partition(" ")
    make = functools.partial(getattr(ResNet, family), depth, name, batch_norm=not bare)
    count = COUNTS[family, depth][3 if bare else COLUMNS[name]]
    if name == "rezero_channel":
        count += CHANNELS[family, depth]
    assert model_spec(lambda rngs: make(rngs=rngs)).parameter_count == count


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (56, 853_018), (110, 1_727_962)])
def test_parameter_counts_of_the_notebook(depth, count):
    """The notebook prints 0.270M, 0.853M and 1.728M."""
    make = functools.partial(ResNet.cifar, depth, "residual", variant="notebook")
    assert model_spec(lambda rngs: make(rngs=rngs)).parameter_count == count


def shortcuts_alone(model, x):
    """The network without its branches."""
    x = model.stem(x)
    for stage in model.stages:
        if stage.entry is not None:
            entry = stage.entry
            u = nnx.relu(entry.norm1(x)) if hasattr(entry, "expansion") else x
            x = entry.shortcut(u)
    return model.head(x.mean((1, 2)))


IMAGES = jax.random.normal(jax.random.key(7), (4, 16, 16, 3))


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(ResNet.cifar, 14, "rezero"),
        functools.partial(ResNet.cifar, 26, "rezero", scan=True, batch_norm=False),
        functools.partial(ResNet.cifar, 14, "gated"),
        functools.partial(ResNet.cifar, 14, "skipinit"),
        functools.partial(ResNet.cifar, 14, "rezero_channel"),
        functools.partial(ResNet.preact, 18, "rezero"),
    ],
)
def test_gated_trunk_is_the_identity_at_the_start_to_the_bit(make):
    model = make(width=4, rngs=nnx.Rngs(0))
    model.eval()
    np.testing.assert_array_equal(model(IMAGES), shortcuts_alone(model, IMAGES))


def value_and_grad(structure, params, stats):
    """(loss, statistics), gradients."""

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        model = structure.model(params, stats)
        logits = model(IMAGES)
        return jnp.square(logits - 1).mean(), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return jax.jit(loss)(params)


def some_state(make, seed=0):
    """The structure, some parameters (gates open) and fresh statistics; nothing is compiled."""
    structure = model_spec(lambda rngs: make(rngs=rngs))
    rng = np.random.default_rng(seed)

    def value(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("kernel"):
            fan = math.prod(leaf.shape[-4:-1])
            return jnp.asarray(rng.normal(size=leaf.shape) * math.sqrt(2 / fan), jnp.float32)
        low, high = (0.5, 1.5) if "scale" in name else (-0.3, 0.3)
        return jnp.asarray(rng.uniform(low, high, leaf.shape), jnp.float32)

    params = jax.tree.map_with_path(value, structure.shapes)
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    return structure, params, jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.7), stats)


def unrolled(tree):
    """A tree of a network with scanned stages as that of its unrolled twin."""

    def stage(tree):
        if "rest" not in tree:
            return tree
        blocks = tree["rest"]["blocks"]
        depth = jax.tree.leaves(blocks)[0].shape[0]
        split = {i: jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(depth)}
        return tree | {"rest": {"blocks": split}}

    return tree | {"stages": {i: stage(s) for i, s in tree.get("stages", {}).items()}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        functools.partial(ResNet.cifar, 20, "rezero", width=4),
        functools.partial(ResNet.cifar, 20, "fixup", width=4),
        functools.partial(ResNet.preact, 34, "residual", width=1),
    ],
)
def test_scanned_equals_unrolled(make):
    make = functools.partial(make, scan=True)
    structure, params, stats = some_state(make)
    (loss, new_stats), grads = value_and_grad(structure, params, stats)
    twin = model_spec(lambda rngs: make(scan=False, rngs=rngs))
    (twin_loss, twin_stats), twin_grads = value_and_grad(twin, unrolled(params), unrolled(stats))
    np.testing.assert_allclose(loss, twin_loss, rtol=1e-5)
    assert_close(flat(unrolled(grads)), flat(twin_grads), rtol=1e-3, atol=1e-5)
    if new_stats:
        assert_close(flat(unrolled(new_stats)), flat(twin_stats), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_rematerialised_gradients_and_statistics_are_the_same():
    make = functools.partial(ResNet.cifar, 20, "rezero", width=4, scan=True)
    _, params, stats = some_state(make)
    (loss, new_stats), grads = value_and_grad(*some_state(make))
    again = model_spec(lambda rngs: make(remat="full", rngs=rngs))
    (loss_, new_stats_), grads_ = value_and_grad(again, params, stats)
    np.testing.assert_allclose(loss, loss_, rtol=1e-6)
    assert_close(flat(grads), flat(grads_), rtol=1e-4, atol=1e-6)
    assert_close(flat(new_stats), flat(new_stats_), rtol=1e-5, atol=1e-6)


def excess(kernel):
    """0.0 for a normal, -1.2 for a uniform distribution."""
    return float((kernel**4).mean() / kernel.var() ** 2 - 3)


@pytest.mark.slow
def test_initial_distributions():
    def kernel(*path, **kwargs):
        node = ResNet.cifar(32, **kwargs, rngs=nnx.Rngs(0))
        for key in path:
            node = node[key] if isinstance(key, int) else getattr(node, key)
        return np.asarray(node.kernel[...])

    second = ("stages", 2, "rest", "blocks", 1)
    cases = [  # values, fan, variance times fan, whether normal
        (kernel(*second, "conv1", residual="rezero"), 9 * 64, 2.0, True),
        (kernel("stages", 2, "entry", "conv1", residual="residual"), 9 * 64, 2.0, True),  # fan out
        (kernel("stages", 2, "entry", "conv1", variant="notebook"), 9 * 32, 2.0, True),  # fan in
        (kernel(*second, "conv2", residual="gated"), 9 * 64, 1 / 3, False),
        (kernel(*second, "conv1", residual="fixup"), 9 * 64, 2.0 / 15, True),  # over 15 blocks
        (kernel(*second, "conv2", residual="skipinit"), 9 * 64, 2.0, True),
    ]
    for values, fan, expected, normal in cases:
        np.testing.assert_allclose(values.var() * fan, expected, rtol=0.05)
        assert abs(excess(values) - (0.0 if normal else -1.2)) < 0.15
    fixup = ResNet.cifar(14, "fixup", rngs=nnx.Rngs(0))
    for zero in (fixup.stages[1].entry.conv2.kernel, fixup.head.kernel, fixup.head.bias):
        assert not np.any(zero[...])
    assert float(fixup.stages[0].rest.blocks[0].scale[...]) == 1.0
    zero_gamma = ResNet.cifar(14, "zero_gamma", rngs=nnx.Rngs(0)).stages[1].entry
    assert not np.any(zero_gamma.norm2.scale[...])
    assert np.all(zero_gamma.norm1.scale[...] == 1)
    # Three convolutions a block: blocks^(-1/4) on the deviation.
    bottleneck = ResNet.preact(50, "fixup", width=16, rngs=nnx.Rngs(0)).stages[3].entry
    np.testing.assert_allclose(bottleneck.conv2.kernel[...].var() * 9 * 128, 2 / 4, rtol=0.05)
    assert not np.any(bottleneck.conv3.kernel[...])
    preact = np.asarray(
        ResNet.preact(18, width=16, rngs=nnx.Rngs(0)).stages[3].entry.conv2.kernel[...]
    )
    np.testing.assert_allclose(preact.var() * 9 * 128, 1 / 3, rtol=0.05)


def test_networks_without_batch_norm_have_no_statistics_and_biases_instead():
    for rule, options in (("fixup", {}), ("skipinit", {}), ("rezero", {"batch_norm": False})):
        for make in (functools.partial(ResNet.cifar, 14), functools.partial(ResNet.preact, 18)):
            _, params, stats = some_state(functools.partial(make, rule, width=2, **options))
            assert not stats
            biases = [k for k in flat(params) if k.endswith("conv1/bias")]
            assert bool(biases) == (rule != "fixup")


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters_and_logits():
    make = functools.partial(ResNet.cifar, 14, width=4)
    structure, params, stats = some_state(make)
    expected = structure.model(params, stats)(IMAGES)
    narrow = model_spec(lambda rngs: make(dtype=jnp.bfloat16, rngs=rngs))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(narrow.shapes))
    model = narrow.model(params, stats)
    logits = model(IMAGES)
    assert logits.dtype == jnp.float32
    entry = model.stages[1].entry
    trunk = model.stages[0](model.stem(IMAGES))
    assert trunk.dtype == jnp.float32
    assert entry.branch(trunk).dtype == entry.conv1(trunk).dtype == jnp.bfloat16
    np.testing.assert_allclose(logits, expected, atol=0.1)
    assert not np.array_equal(logits, expected)


def test_evaluation_does_not_depend_on_the_batch_and_training_does():
    structure, params, stats = some_state(functools.partial(ResNet.cifar, 14, width=4))
    model = structure.model(params, stats)
    model.eval()
    np.testing.assert_allclose(model(IMAGES)[:2], model(IMAGES[:2]), rtol=1e-5, atol=1e-6)
    model.train()
    assert np.abs(model(IMAGES)[:2] - model(IMAGES[:2])).max() > 1e-3


def test_the_imagenet_stem_lowers_the_resolution_four_times():
    structure, params, stats = some_state(
        functools.partial(ResNet.preact, 18, width=4, stem="imagenet")
    )
    model = structure.model(params, stats)
    assert model.stem(jnp.ones((1, 224, 224, 3))).shape == (1, 56, 56, 4)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda r: ResNet.cifar(21, rngs=r), "depth=21 is not 6n [+] 2; the closest depths are 20"),
        (lambda r: ResNet.cifar(2, rngs=r), "the closest depths are 8 and 14"),
        (lambda r: ResNet.preact(20, rngs=r), 'unknown depth "20".*18, 34, 50'),
        (lambda r: ResNet.cifar(20, "rezerro", rngs=r), 'did you mean "rezero"'),
        (lambda r: ResNet.cifar(20, variant="notebok", rngs=r), 'did you mean "notebook"'),
        (lambda r: ResNet.preact(18, stem="image", rngs=r), 'did you mean "imagenet"'),
        (lambda r: ResNet.preact(18, "zero_gamma", rngs=r), "would never get a gradient"),
        (
            lambda r: ResNet.cifar(20, "zero_gamma", batch_norm=False, rngs=r),
            "set batch_norm=True",
        ),
        (
            lambda r: ResNet.cifar(8, width=2, rngs=r)(jnp.ones((1, 8, 8, 1))),
            "takes images .*make it with in_channels=1",
        ),
        (lambda r: ResNet.cifar(8, width=2, rngs=r)(jnp.ones((8, 8, 3))), "not .8, 8, 3."),
    ],
)
def test_mistakes_are_user_errors(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make(nnx.Rngs(0))
