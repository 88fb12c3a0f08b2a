"""Folded models against the gated ones: outputs, parameters, what is left alone, errors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rezero_jax import (
    MLP,
    Alpha,
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    ResNet,
    ReZero,
    Stack,
    Transformer,
    ViT,
    fold_alpha,
)
from rezero_jax.errors import UserError
from rezero_jax.models.fold import SignedRelu, fold, folded_rule, last_weights
from rezero_jax.models.resnet.batch_norm import BatchNorm
from rezero_jax.models.resnet.blocks import PreBlock, PreBottleneck
from rezero_jax.models.resnet.conv import Conv
from rezero_jax.models.resnet.parts import Parts
from rezero_jax.models.transformer.attention import Attention
from rezero_jax.models.transformer.layer import FeedForward
from rezero_jax.models.transformer.options import LayerOptions
from rezero_jax.residual import make_rule

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


FEATURES, IMAGES, MEMORY = normal(5, 8), normal(4, 8, 8, 3), normal(2, 4, 8)
SEQUENCES, MAPS = normal(2, 6, 8), normal(2, 6, 6, 8)
TOKENS = jnp.asarray(RNG.integers(11, size=(2, 6)))


def preact(rule, block, counts, rngs):
    """A shallow one: BatchNorm over few pixels, layer after layer, would blow up the rounding."""
    parts = Parts(block=block, blocks=sum(counts), residual=rule, scan=True)
    return ResNet(parts, counts, 2, 10, in_channels=3, stem="cifar", activate_stem=False, rngs=rngs)


CASES = {  # how a model is made, and what it is called with
    "mlp": (lambda r: MLP(8, 6, 4, 3, rngs=r), FEATURES),
    "mlp_unrolled": (lambda r: MLP(8, 6, 4, 3, scan=False, rngs=r), FEATURES),
    "mlp_rezero_channel": (lambda r: MLP(8, 6, 4, 3, "rezero_channel", rngs=r), FEATURES),
    "mlp_rezero_channel_unrolled": (
        lambda r: MLP(8, 6, 4, 3, "rezero_channel", scan=False, rngs=r),
        FEATURES,
    ),
    "cifar": (lambda r: ResNet.cifar(14, width=2, scan=True, rngs=r), IMAGES),
    "cifar_no_norm": (lambda r: ResNet.cifar(8, width=2, batch_norm=False, rngs=r), IMAGES),
    "cifar_unrolled": (lambda r: ResNet.cifar(8, width=2, variant="notebook", rngs=r), IMAGES),
    "cifar_skipinit": (lambda r: ResNet.cifar(14, "skipinit", width=2, scan=True, rngs=r), IMAGES),
    "cifar_rezero_channel": (
        lambda r: ResNet.cifar(8, "rezero_channel", width=2, rngs=r),
        IMAGES,
    ),
    "preact": (lambda r: preact("rezero", PreBlock, (2, 1), r), IMAGES),
    "preact_bottleneck": (lambda r: preact("rezero", PreBottleneck, (1,), r), IMAGES),
    "preact_bottleneck_skipinit": (lambda r: preact("skipinit", PreBottleneck, (3,), r), IMAGES),
    "preact_skipinit": (
        lambda r: ResNet.preact(18, "skipinit", width=2, stem="imagenet", rngs=r),
        IMAGES,
    ),
    "transformer": (lambda r: Transformer(11, 8, 3, 2, 6, rngs=r), TOKENS),
    "transformer_sublayers": (
        lambda r: Transformer(
            11, 8, 2, 2, 6, alpha_per="sublayer", positions="rotary", scan=False, rngs=r
        ),
        TOKENS,
    ),
    "transformer_rezero_channel": (
        lambda r: Transformer(
            11, 8, 3, 2, 6, "rezero_channel", alpha_per="sublayer", bias=False, tied=True, rngs=r
        ),
        TOKENS,
    ),
    "vit": (lambda r: ViT(8, 4, 8, 3, 2, 5, rngs=r), IMAGES),
    "encoder": (
        lambda r: Encoder(8, 2, 2, residual="rezero_channel", scan=False, rngs=r),
        SEQUENCES,
    ),
    "decoder": (lambda r: Decoder(8, 2, 3, rngs=r), (SEQUENCES, MEMORY)),
    "encoder_layer": (lambda r: EncoderLayer(8, 2, rngs=r), SEQUENCES),
    "decoder_layer": (
        lambda r: DecoderLayer(8, 2, alpha_per="sublayer", rngs=r),
        (SEQUENCES, MEMORY),
    ),
    "decoder_layer_rezero_channel": (
        lambda r: DecoderLayer(8, 2, residual="rezero_channel", kv_heads=1, rngs=r),
        (SEQUENCES, MEMORY),
    ),
}


def build(make, seed=0):
    """The model with random parameters, and gates of both signs; nothing is compiled."""
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    gates = itertools.count()
    for variable in variables(model):
        shape = variable.shape
        if isinstance(variable, Alpha):
            signs = np.resize([-1.0, 1.0], variable.size).reshape(shape) * (-1) ** next(gates)
            value = rng.uniform(0.3, 1.2, shape) * signs
        elif isinstance(variable, nnx.BatchStat):
            value = rng.uniform(0.2, 1.5, shape)
        else:
            value = rng.normal(size=shape) * (0.25 if len(shape) > 2 else 0.5)
        variable.set_value(jnp.asarray(value, variable.dtype))
    return model


def variables(model, kind=nnx.Variable):
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, kind)]


def gate_count(model):
    return sum(alpha.size for alpha in variables(model, Alpha))


def parameter_count(model):
    return sum(param.size for param in variables(model, nnx.Param))


@jax.jit
def outputs(model, inputs):
    """What the model computes in evaluation, and if that is something else in training."""
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    model.eval()
    evaluation = model(*inputs)
    model.train()
    if not variables(model, nnx.BatchStat):
        return (evaluation,)
    return evaluation, model(*inputs), [v[...] for v in variables(model, nnx.BatchStat)]


def assert_close(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def check(model, inputs):
    """Folds the model and compares the two; returns the folded one."""
    values = [(v, v.get_value(), np.array(v.get_value())) for v in variables(model)]
    structure = nnx.graphdef(model)
    signs = np.concatenate([np.sign(alpha[...]).ravel() for alpha in variables(model, Alpha)])
    assert len(signs) == 1 or set(signs) == {-1.0, 1.0}
    folded = fold_alpha(model)
    assert nnx.graphdef(model) == structure
    for variable, value, numbers in values:
        assert variable.get_value() is value
        np.testing.assert_array_equal(value, numbers)
    assert type(folded) is type(model)
    assert not variables(folded, Alpha)
    assert not nnx.state(folded, Alpha)
    assert parameter_count(folded) == parameter_count(model) - gate_count(model)
    expected = outputs(model, inputs)
    assert_close(outputs(folded, inputs), expected)
    for alpha in variables(ungated := nnx.clone(model), Alpha):
        alpha.set_value(jnp.asarray(np.ones(alpha.shape, np.float32)))
    assert np.abs(outputs(ungated, inputs)[0] - expected[0]).max() > 0.01
    return folded


@pytest.mark.parametrize("case", CASES)
def test_folded_model_computes_the_same(case):
    make, inputs = CASES[case]
    folded = check(build(make), inputs)
    assert nnx.graphdef(fold_alpha(folded)) == nnx.graphdef(folded)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("case", ["mlp", "cifar_no_norm"])
def test_relu_behind_the_weights_follows_the_sign_of_the_gate(case, sign):
    make, inputs = CASES[case]
    model = build(make)
    for alpha in variables(model, Alpha):
        alpha[...] = sign * jnp.abs(alpha[...])
    assert_close(outputs(fold_alpha(model), inputs), outputs(model, inputs))


@pytest.mark.parametrize("shape", [(), (8,)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_signed_relu_is_alpha_times_relu_to_the_bit(shape, dtype):
    z = FEATURES.astype(dtype)
    for scale in (0.0, 0.5, -2.0):  # powers of two: no rounding
        alpha = scale * jnp.resize(jnp.asarray([1.0, -1.0]), shape)
        wide = jnp.broadcast_to(alpha, z.shape).astype(dtype)
        result = SignedRelu(alpha)(wide * z)
        assert result.dtype == dtype
        np.testing.assert_array_equal(result, wide * nnx.relu(z))


UNGATED = {
    **{
        f"mlp_{rule}": functools.partial(MLP, 8, 6, 4, 3, rule)
        for rule in ("plain", "residual", "norm", "pre_norm", "post_norm", "gpt2_norm")
    },
    "cifar_residual": functools.partial(ResNet.cifar, 14, "residual", width=2, scan=True),
    "cifar_zero_gamma": functools.partial(ResNet.cifar, 14, "zero_gamma", width=2),
    "preact_fixup": functools.partial(ResNet.preact, 18, "fixup", width=2),
    "transformer_pre_norm": functools.partial(Transformer, 11, 8, 3, 2, 6, "pre_norm"),
    "linear": functools.partial(nnx.Linear, 8, 8),
}


@pytest.mark.parametrize("case", UNGATED)
def test_model_without_gates_comes_back_as_an_equal_copy(case):
    model = build(lambda rngs: UNGATED[case](rngs=rngs))
    folded = fold_alpha(model)
    assert folded is not model
    assert nnx.graphdef(folded) == nnx.graphdef(model)
    for ours, theirs in zip(variables(folded), variables(model), strict=True):
        assert ours is not theirs
        assert ours.get_value() is theirs.get_value()


class Branch(nnx.Module):
    """A user's branch."""

    def __init__(self, rngs):
        self.inner = ReZero(nnx.Linear(8, 8, rngs=rngs))
        self.out = nnx.Param(jnp.zeros((8, 8)))

    def __call__(self, x, shift=0.0):
        return jnp.tanh(self.inner(x) + shift) @ self.out[...]


