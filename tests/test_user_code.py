"""Rules, models and objectives of users: found by name, checked, and imported only if allowed."""

import importlib
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from flax import nnx

import rezero_jax
import sample
from rezero_jax import export
from rezero_jax.analysis.__main__ import main as analyse
from rezero_jax.config import load_config
from rezero_jax.models.build import rule_named
from rezero_jax.residual.rules import ReZeroRule
from rezero_jax.runs.metrics import read_metrics
from rezero_jax.training import loop
from rezero_jax.training.load import load_language_model, load_model
from rezero_jax.training.trainer import Trainer
from tests.families import FAMILIES, ROOT, TINY, refused

EXAMPLES = ROOT / "docs/examples"
SMALL = {"model.depth": 3, "model.width": 8, "train.steps": 4} | {"train.steps_per_dispatch": 2}


class SameRule(ReZeroRule):
    """A user's copy of the package's rule."""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module own.py, which a config of this process finds, and forgets the one before."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)

    def write(text):
        (tmp_path / "own.py").write_text(text)
        sys.modules.pop("own", None)
        importlib.invalidate_caches()

    yield write
    sys.modules.pop("own", None)
    sys.modules.pop("mine", None)


def example(**fields):
    """The config of the documentation's example."""
    overrides = [f"{key}={value}" for key, value in (SMALL | fields).items()]
    return load_config(str(EXAMPLES / "mine.py"), overrides)


def test_the_example_trains_resumes_and_is_found_again_only_where_it_is_allowed(
    module, tmp_path, capsys
):
    run, out = str(tmp_path / "run"), str(tmp_path / "model")
    loop.train(example(), run)
    assert "alpha/2" in (tmp_path / "run/metrics.jsonl").read_text()
    forbidden = "if you trust it, allow it by --allow="
    del sys.modules["mine"]
    for command in (export.main, analyse):
        assert command([run, f"--out={tmp_path}/out.png"]) == 2
        assert forbidden in capsys.readouterr().err
    refused(lambda: load_model(run), forbidden)
    refused(lambda: load_model(run, allow=["min", "mine.more"]), forbidden)
    assert "mine" not in sys.modules  # a refusal imports nothing
    assert export.main([run, f"--out={out}", "--allow=mine"]) == 0
    card = (tmp_path / "model/README.md").read_text()
    assert "allow=[" in card
    assert analyse([run, f"--out={tmp_path}/out.png", "--allow=mine"]) == 0
    del sys.modules["mine"]
    refused(lambda: rezero_jax.load(out), forbidden)
    refused(lambda: rezero_jax.load(out, allow="mine"), "give a tuple of names")
    assert "mine" not in sys.modules
    model, x = rezero_jax.load(out, allow=("mine",)), np.ones((2, 8, 8, 1), np.float32)
    expected = load_model(run, allow=("mine",))[0]
    np.testing.assert_array_equal(model(x), expected(x))
    assert type(model).__name__ == "Net"


def test_sections_of_a_strangers_config_that_are_none_import_nothing(trained, tmp_path):
    export.export(str(trained("mlp")), str(tmp_path / "model"))
    path = tmp_path / "model/config.json"
    good = json.loads(path.read_text())
    for bad in ([], "own:Rule", None, {}, {"name": ["own:make"]}, {"name": {"a": "own:make"}}):
        path.write_text(json.dumps(good | {"model": bad}))
        refused(lambda: rezero_jax.load(tmp_path / "model"))
    path.write_text(json.dumps(good | {"model": good["model"] | {"residual": "os:system"}}))
    refused(lambda: rezero_jax.load(tmp_path / "model"), "the module 'os' would be imported")
    refused(lambda: rezero_jax.load(tmp_path / "model", allow=["os"]), "is no subclass of")


