"""Time, memory and collectives of a compiled program on one device, estimated by the compiler.

The TPU's compiler annotates each instruction with its estimated cycles. Their sum, with a loop's
body times its trip count, is the estimate of the time. The estimate excludes waiting for
collectives, transfers between memories that overlap with work, and Pallas kernels.

A GPU's compiler gives no estimate. The time of an update there is predicted from the number of
kernel launches and the bytes that they move; docs/accelerators.md compares it with an H200.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from rehearsal.program import Instruction, Traffic, parse, shape_bytes, trip_count
from rezero_jax.training.cost import PEAK_FLOPS, chip_kind

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Chip(NamedTuple):
    """Data sheet of one device.

    Attributes:
      kind: a key of PEAK_FLOPS, the beginning of JAX's `device_kind`.
      bandwidth: memory bandwidth in bytes per second.
      memory: memory in bytes.
      hertz: clock of a TPU core, which converts the compiler's estimate to seconds; None for GPUs.
    """

    kind: str
    bandwidth: float
    memory: float
    hertz: float | None = None

    @property
    def flops(self) -> float:
        """Peak bfloat16 FLOP/s of matrix products, without sparsity."""
        return PEAK_FLOPS[self.kind]


# The sources are those of PEAK_FLOPS. The clock is the peak rate divided by the FLOPs per cycle of
# all matrix units of 128 x 128 (v6e and tpu7x: 256 x 256).
CHIPS = {
    "v4": Chip("TPU v4", 1228e9, 32e9, 1.05e9),
    "v5e": Chip("TPU v5 lite", 819e9, 16e9, 1.5e9),
    "v5p": Chip("TPU v5", 2765e9, 95e9, 1.75e9),
    "v6e": Chip("TPU v6 lite", 1640e9, 32e9, 1.75e9),
    "tpu7x": Chip("TPU7x", 3690e9, 96e9, 2.2e9),
    "a100": Chip("NVIDIA A100", 2039e9, 80e9),
    "h100": Chip("NVIDIA H100", 3352e9, 80e9),
    "h200": Chip("NVIDIA H200", 4800e9, 141e9),
}


def chip_of(device: Any) -> Chip | None:
    """The data sheet of a device, or None if CHIPS does not have it."""
    kind = chip_kind(device)
    return next((chip for chip in CHIPS.values() if chip.kind == kind), None)


# What a GPU reaches, fitted to one H200: seconds of a launch, and shares of the data sheet.
LAUNCH, BYTES_REACHED, FLOPS_REACHED = 2.1e-6, 0.9, 0.8


class Collective(NamedTuple):
    """A transfer between devices, within one update or one dispatch.

    Attributes:
      kind: "all-reduce", ...; "all-reduce between slices" uses the data-centre network.
      size: bytes of the result on one device.
      groups: groups of participating devices, in HLO's notation.
      trips: number of executions.
    """

    kind: str
    size: int
    groups: str
    trips: int


@dataclass
class Account:
    """Sums over the instructions of one update, or of a dispatch outside its updates.

    Attributes:
      cycles: the compiler's estimate, by operation.
      launches: number of kernels and copies that a GPU starts.
      bytes: bytes read from and written to memory, by operation, if no instruction reads anything
        twice; for an array that is sliced or updated in place, the bytes of the slice.
      convolutions: number of cuDNN's convolutions, whose kernels are chosen on the GPU alone; each
        is predicted as one launch that only moves its arrays.
      collectives: see `Collective`.
      kernels: bytes read and written by kernels without an estimate (Pallas, random bits), by name.
      kernel_flops: minimum FLOPs of splash attention's kernels.
    """

    cycles: Counter[str] = field(default_factory=Counter)
    launches: int = 0
    bytes: Counter[str] = field(default_factory=Counter)
    convolutions: int = 0
    collectives: list[Collective] = field(default_factory=list)
    kernels: Counter[str] = field(default_factory=Counter)
    kernel_flops: int = 0

    def seconds(self, chip: Chip, flops: float = 0.0) -> float:
        """The compiler's estimate for a TPU; for a GPU, the sum of `gpu_parts`."""
        if chip.hertz:
            return self.cycles.total() / chip.hertz
        return sum(self.gpu_parts(chip, flops).values())

    def gpu_parts(self, chip: Chip, flops: float = 0.0) -> dict[str, float]:
        """Predicted seconds of the launches, and of the bytes or the FLOPs, whichever takes longer.

        `flops` are those of the matrix products and convolutions on one device.
        """
        moved = self.bytes.total() / (BYTES_REACHED * chip.bandwidth)
        computed = flops / (FLOPS_REACHED * chip.flops)
        longer = {"bytes": moved} if moved >= computed else {"FLOPs": computed}
        return {"launches": self.launches * LAUNCH} | longer

    def kernel_seconds(self, chip: Chip) -> float:
        """A lower bound on the time of a TPU's `kernels`, from the chip's peak rates."""
        if not chip.hertz:
            return 0.0  # a GPU's prediction includes them
        return max(self.kernels.total() / chip.bandwidth, self.kernel_flops / chip.flops)

    def add(self, other: "Account") -> None:
        """Adds the sums of another account."""
        self.cycles.update(other.cycles)
        self.launches += other.launches
        self.bytes.update(other.bytes)
        self.convolutions += other.convolutions
        self.collectives += other.collectives
        self.kernels.update(other.kernels)  # += would drop kernels without bytes
        self.kernel_flops += other.kernel_flops


class Estimate(NamedTuple):
    """Costs of a program on one device."""

    update: Account  # of one update
    dispatch: Account  # of a dispatch outside its updates
    memory: int  # see `memory_of`


