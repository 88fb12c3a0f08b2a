"""The reckoning of docs/scaling.md, by hand and against compiled programs."""

import jax
import pytest

from benchmarks import scaling
from benchmarks.collectives import Collective
from benchmarks.networks import SMALL, SMALL_LAYOUTS, config_of, layouts, work
from benchmarks.roofline import MACHINES, Axis, Machine, Step, seconds, sent, step
from benchmarks.work import Layout, Work

pytestmark = pytest.mark.usefixtures("quick_compilation")

V5E, V5P, H100 = MACHINES
# 80 bytes a second over a link, as 0.8 of its rate is used; a second a hop.
TORUS = Machine("torus", "v5e", ((2, 4),), memory_rate=1.0, link=100.0, hop=1.0, full_torus=4)
SWITCH = Machine("switch", "h100", ((8,),), 1.0, link=100.0, hop=1.0, launch=5.0, switch=True)
ROW, RING, PAIR = Axis(4, False), Axis(4, True), Axis(2, False)


def collective(kind, size):
    return Collective("", kind, size, 1, "data", may_hide=True)


@pytest.mark.parametrize(
    ("kind", "count", "expected"),
    [
        ("all-reduce", 8, 2 * 7 * 100),
        ("all-gather", 8, 7 * 100),
        ("reduce-scatter", 4, 3 * 200),
        ("all-reduce", 1, 0),
    ],
)
def test_bytes_in_a_ring(kind, count, expected):
    assert sent(collective(kind, 800), count) == expected


@pytest.mark.parametrize(
    ("machine", "group", "kind", "expected"),
    [
        # 3/4 of 320 bytes over one link, in three hops; over the two of a ring, in two.
        (TORUS, [ROW], "all-gather", 240 / 80 + 3),
        (TORUS, [RING], "all-gather", 240 / 160 + 2),
        (TORUS, [RING], "all-reduce", 2 * (240 / 160 + 2)),
        # 7/8 of 320 bytes over the two links of a corner, in 1 + 3 hops.
        (TORUS, [PAIR, ROW], "reduce-scatter", 280 / 160 + 4),
        (TORUS, [RING, RING, RING], "all-gather", 320 * 63 / 64 / (6 * 80) + 6),
        (SWITCH, [Axis(8, False)], "all-reduce", 5 + 2 * 7 + 2 * 280 / 80),
        (SWITCH, [], "all-reduce", 0),
    ],
)
def test_seconds_of_a_collective(machine, group, kind, expected):
    assert seconds(collective(kind, 320), machine, group) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("machine", "shape", "model", "data_axes", "model_axes"),
    [
        (V5E, (2, 4), 1, [ROW, PAIR], []),
        (V5E, (2, 4), 4, [PAIR], [ROW]),
        (V5E, (2, 4), 8, [], [ROW, PAIR]),
        (V5P, (4, 4, 4), 4, [RING, RING], [RING]),
        (V5P, (4, 4, 4), 2, [PAIR, RING, RING], [PAIR]),  # half an axis is no ring
        (V5P, (2, 4, 4), 1, [ROW, ROW, PAIR], []),  # nor are those of less than a full torus
        (H100, (8,), 4, [PAIR], [ROW]),
    ],
)
def test_mesh_axes_on_the_torus(machine, shape, model, data_axes, model_axes):
    assert machine.groups(shape, model) == {"data": data_axes, "model": model_axes}


def test_efficiency():
    one = Step(products=2, memory=3, hidden=1, exposed=1, sent=0)
    assert (one.alone, one.longest, one.shortest) == (3, 5, 4)
    assert one.efficiency == (3 / 5, 3 / 4)
    assert Step(2, 3, hidden=10, exposed=1, sent=0).shortest == 11


def small(batch=3, **fields):
    return Work.of(config_of(SMALL | fields), batch)


@pytest.mark.parametrize(("remat", "passes"), [("none", 3), ("full", 4)])
def test_operations_of_a_step(remat, passes):
    batch, length, width, depth, vocabulary = 3, 32, 64, 6, 256
    tokens = batch * length
    layer = 2 * tokens * 12 * width**2 + 2 * 2 * tokens * length * width
    head = 2 * tokens * width * vocabulary
    expected = passes * depth * layer + 3 * head
    assert small(**{"model.remat": remat}).flops == expected


