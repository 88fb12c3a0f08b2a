"""A run that ends with the first epoch whose training loss is low enough, interrupted or not."""

import signal

import pytest

from rezero_jax.runs.folder import saved_steps
from rezero_jax.runs.reader import Run
from rezero_jax.training import loop
from tests.families import config as load_config
from tests.faults.compare import differences, final
from tests.test_processes import end, start

EPOCH = 3  # with which the runs here end, of 6
FIELDS = {
    "train.epochs": 6,
    "train.steps_per_dispatch": 7,  # does not divide an epoch
    "eval.every_epochs": 4.0,
    "checkpoint.every_steps": 40,
    "checkpoint.keep": 1,
    "log.every_steps": 3,
    "mesh.data": 1,
}


def config(until):
    return load_config("mlp.py:smoke", **FIELDS, **{"train.until_loss": float(until)})


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """The epochs' losses of a run of 6 epochs without a limit."""
    folder = tmp_path_factory.mktemp("unlimited")
    assert "reached_until_loss" not in loop.train(load_config("mlp.py:smoke", **FIELDS), folder)
    losses = Run.read(folder).epoch_losses()
    assert len(losses) == 6
    assert (losses[: EPOCH - 1] > losses[EPOCH - 1]).all()
    return losses


@pytest.fixture(scope="module")
def straight(losses, tmp_path_factory):
    """A run that ends with epoch 3, by its loss, and that nothing stopped: folder, dispatches."""
    folder, asked = tmp_path_factory.mktemp("straight"), []
    loop.train(config(losses[EPOCH - 1]), folder, stop=lambda: asked.append(None) or 0)
    return folder, len(asked)


def test_it_ends_with_the_first_epoch_at_or_below_the_loss(straight, losses, tmp_path, capsys):
    folder, _ = straight
    run, told = Run.read(folder), final(folder)
    assert run.epoch_losses().tolist() == losses[:EPOCH].tolist()
    steps = run.series("train/epoch_loss")[0][-1]
    assert told["steps"] == steps == saved_steps(folder)[-1]
    assert (told["status"], told["reached_until_loss"]) == ("finished", True)
    # The end has an evaluation, though none was due.
    assert run.lines[-1]["eval/loss"] == told["eval/loss"]

    assert loop.train(config(losses[EPOCH - 1]), folder)["steps"] == steps
    assert "nothing to do" in capsys.readouterr().out

    told = loop.train(config(losses.min() / 2), tmp_path)  # which no epoch reaches
    assert Run.read(tmp_path).epoch_losses().tolist() == losses.tolist()
    assert not told["reached_until_loss"]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_an_interrupted_one_ends_with_the_same_epoch(share, straight, losses, tmp_path):
    folder, dispatches = straight
    limited, asked = config(losses[EPOCH - 1]), []

    def stop():
        asked.append(None)
        return signal.SIGTERM if len(asked) > share * (dispatches - 3) else 0

    with pytest.raises(loop.Interrupted):
        loop.train(limited, tmp_path, stop=stop)
    assert saved_steps(tmp_path)[-1] < saved_steps(folder)[-1]
    loop.train(limited, tmp_path)
    assert differences(tmp_path, folder) == []
    (tmp_path / "final.json").unlink()  # as if killed after its last save
    loop.train(limited, tmp_path)
    assert differences(tmp_path, folder) == []


@pytest.mark.slow
def test_several_processes_end_together(tmp_path):
    limits = {"train.steps": None, "train.epochs": 30, "train.until_loss": 2.0}
    for status, _, err in end(start(2, tmp_path, **limits)):
        assert status == 0, err
    losses = Run.read(tmp_path).epoch_losses()
    assert len(losses) < 30
    assert (losses[:-1] > 2.0).all()
    assert losses[-1] <= 2.0