@last_weights.register(Branch)
def _(branch):
    return (branch.out,)


WRAPPED = {
    "linear": (lambda r: nnx.Linear(8, 8, rngs=r), FEATURES),
    "linear_without_bias": (lambda r: nnx.Linear(8, 8, use_bias=False, rngs=r), FEATURES),
    "linear_general": (lambda r: nnx.LinearGeneral((6, 8), (6, 8), axis=(-2, -1), rngs=r), MAPS),
    "flax_conv": (lambda r: nnx.Conv(8, 8, (3, 3), feature_group_count=2, rngs=r), MAPS),
    "conv": (lambda r: Conv(8, 8, 3, bias=True, rngs=r), MAPS),
    "batch_norm": (lambda r: BatchNorm(8), MAPS),
    "attention": (lambda r: Attention(LayerOptions(8, 2), rngs=r), SEQUENCES),
    "feedforward": (
        lambda r: FeedForward(LayerOptions(8, 1, 16, activation="silu"), rngs=r),
        SEQUENCES,
    ),
    "sequential": (
        lambda r: nnx.Sequential(nnx.Linear(8, 4, rngs=r), jnp.tanh, nnx.Linear(4, 8, rngs=r)),
        FEATURES,
    ),
    "own": (Branch, FEATURES),
}


