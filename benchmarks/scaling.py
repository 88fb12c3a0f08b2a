"""Weak scaling on paper: `python -m benchmarks.scaling [--write]`.

Prints the tables of docs/scaling.md, which explains them; --write puts them into it and draws
docs/scaling.png. Everything is computed from bytes, operations and data sheets. The one table that
a compiler has a part in is "compiled": what eight devices, posed by this CPU, say to each other.
"""

import argparse
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from benchmarks.collectives import compiled, reckoned
from benchmarks.networks import (
    NETWORKS,
    SMALL,
    SMALL_LAYOUTS,
    config_of,
    layouts,
    steps,
    total_bytes,
    work,
)
from benchmarks.roofline import MACHINES, sent, step
from benchmarks.transformer import random_text
from benchmarks.work import Layout, Work
from rezero_jax.analysis.style import COLOURS
from rezero_jax.analysis.table import markdown
from rezero_jax.host import pose_as
from rezero_jax.training.program import Program

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"


def machine_table() -> Iterator[tuple[object, ...]]:
    """The data sheets."""
    yield (
        *("machine", "chips", "bf16 TFLOP/s", "HBM, GB", "HBM, GB/s"),
        *("a link, GB/s one way", "links of a chip in use", "a hop, us", "a start, us"),
    )
    for machine in MACHINES:
        shape, chip = machine.slices[-1], machine.accelerator
        axes = machine.groups(shape, 1)["data"]
        links = 1 if machine.switch else sum(2 if axis.ring else 1 for axis in axes)
        yield (
            machine.name,
            " x ".join(map(str, shape)),
            f"{chip.flops / 1e12:.0f}",
            f"{chip.memory / 1e9:.0f}",
            f"{machine.memory_rate / 1e9:,.0f}",
            f"{machine.link / 1e9:.0f}",
            links,
            f"{machine.hop * 1e6:g}",
            f"{machine.launch * 1e6:g}",
        )


def network_table() -> Iterator[tuple[object, ...]]:
    """What a device has to do."""
    yield (
        *("network", "layers", "width", "heads", "length", "parameters", "optimizer"),
        *("examples", "TFLOP", "GB to and from memory"),
    )
    for network in NETWORKS:
        one = work(network)
        model = one.config.model
        yield (
            *(network, model.depth, model.width, model.heads, one.config.data.length),
            *(f"{one.skeleton.parameter_count:,}", one.config.optim.name, one.batch),
            *(f"{one.flops / 1e12:.1f}", f"{one.traffic / 1e9:.0f}"),
        )


def step_table() -> Iterator[tuple[object, ...]]:
    """Times and efficiencies."""
    yield (
        *("network", "machine", "mesh", "products, ms", "memory, ms", "sends, GB"),
        *("collectives, ms", "step, ms", "efficiency", "memory needed"),
    )
    for network in NETWORKS:
        for machine in MACHINES:
            for name, layout, one in steps(network, machine):
                worst, best = one.efficiency
                yield (
                    *(network, machine.name, name),
                    *(f"{1e3 * one.products:.1f}", f"{1e3 * one.memory:.1f}"),
                    *(f"{one.sent / 1e9:.2f}", f"{1e3 * (one.hidden + one.exposed):.1f}"),
                    f"{1e3 * one.longest:.1f} - {1e3 * one.shortest:.1f}",
                    f"{worst:.0%} - {best:.0%}",
                    f"{total_bytes(network, layout) / machine.accelerator.memory:.0%}",
                )


def memory_table() -> Iterator[tuple[object, ...]]:
    """What a device holds."""
    yield (
        *("network", "devices", "mesh", "parameters", "gradients", "optimizer"),
        *("activations, remat full", "none", "in all, remat full"),
    )
    for network in NETWORKS:
        for count in sorted({math.prod(machine.slices[-1]) for machine in MACHINES}):
            for name, layout in layouts(network, count).items():
                state = work(network).state_bytes(layout)
                sizes = [state["params"], state["params"], state["opt_state"]]
                sizes.append(work(network).activation_bytes(layout, "full"))
                none = work(network).activation_bytes(layout, "none")
                yield (
                    *(network, count, name, *(f"{size / 1e9:.2f}" for size in sizes)),
                    "" if layout.model > 1 else f"{none / 1e9:.2f}",
                    f"{total_bytes(network, layout) / 1e9:.2f}",
                )