def test_a_sample_of_a_run_with_ones_own_rule(trained, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(trained("transformer"), tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"]["residual"] = f"{__name__}:SameRule"
    (run / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(sys, "path", list(sys.path))
    words = [f"--workdir={run}", "--bytes=2"]
    assert sample.main(words) == 2
    assert "--allow=tests.test_user_code" in capsys.readouterr().err
    assert sample.main([*words, "--allow=tests.test_user_code"]) == 0
    model = load_language_model(run, allow=["tests"])[0]
    assert type(model.trunk.layers.layers()[0].rules[0]) is SameRule


@pytest.mark.parametrize("family", ["mlp", "resnet", "transformer"])  # a ViT has the last one's
def test_a_rule_of_ones_own_joins_the_branches_of_every_family(family):
    x = FAMILIES[family].example(2)
    options = {"scan": True, "alpha_init": 0.5}
    ours, theirs = (
        jax.jit(lambda x, r=rule: FAMILIES[family].make(r, rngs=nnx.Rngs(0), **options)(x))(x)
        for rule in (SameRule, "rezero")
    )
    np.testing.assert_array_equal(ours, theirs)


HEAD = """\
import jax.numpy as jnp
from flax import nnx
from rezero_jax.residual import Rule
"""
MODEL = (
    HEAD
    + """
class make(nnx.Module):
    def __init__(self, example_shape, num_classes, *, {more}rngs):
        self.linear = nnx.Linear(64, {size}, rngs=rngs)
    def __call__(self, x):
        return self.linear(x.reshape(len(x), -1))
"""
)
OBJECTIVE = "def fn(model, batch, key):\n    loss = batch['image'][:, 0]\n    return "


def own_model(more="", size="num_classes"):
    return MODEL.format(more=more, size=size)


RULE = HEAD + "class Mine(Rule):\n    "


@pytest.mark.parametrize(
    ("field", "name", "text", "words"),
    [
        ("model.residual", "own:Rule", None, ("no module own", "PYTHONPATH")),
        ("model.residual", "own.sub:Rule", "", ("no module own.sub",)),
        ("model.residual", "own:", "", ("module:name",)),
        ("model.residual", "own:a.b", "", ("module:name",)),
        ("model.residual", "own:Rul", HEAD, ("own.py has no Rul;",)),
        ("model.residual", "own:fn", OBJECTIVE + "0", ("subclass of", "Rule")),
        (
            "model.residual",
            "own:Mine",
            RULE + "def __init__(self, features): pass\n",
            ("(config, features, place, rngs)",),
        ),
        (
            "model.residual",
            "own:Mine",
            RULE + "def __call__(self, x): return x\n",
            ("(self, x, f)",),
        ),
        (
            "model.residual",
            "own:Mine",
            RULE + "def __call__(self, x, f): return f(x)[:, :1]\n",
            ("shape", "float32(3, 8) to float32(3, 1)"),
        ),
        (
            "model.residual",
            "own:Mine",
            RULE + "def __call__(self, x, f): return x.astype('bfloat16')\n",
            ("dtype", "to bfloat16"),
        ),
        ("model.name", "own:x", "x = 3\n", ("int", "a function or a class")),
        ("model.name", "own:make", "def make(width, rngs): pass\n", ("(example_shape=...,",)),
        ("model.name", "own:make", own_model(more="heads, "), ("argument: 'heads'",)),
        ("model.name", "own:make", "def make(**all): return 3\n", ("int", "nnx.Module")),
        ("model.name", "own:make", own_model(size=7), ("float32[3,7]", "logits of shape (3, 10)")),
        (
            "model.name",
            "own:make",
            own_model().replace("self.l", "self.drop = nnx.Dropout(0.1, rngs=rngs); self.l", 1),
            ("drop.rngs", "without rngs="),
        ),
        ("train.objective", "own:fn", "def fn(model, batch): pass\n", ("(model, batch, key)",)),
        ("train.objective", "own:fn", OBJECTIVE + "loss", ('"loss"',)),
        ("train.objective", "own:fn", OBJECTIVE + "{'loss': loss.mean()}", ("(3,)", "loss=")),
        ("train.objective", "own:fn", OBJECTIVE + "{'loss': loss, 'stop': loss}", ("'stop'",)),
    ],
)
def test_each_mistake_is_a_sentence(field, name, text, words, module, unchecked):
    if text is not None:
        module(text)
    refused(lambda: Trainer(small(**{field: name})), *words)


def test_a_model_without_a_name_and_a_class_in_place_of_a_name():
    for model, words in (
        ({}, 'unknown model "None"; choose one of mlp,'),
        ({"name": Trainer}, "unknown model"),
        (small().model.to_dict() | {"residual": SameRule}, f"name it '{__name__}:SameRule'"),
    ):
        config = small()
        with config.unlocked():
            config.model = model
        refused(lambda config=config: Trainer(config), words)


def small(**fields):
    """The config of a tiny MLP, or of a model whose only fields are the data's."""
    config = FAMILIES["mlp"].load_config(**{"model.depth": 2} | fields)
    if ":" in config.model.name:
        with config.unlocked():
            config.model = {"name": config.model.name}
    return config


@pytest.mark.parametrize(
    ("field", "name", "text", "error"),
    [
        ("model.residual", "own:Rule", "import missing_one\n", ModuleNotFoundError),
        ("model.name", "own:make", "def make(**all): return {}['a']\n", KeyError),
        ("train.objective", "own:fn", "def fn(*_): raise OSError('mine')\n", OSError),
    ],
)
def test_an_error_of_the_users_code_passes_as_it_is(field, name, text, error, module, tmp_path):
    module(text)
    with pytest.raises(error):
        loop.train(small(**{field: name}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_language_model_and_its_metrics_of_ones_own(module, tmp_path):
    """A metric's name may have any words in it."""
    module(
        HEAD + "from rezero_jax import Transformer\n"
        "def make(width, rngs):\n    return Transformer(256, width, 2, 2, 8, rngs=rngs)\n"
        "def fn(model, batch, key):\n"
        "    loss = model.losses(batch['tokens'], batch['targets']).mean(axis=1)\n"
        "    return {'loss': loss, 'error_rate': loss / 8, 'normal': 2 * loss}\n"
    )
    config = FAMILIES["transformer"].load_config(**{"train.objective": "own:fn"})
    with config.unlocked():
        config.model = {"name": "own:make", "width": 8}
    final = loop.train(config, tmp_path / "run")
    assert final["eval/error_rate"] == pytest.approx(final["eval/loss"] / 8)
    for line in read_metrics(tmp_path / "run"):
        assert line["train/normal"] == pytest.approx(2 * line["train/loss"])
    assert load_language_model(tmp_path / "run", allow=["own"])[1] == TINY["train.steps"]


def test_configs_that_ask_for_properties_of_a_rule_take_ones_own(module):
    module(HEAD + "class Mine(Rule):\n    norms_branch = True\n")
    spec = f"{ROOT}/configs/transformer_small.py:residual=own:Mine"
    assert load_config(spec).model.final_norm
    assert rule_named("pre_norm").norms_branch
