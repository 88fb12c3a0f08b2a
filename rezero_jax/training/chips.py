"""What accelerators can do, by their makers' data sheets."""

from typing import Any, NamedTuple


class Chip(NamedTuple):
    """What one device can do, by its maker's data sheet.

    Attributes:
      kind: beginning of JAX's `device_kind`.
      flops: bfloat16 operations a second at best, matrix products without sparsity.
      bandwidth: bytes a second of its memory.
      memory: bytes of its memory.
      hertz: cycles a second of a TPU core, by which the compiler's estimate becomes a time.
    """

    kind: str
    flops: float
    bandwidth: float
    memory: float
    hertz: float | None = None


# Peak rates and memory: cloud.google.com/tpu/docs/system-architecture and NVIDIA's data sheets. The
# clock is the peak rate over the multiply-adds of a cycle: matrix units of 128 x 128 (v6e, tpu7x:
# 256 x 256). A device of v4 and v5p is a chip of two cores, one of tpu7x half a chip.
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 1228e9, 32e9, 1.05e9),
    "v5e": Chip("TPU v5 lite", 197e12, 819e9, 16e9, 1.5e9),
    "v5p": Chip("TPU v5", 459e12, 2765e9, 95e9, 1.75e9),
    "v6e": Chip("TPU v6 lite", 918e12, 1640e9, 32e9, 1.75e9),
    "tpu7x": Chip("TPU7x", 1153e12, 3690e9, 96e9, 2.2e9),
    "a100": Chip("NVIDIA A100", 312e12, 2039e9, 80e9),
    "h100": Chip("NVIDIA H100", 989e12, 3352e9, 80e9),
    "h200": Chip("NVIDIA H200", 989e12, 4800e9, 141e9),
}


def chip_of(device: Any) -> Chip | None:
    """The data sheet of a device, if it is known here."""
    fitting = [chip for chip in CHIPS.values() if device.device_kind.startswith(chip.kind)]
    return max(fitting, key=lambda chip: len(chip.kind), default=None)