def collective_table() -> Iterator[tuple[object, ...]]:
    """Who says what on eight devices."""
    yield (
        *("network", "mesh", "what", "collective"),
        *("times a step", "MB each", "a device sends, MB a step"),
    )
    for network in NETWORKS:
        for name, layout in layouts(network, 8).items():
            for one in reckoned(work(network), layout):
                count = layout.data if one.axis == "data" else layout.model
                yield (
                    *(network, name, one.what, f"{one.kind} over `{one.axis}`", one.times),
                    *(f"{one.size / 1e6:.3f}", f"{one.times * sent(one, count) / 1e6:,.1f}"),
                )


def compiled_table() -> Iterator[tuple[object, ...]]:
    """The collectives in the compiled step of a small network, and as reckoned."""
    yield "mesh", "collective, compiled", "times a step", "bytes a step", "reckoned"
    for name, layout, parts in SMALL_LAYOUTS:
        yield from compiled_rows(name, layout, parts)


def compiled_rows(name: str, layout: Layout, parts: int) -> Iterator[tuple[object, ...]]:
    """Those of one mesh, with a batch in so many parts."""
    fields = SMALL | {
        "train.accumulate": parts,
        "mesh.data": layout.data,
        "mesh.model": layout.model,
        "mesh.fully_sharded": layout.fully_sharded,
    }
    config = config_of(fields)
    program = Program(config, random_text(config.data.length))
    alone = Work.of(config, config.train.batch_size // (layout.data * layout.model))
    sums: dict[str, int] = {}
    for one in reckoned(alone, layout):
        # On a CPU a reduce-scatter is an all-reduce of which each device takes its part.
        kind = "all-reduce" if one.kind == "reduce-scatter" else one.kind
        sums[kind] = sums.get(kind, 0) + one.times * one.size
    found = compiled(program.compile().as_text() or "", smallest=config.model.depth + 1)
    for kind in sorted(found.keys() | sums.keys()):
        times, size = found.get(kind, (0, 0))
        yield name, kind, times, f"{size:,}", f"{sums.get(kind, 0):,}"


TABLES: dict[str, Callable[[], Iterable[tuple[object, ...]]]] = {
    "machines": machine_table,
    "networks": network_table,
    "steps": step_table,
    "memory": memory_table,
    "collectives": collective_table,
    "compiled": compiled_table,
}


def placed(page: str, tables: dict[str, str]) -> str:
    """The page with these tables where it has comments with their names."""
    for name, table in tables.items():
        between = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        page, count = re.subn(between, rf"\g<1>\n{table}\n\g<2>", page, flags=re.DOTALL)
        assert count == 1, name
    return page


def draw(path: Path) -> None:
    """Efficiency by devices, if no communication is hidden."""
    figure, panels = plt.subplots(1, len(NETWORKS), figsize=(11, 4.2), sharey=True)
    styles = ("-", "--", ":")
    for panel, network in zip(panels, NETWORKS, strict=True):
        names: dict[str, str] = dict(zip(layouts(network, 8), styles, strict=True))
        for machine, colour in zip(MACHINES, COLOURS, strict=False):
            for name, style in names.items():
                points = [
                    (math.prod(shape), step(work(network), machine, shape, layout).efficiency[0])
                    for shape in machine.slices
                    if (layout := layouts(network, math.prod(shape)).get(name)) is not None
                ]
                panel.plot(*zip(*points, strict=True), style, color=colour, marker=".")
        counts = [math.prod(shape) for machine in MACHINES for shape in machine.slices]
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted(set(counts)), [str(count) for count in sorted(set(counts))])
        panel.set(xlabel="devices", title=f"{network}, {work(network).batch} examples a device")
        panel.grid(alpha=0.3)
        keys = [
            Line2D([], [], color=c, label=m.name) for m, c in zip(MACHINES, COLOURS, strict=False)
        ]
        keys += [Line2D([], [], color="grey", ls=s, label=name) for name, s in names.items()]
        panel.legend(handles=keys, frameon=False)
    panels[0].set(ylabel="efficiency, nothing hidden (computed)", ylim=(0, 1.05))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into docs/scaling.md and .png")
    args = parser.parse_args()
    pose_as(8)
    tables = {name: markdown(rows()) for name, rows in TABLES.items()}
    for name, table in tables.items():
        print(f"{name}\n\n{table}\n")
    if args.write:
        PAGE.write_text(placed(PAGE.read_text(), tables))
        draw(PAGE.with_suffix(".png"))


if __name__ == "__main__":
    main()
