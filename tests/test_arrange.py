"""The places of devices in the mesh: on a torus, in slices, and where processes interleave."""

import dataclasses
import importlib.util
import random
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from rezero_jax.errors import UserError
from rezero_jax.models.dropout import random_bits
from rezero_jax.training.arrange import arrange
from tests.test_processes import alone, assert_same_curve, end, start

pytestmark = pytest.mark.usefixtures("unchecked")  # stand-ins for devices

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Device:
    """What `arrange` asks of a device."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0


def slices(count, side=4, **fields):
    """`count` slices of side x side chips, four of them, 2 x 2, in each process."""
    devices = []
    for index, x, y in product(range(count), range(side), range(side)):
        host = (index * side + y // 2 * 2) * side // 4 + x // 2
        number = (index * side + y) * side + x
        devices.append(Device(number, host, index, (x, y, 0), **fields))
    random.Random(0).shuffle(devices)
    return devices


def test_a_cpu_keeps_its_order():
    devices = jax.devices()
    mesh = arrange(devices[::-1], 2, 3)
    assert mesh.axis_names == ("data", "model")
    assert mesh.devices.tolist() == [devices[:3], devices[3:6]]


def test_what_shares_a_matrix_lies_in_a_line_of_the_torus():
    mesh = arrange(slices(1), 4, 4)
    for line in mesh.devices:
        xs, ys = ({device.coords[axis] for device in line} for axis in (0, 1))
        assert sorted(map(len, (xs, ys))) == [1, 4]
    # Sorted by process they lie in squares.
    assert len({device.process_index for device in mesh.devices[0]}) == 2


@pytest.mark.parametrize(("data", "model"), [(32, 1), (16, 2), (8, 4)])
def test_slices_have_an_axis_of_their_own(data, model):
    mesh = arrange(slices(2), data, model)
    assert mesh.axis_names == ("replica", "data", "model")
    assert mesh.devices.shape == (2, data // 2, model)
    for index, of_one in enumerate(mesh.devices):
        assert {device.slice_index for device in of_one.flat} == {index}
    assert len(set(mesh.devices.flat)) == 32


def test_nodes_of_gpus_are_slices():
    devices = slices(2, platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    mesh = arrange(devices, 16, 2)
    assert mesh.axis_names == ("replica", "data", "model")
    ids = [device.id for device in mesh.devices.flat]
    assert ids == sorted(ids)


def test_chips_that_pose_as_two_devices_keep_their_order():
    devices = [dataclasses.replace(device, core_on_chip=1) for device in slices(1)]
    mesh = arrange([dataclasses.replace(d, device_kind="TPU v4") for d in devices], 16, 1)
    assert len(set(mesh.devices.flat)) == 16


@pytest.mark.parametrize(
    ("data", "spare", "axes", "shape"),
    [
        (8, 4, ("replica", "spare", "data", "model"), (2, 4, 4, 1)),
        (1, 32, ("spare", "data", "model"), (32, 1, 1)),  # each slice repeats the other's work
    ],
)
def test_devices_that_repeat_the_work_of_others_lie_beside_them(data, spare, axes, shape):
    mesh = arrange(slices(2), data, 1, spare)
    assert (mesh.axis_names, mesh.devices.shape) == (axes, shape)
    for index, half in enumerate(mesh.devices.reshape(2, 16)):
        assert {device.slice_index for device in half} == {index}


@pytest.mark.parametrize(("data", "model"), [(1, 32), (3, 6), (10, 2)])
def test_a_mesh_that_does_not_divide_among_slices_is_told(data, model):
    with pytest.raises(UserError, match=f"mesh.data={data} and .* do not divide among 2 slices"):
        arrange(slices(2), data, model)


def test_each_slice_drops_out_its_own():
    devices = np.reshape(jax.devices()[:4], (2, 2, 1))
    mesh = Mesh(devices, ("replica", "data", "model"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        draw = jax.jit(lambda key: random_bits(key, (8, 64)))
        bits = draw(jax.random.key(0, impl="rbg"))
    assert bits.sharding.spec == PartitionSpec(("replica", "data"))
    assert len(np.unique(bits, axis=0)) == 8


INTERLEAVED = """\
import runpy, sys
import numpy as np
from jax.sharding import AxisType, Mesh
from rezero_jax.training import sharding

def arrange(devices, data, model, spare):
    mixed = sorted(devices, key=lambda device: (device.id % 2, device.process_index))
    assert [device.process_index for device in mixed] == [0, 1, 0, 1]
    axes = ("replica", "data", "model")
    return Mesh(np.reshape(mixed, (2, 2, 1)), axes, axis_types=(AxisType.Auto,) * 3)

sharding.arrange = arrange
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("fully_sharded", [False, True])
def test_processes_whose_rows_lie_apart_train_as_one(fully_sharded, tmp_path):
    common = {
        "train.steps": 20,
        "log.every_steps": 1,
        "optim.name": "sgd",
        "optim.learning_rate": 0.02,
        "mesh.fully_sharded": fully_sharded,
    }
    alone(tmp_path / "one", 4, **common)
    processes = start(2, tmp_path / "two", ("-c", INTERLEAVED), **common | {"mesh.cpu_devices": 2})
    for status, _, err in end(processes):
        assert status == 0, err
    assert_same_curve(tmp_path / "one", tmp_path / "two")


# ---- With the compiler of TPUs, where it is installed


TWO_SLICES = """\
import jax
jax.config.update("jax_platforms", "cpu")
from rezero_jax.config import load_config
from rezero_jax.data import stand_in
from rehearsal.plan import compile_dispatch
from rehearsal.topologies import devices_of
from rezero_jax.training.trainer import Trainer
fields = ("mesh.fully_sharded=True", "train.batch_size=64", "train.steps_per_dispatch=1")
config = load_config("configs/mlp.py:dataset=cifar10,depth=4,width=512", fields)
trainer = Trainer(config, stand_in(config.data), devices_of("2xv5e:2x4"))
print(dict(trainer.mesh.shape), compile_dispatch(trainer).as_text())
"""


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="no compiler of TPUs: libtpu")
def test_full_sharding_fetches_weights_within_a_slice():
    result = subprocess.run(
        [sys.executable, "-c", TWO_SLICES], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "'replica': 2, 'data': 8, 'model': 1" in result.stdout
    assert " all-gather(" in result.stdout
    # What crosses from slice to slice, by the compiler's own account: the gradients' sums alone.
    crossing = re.findall(r'_xla_megascale_transfer_type="(\w+)"', result.stdout)
    assert set(crossing) == {"ALL_REDUCE"}
