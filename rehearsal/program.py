"""Parses optimised HLO, the text of a compiled program."""

import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "f8e4m3fn": 1, "f8e5m2": 1} | {
    f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (8, 16, 32, 64)
}
Names = dict[str, "Instruction"]  # the instructions of one computation, by name
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{[^}]*\})?")
_CALLED = re.compile(r"(body|condition|to_apply|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")


class Instruction(NamedTuple):
    """One line of optimised HLO."""

    name: str  # such as "fusion.3"
    opcode: str  # such as "fusion"
    result: str  # text of the result's shape
    rest: str  # text after the opening parenthesis of the operands

    @property
    def cycles(self) -> int:
        """The compiler's estimate, or 0 if there is none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else 0

    @property
    def operation(self) -> str:
        """The JAX operation that the instruction implements, or else the opcode."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1].split("/")[-1].split("[")[0] if found and found[1] else self.opcode

    @property
    def called(self) -> dict[str, str]:
        """The computations that the instruction calls, by role."""
        return dict(_CALLED.findall(self.rest))

    @property
    def operands(self) -> list[str]:
        """The names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.split(")", 1)[0])

    @property
    def branches(self) -> list[str]:
        """The computations of a conditional."""
        found = [many or one for many, one in _BRANCHES.findall(self.rest)]
        return [name.strip(" %") for names in found for name in names.split(",")]


def parse(hlo: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", ""
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            current = head[2]
            computations[current] = []
            entry = current if head[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            name, result, opcode, rest = found.groups()
            computations[current].append(Instruction(name, opcode, result, rest))
    return computations, entry


def trip_count(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """The trip count of a `while`, from the compiler or the loop's condition; None if unknown."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    limits = [
        int(number)
        for one in computations[loop.called["condition"]]
        if one.opcode == "constant" and one.result.startswith("s32[]")
        for number in re.findall(r"^(-?\d+)\)", one.rest)
    ]
    return max(limits, default=None)


def shape_bytes(text: str) -> int:
    """Total bytes of the arrays in the text of a shape."""
    return math.ceil(
        sum(
            _BYTES.get(kind, 0) * math.prod(int(side) for side in sides.split(",") if side)
            for kind, sides in _SHAPE.findall(text)
        )
    )


class Traffic:
    """Bytes that an instruction moves to and from the device's memory."""

    # Instructions that move nothing themselves, unlike the computations that they call.
    FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all")
    CALLS = ("while", "call", "conditional")
    PARTIAL = ("dynamic-slice", "slice", "gather")  # read as much of operand 0 as they return

    def __init__(self, computations: dict[str, list[Instruction]]):
        self._by_name = {
            name: {one.name: one for one in lines} for name, lines in computations.items()
        }

    def is_free(self, one: Instruction) -> bool:
        """Whether the instruction itself moves nothing and launches no kernel."""
        return one.opcode in self.FREE + self.CALLS or one.opcode.endswith("-done")

    def of(self, one: Instruction, computation: str) -> int:
        """Bytes that an instruction of this computation moves."""
        if self.is_free(one):
            return 0
        names = self._by_name[computation]
        shapes = [names[operand].result for operand in one.operands if operand in names]
        if one.opcode in self.PARTIAL:
            return 2 * _main_memory(one.result)
        if one.opcode == "dynamic-update-slice":
            return 2 * _main_memory(shapes[1])
        if one.opcode.endswith("-start"):  # the result includes the operands
            return _main_memory(re.sub(r"\(\(.*?\)\),", "(", one.result))
        if one.opcode == "fusion":
            return self._of_fusion(one, shapes)
        return _main_memory(one.result) + sum(map(_main_memory, shapes))

    def _of_fusion(self, fusion: Instruction, shapes: list[str]) -> int:
        """Bytes that a fusion moves; for an operand sliced or updated in place, the slice."""
        total, in_place = 0, 0
        for place, shape in enumerate(shapes):
            whole = _main_memory(shape)
            if not whole:
                continue
            uses = self._uses(place, fusion.called["calls"])
            if all(use.opcode in self.PARTIAL and at == 0 for use, at, _ in uses):
                total += min(whole, sum(self._read(use, names) for use, _, names in uses))
            elif all(use.opcode == "dynamic-update-slice" and at == 0 for use, at, _ in uses):
                updates = (names[use.operands[1]] for use, _, names in uses)
                total += sum(shape_bytes(update.result) for update in updates)
                in_place += whole
            else:
                total += whole
        return total + max(_main_memory(fusion.result) - in_place, 0)

    def _read(self, one: Instruction, names: Names) -> int:
        """Bytes that a slice reads within a fusion: less than its size if only slices use it."""
        size, uses = shape_bytes(one.result), self._users([one.name], names)
        if uses and all(use.opcode in self.PARTIAL and at == 0 for use, at, _ in uses):
            size = min(size, sum(self._read(use, inner) for use, _, inner in uses))
        return size

    def _uses(self, place: int, computation: str) -> list[tuple[Instruction, int, Names]]:
        """The `_users` of a parameter."""
        names = self._by_name[computation]
        waiting = [
            one.name
            for one in names.values()
            if one.opcode == "parameter" and one.rest.startswith(f"{place})")
        ]
        return self._users(waiting, names)

    def _users(self, waiting: list[str], names: Names) -> list[tuple[Instruction, int, Names]]:
        """Each user of instructions, its operand number, and the instructions of its computation.

        The users of a bitcast or a nested fusion replace it.
        """
        found: list[tuple[Instruction, int, Names]] = []
        while waiting:
            name = waiting.pop()
            for one in names.values():
                for at, operand in enumerate(one.operands):
                    if operand != name:
                        continue
                    if one.opcode == "bitcast":
                        waiting.append(one.name)
                    elif one.opcode == "fusion":
                        found += self._uses(at, one.called["calls"])
                    else:
                        found.append((one, at, names))
        return found


def _main_memory(shape: str) -> int:
    """Bytes of the arrays of a shape in main memory, not in a faster memory space S(1), ..."""
    return shape_bytes(re.sub(r"\w+\[[\d,]*\]\{[^}]*S\([1-9]\d*\)[^}]*\}", "", shape))
