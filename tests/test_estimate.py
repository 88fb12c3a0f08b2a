"""Optimised HLO is read correctly: small programs by hand, and one of the TPU's compiler."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from rehearsal.estimate import CHIPS, accounts, chip_of, estimate, group_size
from rehearsal.program import Traffic, parse, shape_bytes, trip_count
from rehearsal.topologies import devices_of
from rezero_jax.errors import UserError

HLO = Path(__file__).parent / "reference" / "hlo"
# A dispatch: 5 cycles outside; each update 7, two layers of 11, and the costlier branch, 30.
LOOPS = (HLO / "loops.txt").read_text()


def test_loops_count_by_their_trip_counts_and_branches_by_the_costliest():
    update, dispatch = accounts(LOOPS)
    assert +update.cycles == {"mul": 7, "add": 2 * 11, "tanh": 30}
    assert dispatch.cycles.total() == 5
    (one,) = update.collectives
    assert (one.kind, one.size, one.trips) == ("all-reduce", 4 * 8 * 4, 2)
    assert group_size(one.groups) == 4
    # Without a loop of unknown trip count, the program is the update.
    update, dispatch = accounts(LOOPS.replace("get-tuple-element(%q), index=2", "constant(3)"))
    assert update.cycles.total() == 5 + 3 * (7 + 2 * 11 + 30)
    assert dispatch.cycles.total() == 0
    computations, _ = parse(LOOPS)
    loop = next(one for one in computations["outer_body"] if one.opcode == "while")
    assert trip_count(loop, computations) == 2
    known = loop._replace(rest=loop.rest + ', backend_config={"known_trip_count":{"n":"9"}}')
    assert trip_count(known, computations) == 9  # the compiler's own


def test_sizes_of_shapes_and_groups():
    for shape, size in {
        "f32[4,8]{1,0:T(8,128)}": 128,
        "(bf16[3]{0}, /*index=1*/u8[5,2], pred[])": 6 + 10 + 1,
        "s4[7]{0}": 4,
        "f8e4m3fn[10]": 10,
        "token[]": 0,
    }.items():
        assert shape_bytes(shape) == size, shape
    for groups, size in {
        "mesh['axis_0'=4,'axis_1'=2] {'axis_0'}": 4,
        "mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}": 8,
        "[2,4]<=[8]": 4,
        "{{0,1,2},{3,4,5}}": 3,
        "{1,2}x{0:7}": 2,
        "{1:4}x{0:255}": 4,
        "": None,
    }.items():
        assert group_size(groups) == size, groups


def test_slices_and_fast_memory_are_cheap():
    computations, entry = parse((HLO / "traffic.txt").read_text())
    found = {one.name: Traffic(computations).of(one, entry) for one in computations[entry]}
    assert found["layer"] == 400 + 400 + 4  # one row of a, read and written; the index
    assert found["sum"] == 4000 + 0 + 4000  # b is in fast memory
    assert found["out"] == 400 + 400 + 4  # the row read, and written in place
    assert found["a"] == 0


def test_convolutions_of_a_gpu_are_counted():
    """A GPU's compiler calls cuDNN, which chooses kernels on the device alone."""
    call = (
        'custom-call(%x, %k), dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"'
    )
    update, _ = accounts(
        "ENTRY %main (x: f32[2,8,8,4], k: f32[16,3,3,4]) -> (f32[2,8,8,16], u8[0]) {\n"
        "  %x = f32[2,8,8,4]{3,2,1,0} parameter(0)\n  %k = f32[16,3,3,4]{3,2,1,0} parameter(1)\n"
        f"  ROOT %cudnn-conv.1 = (f32[2,8,8,16]{{3,2,1,0}}, u8[0]{{0}}) {call}\n}}\n"
    )
    assert (update.convolutions, update.launches) == (1, 1)
    assert update.bytes.total() == 4 * (2 * 8 * 8 * 4 + 16 * 9 * 4 + 2 * 8 * 8 * 16)


def test_transfers_between_slices_are_collectives():
    (one,) = accounts((HLO / "slices.txt").read_text())[0].collectives
    assert (one.kind, one.size, one.trips) == ("all-reduce between slices", 8 * 128 * 4, 1)
    assert group_size(one.groups) == 2


def test_what_the_tpu_compiler_wrote():
    """Six layers x = tanh(x w) of width 2048 on 4 x 1024 rows, forward and backward, on v5e:2x2."""
    hlo = (HLO / "dispatch.txt").read_text()
    update, dispatch = accounts(hlo)
    assert update.cycles.total() / CHIPS["v5e"].hertz == pytest.approx(2.82e-3, rel=1e-3)
    assert dispatch.cycles.total() / CHIPS["v5e"].hertz == pytest.approx(0.309e-3, rel=1e-2)
    # Every estimate counts at least once, and the estimates of the layers count 6 times.
    once = sum(map(int, re.findall(r'estimated_cycles":"(\d+)"', hlo)))
    assert once < update.cycles.total() + dispatch.cycles.total() < 6 * once
    (reduction,) = set(update.collectives)
    assert (reduction.kind, reduction.size, reduction.trips) == ("all-reduce", 4 * 2048**2, 6)
    assert group_size(reduction.groups) == 4
    # At least the gradient and the weights pass through the memory, and less than the memory can
    # move in the estimated time.
    assert 3 * 6 * 4 * 2048**2 < update.bytes.total() < 2.82e-3 * CHIPS["v5e"].bandwidth


def test_a_program_of_this_machine():
    compiled = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((64, 64), "float32")).compile()
    found = estimate(compiled)
    assert found.memory >= 2 * 4 * 64 * 64
    # On a GPU, a launch and the bytes, or the FLOPs if they take longer.
    assert found.update.launches == 1
    assert found.update.bytes.total() == 2 * 4 * 64**2
    h200 = CHIPS["h200"]
    assert found.update.seconds(h200) == pytest.approx(2.1e-6 + 2 * 4 * 64**2 / (0.9 * 4.8e12))
    assert found.update.gpu_parts(h200, 989e12)["FLOPs"] == pytest.approx(1 / 0.8)
    # The longest fitting kind is the chip.
    kinds = {"TPU v5 lite": CHIPS["v5e"], "TPU v5p": CHIPS["v5p"], "cpu": None}
    for kind, chip in kinds.items():
        assert chip_of(SimpleNamespace(device_kind=kind)) == chip


def test_unknown_topologies_and_missing_compilers_are_user_errors(monkeypatch):
    for name in ("v5e", "v5e:8", "9xh100", "0xh100", "h100", "v5e:2x4x1x1", "x"):
        with pytest.raises(UserError, match="topology"):
            devices_of(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape(f'pip install "jax[tpu]=={jax.__version__}"')):
        devices_of("v5e:2x4")