def estimate(compiled: jax.stages.Compiled) -> Estimate:
    """Estimates the costs of a compiled dispatch or of a single compiled update.

    The update is the body of the loop with an unknown trip count, or, without such a loop, the
    whole program.
    """
    return Estimate(*accounts(compiled.as_text() or ""), memory_of(compiled))


def memory_of(compiled: jax.stages.Compiled) -> int:
    """Bytes of arguments, results and temporaries of a program on one device; 0 if unknown."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return used + memory.output_size_in_bytes - memory.alias_size_in_bytes


def collectives(account: Account, devices: int) -> list[dict[str, Any]]:
    """The collectives of an account as JSON data, by kind, size and groups, most bytes first.

    Args:
      account: the account.
      devices: number of devices of the mesh.
    """
    counts: Counter[tuple[str, int, str]] = Counter()
    for one in account.collectives:
        counts[one.kind, one.size, one.groups] += one.trips
    return [
        {
            "kind": kind,
            "bytes": size,
            "count": count,
            "devices": group_size(groups) or devices,
            "groups": groups,
        }
        for (kind, size, groups), count in sorted(
            counts.items(), key=lambda item: -item[0][1] * item[1]
        )
    ]


def group_size(groups: str) -> int | None:
    """The number of devices in a group of a collective, or None if HLO does not state it."""
    if mesh := re.match(r"mesh\[(.*?)\] ?\{(.*?)\}", groups):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if iota := re.match(r"\[\d+,(\d+)\]", groups):
        return int(iota[1])
    if listed := re.match(r"\{\{([\d,]*)\}", groups):
        return len(listed[1].split(","))
    if slices := re.match(r"\{([\d,:]+)\}x", groups):  # times the devices of a slice
        ends = [[int(end) for end in part.split(":")] for part in slices[1].split(",")]
        return sum(part[-1] - part[0] + 1 for part in ends)
    return None


def accounts(hlo: str) -> tuple[Account, Account]:
    """The accounts of an update, and of a dispatch outside its updates, from optimised HLO."""
    computations, entry = parse(hlo)
    update, rest = Account(), Account()
    traffic = Traffic(computations)
    found_loop = False

    def walk(name: str, trips: int, account: Account) -> None:
        nonlocal found_loop
        for one in computations[name]:
            moved = traffic.of(one, name)
            account.cycles[one.operation] += trips * one.cycles
            if not traffic.is_free(one):
                account.launches += trips
                account.bytes[one.operation] += trips * moved
                account.convolutions += trips * ("__cudnn$conv" in one.rest)
            if (found := _collective(one, trips)) is not None:
                account.collectives.append(found)
            elif one.opcode == "while":
                count = trip_count(one, computations)
                if count is None and not found_loop:
                    found_loop = True
                    walk(one.called["body"], 1, update)
                else:
                    walk(one.called["body"], trips * (count or 1), account)
            elif one.opcode == "call":
                walk(one.called["to_apply"], trips, account)
            elif one.opcode == "conditional":
                branches = [Account() for _ in one.branches]
                for branch, taken in zip(one.branches, branches, strict=True):
                    walk(branch, trips, taken)
                account.add(max(branches, key=lambda taken: (taken.cycles.total(), taken.launches)))
            elif not one.cycles and _is_kernel(one):
                account.kernels[re.sub(r"[.\d]+$", "", one.name)] += trips * moved
                account.kernel_flops += trips * _splash_flops(one)

    walk(entry, 1, rest)
    return (update, rest) if found_loop else (rest, update)


def _collective(one: Instruction, trips: int) -> Collective | None:
    kind = one.opcode.removesuffix("-start")
    if kind in _COLLECTIVES:
        groups = re.search(r"(?:replica_groups|source_target_pairs)=(.*?), \w+=", one.rest)
        size = shape_bytes(one.result)
        if one.opcode == "all-gather-start":  # the result includes the operands
            size = max(shape_bytes(part) for part in one.result.strip("()").split(", "))
        return Collective(kind, size, groups[1] if groups else "", trips)
    if one.opcode == "send" and "_xla_megascale_target" in one.rest:
        attributes = dict(re.findall(r'_xla_megascale_(\w+)="(.*?)"', one.rest))
        kind = attributes["transfer_type"].lower().replace("_", "-") + " between slices"
        size = shape_bytes(one.result.partition("]")[0] + "]")  # a flag and a token follow
        return Collective(kind, size, attributes["target"], trips)
    return None


def _is_kernel(one: Instruction) -> bool:
    calls = ("tpu_custom_call", "__cudnn", "__cublas", "__triton")
    return one.opcode == "rng-bit-generator" or (
        one.opcode == "custom-call" and any(name in one.rest for name in calls)
    )


# Number of matrix products in each kernel of splash attention. "fwd" has q k and weights v; the two
# backward kernels rematerialise q k and have two or three gradients.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}


def _splash_flops(one: Instruction) -> int:
    """FLOPs of a kernel of causal splash attention, which needs half of the scores."""
    kind = re.match(r"splash_mha_(fwd|dq|dkv)", one.name)
    if kind is None:
        return 0
    shapes = re.findall(r"\[(\d+),(\d+),(\d+),(\d+)\]", one.result)
    sizes = [tuple(map(int, shape)) for shape in shapes]  # (batch, heads, length, size)
    batch, heads, length, size = max(sizes, key=math.prod, default=(0, 0, 0, 0))
    return _SPLASH_PRODUCTS[kind[1]] * batch * heads * length**2 * size
