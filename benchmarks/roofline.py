"""Machines by their data sheets, and how long a training step takes on them on paper."""

import dataclasses
import math
from typing import NamedTuple

from benchmarks.collectives import Collective, reckoned
from benchmarks.work import Layout, Work
from rezero_jax.training.cost import ACCELERATORS, Accelerator

# What of a data sheet's peak is reached: assumed, not measured.
OF_PRODUCTS, OF_MEMORY, OF_LINKS = 0.5, 0.8, 0.8


class Axis(NamedTuple):
    """Devices in a row; in a ring, where the last is linked with the first."""

    size: int
    ring: bool


@dataclasses.dataclass(frozen=True)
class Machine:
    """Chips that are linked with each other.

    Attributes:
      name: as it is asked for.
      chip: a name of cost.ACCELERATORS; JAX has one device for each.
      slices: the shapes in which fewer of them can be had, and its own last. A shape is the number
        of chips along each axis of the torus, or all of them on a switch.
      memory_rate: bytes a second between a chip and its memory.
      link: bytes a second that a chip sends over one link; over a switch, in all.
      hop: seconds that the first byte takes over a link, at least.
      launch: seconds for a collective to start.
      full_torus: an axis is a ring where all axes of the slice have a multiple of this length.
      switch: whether all chips hang on a switch, each one hop from any other.
    """

    name: str
    chip: str
    slices: tuple[tuple[int, ...], ...]
    memory_rate: float
    link: float
    hop: float
    launch: float = 0.0
    full_torus: int = 0
    switch: bool = False

    @property
    def accelerator(self) -> Accelerator:
        """Peak and size of the memory of a chip."""
        return ACCELERATORS[self.chip]

    def groups(self, shape: tuple[int, ...], model: int) -> dict[str, list[Axis]]:
        """Mesh axis -> the axes of the torus that it runs along, where `model` takes the last.

        An axis that both mesh axes share is a ring for neither of them.
        """
        ring = self.full_torus > 0 and all(size % self.full_torus == 0 for size in shape)
        along: dict[str, list[Axis]] = {"data": [], "model": []}
        left = model
        for size in reversed(shape):
            of_model = math.gcd(size, left)
            left //= of_model
            along["model"].append(Axis(of_model, ring and of_model == size))
            along["data"].append(Axis(size // of_model, ring and of_model == 1))
        return {name: [axis for axis in axes if axis.size > 1] for name, axes in along.items()}


GB = 1e9
MACHINES = (
    Machine(
        "v5e-8",
        "v5e",
        slices=((1, 1), (2, 2), (2, 4)),
        memory_rate=819 * GB,
        link=400 / 2 / 4 * GB,  # 400 GB/s both ways, on 4 links
        hop=1e-6,
        full_torus=16,
    ),
    Machine(
        "v5p-128",
        "v5p",
        slices=((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4)),
        memory_rate=2765 * GB,
        link=1200 / 2 / 6 * GB,  # 1,200 GB/s both ways, on 6 links
        hop=1e-6,
        full_torus=4,
    ),
    Machine(
        "8xH100",
        "h100",
        slices=((1,), (2,), (4,), (8,)),
        memory_rate=3350 * GB,
        link=900 / 2 * GB,  # 900 GB/s both ways
        hop=1.9e-6,
        launch=14e-6,
        switch=True,
    ),
)


def sent(collective: Collective, count: int) -> float:
    """Bytes that each of `count` devices sends, at least: (n - 1) / n of the array, in a ring.

    An all-reduce is a reduce-scatter and an all-gather of the sum: twice that.
    """
    rounds = 2 if collective.kind == "all-reduce" else 1
    return rounds * (count - 1) / count * collective.size


def seconds(collective: Collective, machine: Machine, group: list[Axis]) -> float:
    """Of one collective among the devices of a group, 0 if there is one alone.

    All axes of the torus are used at once, a ring in both directions; in a row the chip at its end
    has one link only, and all wait for it.
    """
    count = math.prod(axis.size for axis in group)
    if count == 1:
        return 0.0
    rounds = 2 if collective.kind == "all-reduce" else 1
    if machine.switch:
        links, hops = 1, count - 1
    else:
        links = sum(2 if axis.ring else 1 for axis in group)
        hops = sum(axis.size // 2 if axis.ring else axis.size - 1 for axis in group)
    flight = sent(collective, count) / (OF_LINKS * links * machine.link)
    return machine.launch + rounds * hops * machine.hop + flight


@dataclasses.dataclass(frozen=True)
class Step:
    """Seconds of a step on one of many devices, by what they go into, and bytes it sends.

    Attributes:
      products: matrix products.
      memory: traffic with the memory, at the same time as the products.
      hidden: collectives that can go on beside them.
      exposed: collectives that everything waits for.
      sent: bytes.
    """

    products: float
    memory: float
    hidden: float
    exposed: float
    sent: float

    @property
    def alone(self) -> float:
        """Of a device that has no other to talk to."""
        return max(self.products, self.memory)

    @property
    def longest(self) -> float:
        """If nothing is hidden."""
        return self.alone + self.hidden + self.exposed

    @property
    def shortest(self) -> float:
        """If all is hidden that can be."""
        return max(self.alone, self.hidden) + self.exposed

    @property
    def efficiency(self) -> tuple[float, float]:
        """Examples a second and device over those of a device alone: at worst, and at best."""
        return self.alone / self.longest, self.alone / self.shortest


def step(work: Work, machine: Machine, shape: tuple[int, ...], layout: Layout) -> Step:
    """The step of `work` on each chip of a slice."""
    assert math.prod(shape) == layout.data * layout.model
    groups = machine.groups(shape, layout.model)
    hidden = exposed = total = 0.0
    for collective in reckoned(work, layout):
        group = groups[collective.axis]
        time = collective.times * seconds(collective, machine, group)
        hidden += time if collective.may_hide else 0
        exposed += 0 if collective.may_hide else time
        total += collective.times * sent(collective, math.prod(axis.size for axis in group))
    return Step(
        work.flops / (OF_PRODUCTS * machine.accelerator.flops),
        work.traffic / (OF_MEMORY * machine.memory_rate),
        hidden,
        exposed,
        total,
    )