def test_what_remat_keeps_of_a_layer():
    three, two = (small(**{"model.depth": depth}) for depth in (3, 2))
    assert three.kept["full"] - two.kept["full"] == 4 * 3 * 32 * 64  # its input
    assert three.kept["none"] > 5 * three.kept["full"]
    whole, half = Layout(8), Layout(4, model=2)
    layer = three.kept["none"] // 3
    assert three.activation_bytes(whole, "full") == three.kept["full"] + layer
    assert three.activation_bytes(half, "full") == 2 * three.kept["full"] + layer


MATRICES = 3 * 64 * 64 + 64 * 64 + 2 * 64 * 256  # of a layer
BIASES_AND_GATE = 3 * 64 + 64 + 256 + 64 + 1
WHOLE = 2 * 256 * 64 + 256 + 2 * (MATRICES + BIASES_AND_GATE)  # with two layers


@pytest.mark.parametrize(
    ("layout", "elements"),
    [
        (Layout(8), WHOLE),
        # All biases have fewer than 1,024 elements.
        (Layout(8, fully_sharded=True), WHOLE - (2 * 256 * 64 + 2 * MATRICES) * 7 // 8),
        # What is not cut: the biases that a sublayer ends with, and the gate.
        (Layout(4, 2), WHOLE - (WHOLE - 2 * (64 + 64 + 1)) // 2),
    ],
)
def test_state_of_a_device(layout, elements):
    one = small(**{"model.depth": 2})
    found = one.state_bytes(layout)
    assert found["params"] == 4 * elements
    # LAMB's two moments; the rest are counters.
    assert found["opt_state"] == pytest.approx(8 * elements, abs=40)


def test_a_step_by_hand():
    """1B, data parallel, on v5e-8: all-reduces of bfloat16 layers over two links of 40 GB/s."""
    width = 2048
    layer = 2 * (12 * width**2 + 9 * width)
    outer = 4 * (2 * 256 * width + 256)
    found = step(work("1B"), V5E, (2, 4), layouts("1B", 8)["data"])
    assert found.sent == 2 * 7 / 8 * (20 * layer + outer)
    assert found.hidden == pytest.approx(found.sent / 80e9 + 21 * 2 * 4 * 1e-6)
    assert found.exposed == 0
    assert found.products == work("1B").flops / (0.5 * 197e12)


def test_tensor_parallelism_by_hand():
    """1B on 8xH100 with model=4: six sums a layer of four times four examples."""
    found = step(work("1B"), H100, (8,), layouts("1B", 8)["model=4"])
    tokens, width = 16 * 2048, 2048
    sums = 6 * 20 * 2 * tokens * width + 2 * 4 * tokens * width + 3 * 4 * tokens
    each = 14e-6 + 2 * 3 * 1.9e-6
    expected = 125 * each + 2 * 3 / 4 * sums / (0.8 * 450e9)
    assert found.exposed == pytest.approx(expected)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
def test_a_device_alone_is_efficient(machine):
    assert step(work("128 layers"), machine, machine.slices[0], Layout(1)).efficiency == (1, 1)


SLOW = ("data=8, accumulate=2", "data=2, model=4")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case[0], marks=[pytest.mark.slow] if case[0] in SLOW else [])
        for case in SMALL_LAYOUTS
    ],
)
def test_a_compiled_program_says_what_was_reckoned(case):
    assert jax.device_count() == 8
    rows = list(scaling.compiled_rows(*case))
    assert rows
    page = scaling.PAGE.read_text().splitlines()
    for row in rows:
        *_, size, expected = row
        assert size == expected
        assert scaling.markdown([row]).splitlines()[0] in page


def test_the_page_has_the_tables_of_the_command():
    page = scaling.PAGE.read_text()
    quick = scaling.TABLES.keys() - {"compiled"}  # the test above
    tables = {name: scaling.markdown(scaling.TABLES[name]()) for name in quick}
    assert scaling.placed(page, tables) == page, "run python -m benchmarks.scaling --write"
