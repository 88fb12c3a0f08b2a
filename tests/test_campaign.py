"""The campaign of kills and damages: what it compares, damages, aims at and calls lost."""

import json
import math
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from rezero_jax.runs.checkpoint import Checkpoints
from rezero_jax.runs.metrics import MetricsWriter
from tests.families import FAMILIES
from tests.faults import crafted, damage
from tests.faults.campaign import main
from tests.faults.compare import differences

CONFIG = FAMILIES["mlp"].load_config()
STEPS = (5, 10)


def write_run(folder, weight=0.25, loss=0.5, best=0.5, seconds=1.0, total=7.0):
    """Writes a finished run in miniature, as the loop would."""
    record = MetricsWriter(folder, 0)
    checkpoints = Checkpoints(folder / "checkpoints", CONFIG.checkpoint)
    for step in STEPS:
        record.write(step, {"train/loss": loss, "time/data": seconds})
        state = {
            "step": np.array(step, np.int32),
            "params": {"w": np.array([1.0, weight, step], np.float32), "b": np.zeros(4096)},
        }
        state = jax.tree.map(jnp.asarray, state)
        progress = {"epoch_loss": {"sum": total, "steps": step}, "seconds": seconds}
        checkpoints.save(step, state, progress, None)
    checkpoints.close()
    record.close()
    final = {"steps": STEPS[-1], "best/eval/loss": best, "seconds": seconds}
    (folder / "final.json").write_text(json.dumps(final))
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return write_run(epath.Path(tmp_path_factory.mktemp("one")))


@pytest.fixture
def tmp_path(tmp_path):
    """The campaign's paths may be in a bucket."""
    return epath.Path(tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seconds": 2.0}, []),  # a time
        ({"weight": float(np.nextafter(np.float32(0.25), 1))}, ["state params/w"]),
        ({"best": math.nextafter(0.5, 1)}, ["final.json"]),
        ({"total": math.nextafter(7.0, 1)}, ["saved progress"]),
        ({"loss": math.nextafter(0.5, 1)}, [f"metrics.jsonl, step {step}" for step in STEPS]),
    ],
)
def test_one_changed_bit_is_noticed(change, expected, one, tmp_path):
    assert differences(write_run(tmp_path, **change), one) == expected


def test_what_is_missing_is_noticed(one, tmp_path):
    shutil.copytree(one, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/5")
    (tmp_path / "run/metrics.jsonl").write_text("")
    for path in (tmp_path / "run/tensorboard").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    found = differences(tmp_path / "run", one)
    assert [text.split(" (")[0] for text in found] == [
        "metrics.jsonl",
        "tensorboard",
        "checkpoints kept",
    ]


# ---- Damages


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in damage.files(folder)}


@pytest.mark.parametrize("kind", damage.KINDS, ids=damage.name_of)
def test_a_damage_changes_the_files_that_it_names(kind, one, tmp_path):
    sound = contents(one / "checkpoints/10")
    for seed in range(2):
        folder = tmp_path / f"{seed}"
        shutil.copytree(one / "checkpoints", folder)
        said = kind(folder / "10", folder / "5", random.Random(seed))
        changed = contents(folder / "10")
        assert changed != sound
        for path in changed.keys() ^ sound.keys():
            assert path.name in said or any(p.name in said for p in path.parents)
        assert contents(folder / "5") == contents(one / "checkpoints/5")


@pytest.mark.campaign
@pytest.mark.slow
def test_a_small_campaign(tmp_path):
    assert main(["--kills=3", "--damages=3", f"--out={tmp_path / 'out'}"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert len(report["runs"]) >= 6
    assert report["failures"] == []


def test_crafted_inputs_are_read_or_refused_in_a_sentence(trained, tmp_path):
    counts, failures = crafted.campaign(trained("mlp"), Path(tmp_path), inputs=24, seed=0)
    assert failures == []
    assert sum(counts.values()) == 24
