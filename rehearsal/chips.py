"""Data sheets of accelerators."""

from typing import Any, NamedTuple

from rezero_jax.training.cost import PEAK_FLOPS, chip_kind


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