@pytest.mark.parametrize(
    ("case", "scan"),
    [("linear", False), *((case, scan) for case in WRAPPED for scan in (None, True))],
)
def test_wrapped_branches_alone_and_in_a_stack(case, scan):
    make, inputs = WRAPPED[case]

    def model(rngs):
        if scan is None:
            return ReZero(make(rngs))
        return Stack(lambda rngs: ReZero(make(rngs)), 3, scan=scan, rngs=rngs)

    check(build(model), inputs)


def test_wrapped_branch_still_takes_further_arguments_and_keeps_the_dtype_of_the_trunk():
    model = build(lambda rngs: ReZero(Branch(rngs)))
    folded = fold_alpha(model)
    assert_close(folded(FEATURES, shift=0.5), model(FEATURES, shift=0.5))
    narrow = FEATURES.astype(jnp.bfloat16)
    assert folded(narrow).dtype == model(narrow).dtype == jnp.bfloat16


class OwnBlock(nnx.Module):
    """A user's block with one gate for two branches."""

    def __init__(self, rule, rngs):
        self.one, self.two = (nnx.Linear(8, 8, rngs=rngs) for _ in range(2))
        self.rule = rule

    def __call__(self, x):
        x = self.rule(x, lambda u: self.one(jnp.tanh(u)))
        return self.rule(x, self.two)


@fold.register(OwnBlock)
def _(block):
    block.rule = folded_rule(block.rule, block.one, block.two)


class Nested(nnx.Module):
    """Gated things at many places; `twice` is used twice, gate and all."""

    def __init__(self, rngs):
        self.parts = nnx.Dict(
            stem=nnx.Linear(8, 8, rngs=rngs),
            blocks=nnx.List(
                [
                    Stack(lambda r: EncoderLayer(8, 2, rngs=r), 2, rngs=rngs),
                    Stack(lambda r: ReZero(nnx.Linear(8, 8, rngs=r)), 2, scan=False, rngs=rngs),
                    Stack(
                        lambda r: Stack(
                            lambda r: OwnBlock(make_rule("rezero_channel", 8, rngs=r), r), 3, rngs=r
                        ),
                        2,
                        rngs=rngs,
                    ),
                ]
            ),
        )
        rule = make_rule("rezero", 8, rngs=nnx.Rngs(0))
        self.twice = OwnBlock(rule, rngs)
        self.again = nnx.List([self.twice, OwnBlock(rule, rngs)])  # shares the gate alone
        self.tail = nnx.data((ReZero(nnx.Linear(8, 8, rngs=rngs)),))

    def __call__(self, x):
        x = self.parts.stem(x)
        for block in (*self.parts.blocks, self.twice, *self.again, *self.tail):
            x = block(x)
        return x


def test_gates_anywhere_in_a_module_of_ones_own():
    folded = check(build(Nested), SEQUENCES)
    assert folded.again[0] is folded.twice


