"""Optimised HLO is read correctly: small programs by hand, and one of the TPU's compiler."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from rehearsal.chips import CHIPS, chip_of
from rehearsal.estimate import accounts, estimate, group_size
from rehearsal.plan import WIDTH, render
from rehearsal.program import Traffic, parse, shape_bytes, trip_count
from rehearsal.topologies import devices_of
from rezero_jax.errors import UserError


def cycles(count: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{count}"}}}}'


# A dispatch: 5 cycles outside; each update 7, two layers of 11, and the costlier branch, 30.
BY_HAND = f"""HloModule dispatch

%inner_condition (p: (s32[], f32[4,8])) -> pred[] {{
  %limit = s32[] constant(2)
  %p = (s32[], f32[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}}

%inner_body (p.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {{
  %p.1 = (s32[], f32[4,8]) parameter(0)
  %x = f32[4,8] get-tuple-element(%p.1), index=1
  %sum = f32[4,8] all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
  %y = f32[4,8] add(%sum, %sum), metadata={{op_name="jit(f)/while/body/add"}}, {cycles(11)}
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %t = (s32[], f32[4,8]) tuple(%i.1, %y)
}}

%cheap (a: f32[4,8]) -> f32[4,8] {{
  ROOT %a.1 = f32[4,8] negate(%a), {cycles(3)}
}}

%costly (b: f32[4,8]) -> f32[4,8] {{
  ROOT %b.1 = f32[4,8] tanh(%b), {cycles(30)}
}}

%outer_condition (q: (s32[], f32[4,8], s32[])) -> pred[] {{
  %q = (s32[], f32[4,8], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %count = s32[] get-tuple-element(%q), index=2
  ROOT %less.1 = pred[] compare(%j, %count), direction=LT
}}

%outer_body (q.1: (s32[], f32[4,8], s32[])) -> (s32[], f32[4,8], s32[]) {{
  %q.1 = (s32[], f32[4,8], s32[]) parameter(0)
  %z = f32[4,8] get-tuple-element(%q.1), index=1
  %u = f32[4,8] multiply(%z, %z), metadata={{op_name="jit(f)/while/body/mul"}}, {cycles(7)}
  %start = (s32[], f32[4,8]) tuple(%z, %u)
  %layers = (s32[], f32[4,8]) while(%start), condition=%inner_condition, body=%inner_body
  %v = f32[4,8] get-tuple-element(%layers), index=1
  %w = f32[4,8] conditional(%z, %v, %v), branch_computations={{%cheap, %costly}}
  %j.1 = s32[] get-tuple-element(%q.1), index=0
  %count.1 = s32[] get-tuple-element(%q.1), index=2
  ROOT %t.1 = (s32[], f32[4,8], s32[]) tuple(%j.1, %w, %count.1)
}}

ENTRY %main (x.1: f32[4,8], n: s32[]) -> f32[4,8] {{
  %x.1 = f32[4,8] parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %twice = f32[4,8] add(%x.1, %x.1), {cycles(5)}
  %start.1 = (s32[], f32[4,8], s32[]) tuple(%zero, %twice, %n)
  %updates = (s32[], f32[4,8], s32[]) while(%start.1), condition=%outer_condition, body=%outer_body
  ROOT %result = f32[4,8] get-tuple-element(%updates), index=1
}}
"""


def test_loops_count_by_their_trip_counts_and_branches_by_the_costliest():
    update, dispatch = accounts(BY_HAND)
    assert +update.cycles == {"mul": 7, "add": 2 * 11, "tanh": 30}
    assert dispatch.cycles.total() == 5
    (one,) = update.collectives
    assert (one.kind, one.size, one.trips) == ("all-reduce", 4 * 8 * 4, 2)
    assert group_size(one.groups) == 4


def test_without_a_loop_of_unknown_trip_count_the_program_is_the_update():
    entry = BY_HAND.replace("get-tuple-element(%q), index=2", "constant(3)")
    update, dispatch = accounts(entry)
    assert update.cycles.total() == 5 + 3 * (7 + 2 * 11 + 30)
    assert dispatch.cycles.total() == 0


def test_the_compilers_own_trip_count_wins():
    computations, _ = parse(BY_HAND)
    loop = next(one for one in computations["outer_body"] if one.opcode == "while")
    assert trip_count(loop, computations) == 2
    known = loop._replace(rest=loop.rest + ', backend_config={"known_trip_count":{"n":"9"}}')
    assert trip_count(known, computations) == 9


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


TRAFFIC = """
%sliced (p0: f32[10,100], p1: s32[]) -> f32[1,100] {
  %p0 = f32[10,100] parameter(0)
  %p1 = s32[] parameter(1)
  %view = f32[10,100] bitcast(%p0)
  ROOT %slice = f32[1,100] dynamic-slice(%view, %p1), dynamic_slice_sizes={1,100}
}

%updated (s0: f32[10,100], s1: f32[1,100], s2: s32[]) -> f32[10,100] {
  %s0 = f32[10,100] parameter(0)
  %s1 = f32[1,100] parameter(1)
  %s2 = s32[] parameter(2)
  ROOT %update = f32[10,100] dynamic-update-slice(%s0, %s1, %s2)
}

ENTRY %main (a: f32[10,100], b: f32[10,100]{1,0:S(1)}, i: s32[]) -> f32[10,100] {
  %a = f32[10,100]{1,0:T(8,128)} parameter(0)
  %b = f32[10,100]{1,0:T(8,128)S(1)} parameter(1)
  %i = s32[] parameter(2)
  %layer = f32[1,100]{1,0} fusion(%a, %i), kind=kLoop, calls=%sliced
  %sum = f32[10,100]{1,0} add(%a, %b)
  ROOT %out = f32[10,100]{1,0} fusion(%a, %layer, %i), kind=kLoop, calls=%updated
}
"""


def test_slices_and_fast_memory_are_cheap():
    computations, entry = parse(TRAFFIC)
    found = {one.name: Traffic(computations).of(one, entry) for one in computations[entry]}
    assert found["layer"] == 400 + 400 + 4  # one row of a, read and written; the index
    assert found["sum"] == 4000 + 0 + 4000  # b is in fast memory
    assert found["out"] == 400 + 400 + 4  # the row read, and written in place
    assert found["a"] == 0


BETWEEN_SLICES = """
ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %token = token[] after-all()
  %send = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) send(%a, %token), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_megascale_reduce_operation="SUM",\
_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %recv = (f32[8,128]{1,0:T(8,128)}, u32[], token[]) recv(%send), channel_id=3, \
is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",\
_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""


def test_transfers_between_slices_are_collectives():
    (one,) = accounts(BETWEEN_SLICES)[0].collectives
    assert (one.kind, one.size, one.trips) == ("all-reduce between slices", 8 * 128 * 4, 1)
    assert group_size(one.groups) == 2


def test_what_the_tpu_compiler_wrote():
    """Six layers x = tanh(x w) of width 2048 on 4 x 1024 rows, forward and backward, on v5e:2x2."""
    hlo = Path("tests/reference/hlo/dispatch.txt").read_text()
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
    assert 3 * 6 * 4 * 2048**2 < update.bytes < 2.82e-3 * CHIPS["v5e"].bandwidth


def test_a_program_of_this_machine():
    compiled = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((64, 64), "float32")).compile()
    found = estimate(compiled)
    assert found.memory >= 2 * 4 * 64 * 64
    assert found.update.seconds(CHIPS["h100"]) is None


def test_the_longest_fitting_kind_is_the_chip():
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


def test_a_plan_for_absent_chips_is_rendered():
    sizes = {"parameters": 4e9, "optimizer state": 8e9, "data": 1e6, "gradients, activations": 0}
    account = {
        "device": "TPU v5 lite",
        "mesh": {"data": 4, "model": 1},
        "fully_sharded": False,
        "parameters": 10**9,
        "updates": 1000,
        "updates_per_dispatch": 10,
        "batch_size": 64,
        "bytes": sizes | {"used": 12e9, "available": 16e9},
        "flops": 2e14,
        "compile_seconds": 3.0,
        "collectives": [{"kind": "all-reduce", "count": 2, "bytes": 4e9, "devices": 4}],
        "kernels": {"rng-bit-generator": 8},
        "bound_by_flops": 0.25,
        "bound_by_bytes": 0.1,
        "estimate": 0.5,
        "kernels_at_least": 0.01,
        "estimate_of_a_dispatch": 0.02,
        "operations": {"dot_general": 0.75},
    }
    rows = {line[:WIDTH].rstrip(): line[WIDTH:] for line in render(account).splitlines()}
    assert rows["devices"].startswith("4 x TPU v5 lite (data 4 x model 1")
    assert rows["bytes of a device"] == "12.0 GB of 16.0 GB"
    assert rows["an update"] == "500 ms by the compiler's estimate, 50.0% of the peak"
    assert rows["  dot_general"] == "75.0%"
    assert rows["the run"].startswith("0:08:22")  # 1,000 updates and 100 dispatches
    assert rows["all-reduce"] == "2 x 4.0 GB among 4 devices"
    assert rows["without estimate"] == "rng-bit-generator: at least 10 ms"
