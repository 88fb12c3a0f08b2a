"""What devices say to each other in a training step: as reckoned, and as a compiled step has it.

Reckoned for the Transformer with a scanned stack and an untied head, by these rules:

    data parallel    Each device has the gradient of its own examples. Those of a layer are summed
                     over `data` (all-reduce) in its turn of the backward scan; those of the
                     embedding and the head once, after it.
    fully sharded    Each device holds 1/n of every large array. A layer's arrays are fetched
                     (all-gather) in its turn of the forward scan and again in that of the backward
                     scan, and each device keeps the sum of its own share of the gradients
                     (reduce-scatter). What is too small to be cut is summed as above.
    tensor parallel  Of each sublayer the first matrix is cut by its outputs and the second by its
                     inputs. So its output is a sum over `model` (an all-reduce of the shape of the
                     trunk) in the forward scan, and the gradient of its input another one in the
                     backward scan. Recomputation makes both outputs again.

A layer's arrays travel in the dtype that it computes in, together; the others in float32. A batch
that is accumulated in parts does all of this once for each part.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.work import Layout, Work

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}


class Collective(NamedTuple):
    """One communication, made `times` times a step among the devices along a mesh axis.

    Attributes:
      what: is communicated.
      kind: a name of KINDS.
      size: bytes of the whole arrays: the sum, what is gathered, or what is scattered.
      axis: "data" or "model".
      may_hide: whether other computation can go on meanwhile.
    """

    what: str
    kind: str
    size: int
    times: int
    axis: str
    may_hide: bool


def reckoned(work: Work, layout: Layout) -> list[Collective]:
    """The collectives of a step of `work` on each device of a layout, but for single numbers.

    Args:
      work: with model.remat none or full.
      layout: fully sharded or with several devices along `model`, not both.
    """
    found = [*_of_weights(work, layout)] if layout.data > 1 else []
    return found + ([*_of_activations(work, layout)] if layout.model > 1 else [])


def _of_weights(work: Work, layout: Layout) -> Iterator[Collective]:
    recomputes = work.config.model.remat != "none"
    layer, outer = {"cut": 0, "whole": 0}, {"cut": 0, "whole": 0}
    forwards = backwards = fetched_outer = 0
    for path, (shape, axes) in work.specs(layout).items():
        kind = "cut" if "data" in axes else "whole"
        if path in work.skeleton.alpha_paths:
            continue  # a number a layer
        if path in work.skeleton.stacked_paths:
            size = math.prod(shape[1:]) * work.bytes_per_element
            layer[kind] += size
            if kind == "cut":
                forwards += size
                backwards += size if recomputes or not path.endswith("bias") else 0
        else:
            outer[kind] += 4 * math.prod(shape)
            if kind == "cut":
                # The head's product is in the layers' dtype, the way back through it in float32.
                twice = path == "head" and work.bytes_per_element != 4
                fetched_outer += (4 + twice * work.bytes_per_element) * math.prod(shape)
    for what, kind, size, times in (
        ("gradients of a layer", "all-reduce", layer["whole"], work.depth),
        ("gradients of embedding and head", "all-reduce", outer["whole"], 1),
        ("weights of a layer, forwards", "all-gather", forwards, work.depth),
        ("weights of a layer, backwards", "all-gather", backwards, work.depth),
        ("embedding and head", "all-gather", fetched_outer, 1),
        ("gradients of a layer", "reduce-scatter", layer["cut"], work.depth),
        ("gradients of embedding and head", "reduce-scatter", outer["cut"], 1),
    ):
        if size:
            parts = work.config.train.accumulate
            yield Collective(what, kind, size, times * parts, "data", may_hide=True)


def _of_activations(work: Work, layout: Layout) -> Iterator[Collective]:
    parts = work.config.train.accumulate
    tokens = layout.model * work.batch * work.config.data.length // parts
    trunk = tokens * work.config.model.width
    sums = 4 if work.config.model.remat == "none" else 6
    for what, size, times in (
        ("outputs and gradients of sublayers", work.bytes_per_element * trunk, sums * work.depth),
        ("output of the embedding, gradient of the head's input", 4 * trunk, 2),
        ("softmax: largest, sum, target", 4 * tokens, 3),
    ):
        yield Collective(what, "all-reduce", size, times * parts, "model", may_hide=False)


def compiled(hlo: str, smallest: int) -> dict[str, tuple[int, int]]:
    """Kind -> how often it happens in a step, and the bytes of all its arrays, from a program.

    Args:
      hlo: text of a compiled program, with one update in a dispatch.
      smallest: arrays of fewer elements are not counted.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:
            bodies[name].append(line)
    found: dict[str, tuple[int, int]] = {}
    for kind, arrays, turns in _communications(bodies, entry, 1):
        sizes = [size for elements, size in arrays if elements >= smallest]
        if sizes:
            times, total = found.get(kind, (0, 0))
            found[kind] = times + turns, total + turns * sum(sizes)
    return found


def _communications(
    bodies: dict[str, list[str]], name: str, turns: int
) -> Iterator[tuple[str, list[tuple[int, int]], int]]:
    """(kind, (elements, bytes) of its arrays, turns) of each line in a function and those within.

    A loop whose number of turns is unknown counts as one turn: that of the dispatch.
    """
    for line in bodies[name]:
        if made := re.search(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line):
            arrays = []
            for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", made[1]):
                elements = math.prod(int(size) for size in sizes.split(",") if size)
                arrays.append((elements, elements * ITEM_BYTES[dtype]))
            yield made[2], arrays, turns
        count = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        for inner in re.findall(
            r"(?:body|calls|branch_computations)=\{?((?:%[\w.-]+[, ]*)+)", line
        ):
            for function in re.findall(r"%([\w.-]+)", inner):
                yield from _communications(bodies, function, turns * int(count[1] if count else 1))