def test_dropout_falls_on_the_same_places():
    model = build(lambda rngs: EncoderLayer(8, 2, dropout=0.3, alpha_per="sublayer", rngs=rngs))
    key = jax.random.key(1, impl="rbg")  # compiles faster than the usual one
    ours, theirs = (
        jax.jit(lambda model: model(SEQUENCES, rngs=nnx.Rngs(dropout=key)))(m)
        for m in (fold_alpha(model), model)
    )
    assert_close(ours, theirs)


def test_works_under_jit():
    model = build(CASES["mlp_rezero_channel"][0])
    assert_close(outputs(jax.jit(fold_alpha)(model), FEATURES), outputs(model, FEATURES))


@pytest.mark.parametrize("scan", [True, False])
def test_folded_network_multiplies_no_more_than_one_that_never_had_gates(scan):
    def products(rule, fold):
        model = build(lambda rngs: MLP(8, 6, 4, 3, rule, scan=scan, rngs=rngs))
        code = str(jax.make_jaxpr(lambda m, x: m(x))(fold(model), FEATURES))
        return code.count(" mul "), code.count(" dot_general")

    plain = products("residual", lambda model: model)
    assert products("rezero", fold_alpha) == products("rezero_channel", fold_alpha) == plain
    gated = products("rezero", lambda model: model)
    assert gated[0] > plain[0]
    assert gated[1] == plain[1]


@pytest.mark.parametrize("case", ["mlp", "encoder_layer"])
def test_folded_network_still_learns(case):
    make, inputs = CASES[case]
    graphdef, params, rest = nnx.split(fold_alpha(build(make)), nnx.Param, ...)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        model = nnx.merge(graphdef, params, rest, copy=True)
        return jnp.square(model(inputs) - 1.0).mean()

    value, grads = loss(params)
    grads = jax.tree.map(np.asarray, grads)
    assert all(np.any(g != 0) for g in jax.tree.leaves(grads))
    norm = np.sqrt(sum(np.vdot(g, g) for g in jax.tree.leaves(grads)))
    moved = jax.tree.map(lambda p, g: np.asarray(p) - 0.01 * g / norm, params, grads)
    assert loss(moved)[0] < value


class Unfolded(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.rules = nnx.List([make_rule("rezero", 8, rngs=rngs)])


class Bare(nnx.Module):
    def __init__(self, rngs):
        self.gate = Alpha(jnp.zeros(()))


class Sub(nnx.Linear):
    def __call__(self, x):
        return nnx.relu(super().__call__(x))


class Tied(nnx.Module):
    """One linear layer in two branches, or in a branch and outside."""

    def __init__(self, rngs, gates):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        if gates == 2:
            self.a, self.b = ReZero(self.linear), ReZero(self.linear)
            del self.linear
        else:
            self.a = ReZero(self.linear)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda r: MLP(8, 6, 2, 3, "gated", rngs=r), "`gated` scales the trunk.*use the model as"),
        (lambda r: ResNet.cifar(14, "gated", width=2, rngs=r), "`gated` scales the trunk"),
        (lambda r: ResNet.preact(18, "gated", width=2, rngs=r), "`gated` scales the trunk"),
        (lambda r: Encoder(8, 2, 2, residual="gated", rngs=r), "`gated` scales the trunk"),
        (lambda r: ReZero(jnp.tanh), "ends in a .* are unknown.*register its class with"),
        (lambda r: ReZero(lambda x: x), "ends in a function are unknown"),
        (lambda r: ReZero(Sub(8, 8, rngs=r)), "ends in a Sub are unknown"),
        (lambda r: ReZero(nnx.Embed(8, 8, rngs=r)), "ends in a Embed are unknown"),
        (
            lambda r: ReZero(nnx.Sequential(nnx.Linear(8, 8, rngs=r), Sub(8, 8, rngs=r))),
            "ends in a Sub are unknown",
        ),
        (lambda r: nnx.List([Unfolded(r)]), r"gate 0\.rules\.0\.alpha .* class Unfolded with"),
        (lambda r: Stack(Unfolded, 2, rngs=r), r"blocks\.rules\.0\.alpha .* class Unfolded with"),
        (Bare, "the gate gate cannot be folded; register the class Bare with"),
        (lambda r: make_rule("rezero", 8, rngs=nnx.Rngs(0)), "the gate alpha cannot be folded"),
        (lambda r: Tied(r, 2), "last weights of a ReZero are also used elsewhere"),
        (lambda r: Tied(r, 1), "last weights of a ReZero are also used elsewhere"),
    ],
)
def test_gates_that_cannot_be_folded_are_user_errors(make, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        fold_alpha(build(make))
    assert "\n" not in str(error.value)
