"""Random crops, flips, colour jitter and rotations of a batch of images, inside jit."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from rezero_jax.errors import UserError, check_between

BRIGHTNESS, CONTRAST, SATURATION = range(3)
ORDERS = np.asarray(list(itertools.permutations(range(3))), np.int32)  # (6, 3)
LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in grey (PIL, ITU-R 601)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes to images, in this order: crop, colour jitter, rotation, flip.

    crop_padding=4, jitter=0.25, rotation=2.0 and flip=True match ReZero supplement E.2 and the
    authors' code: torchvision's RandomCrop, ColorJitter, RandomRotation and RandomHorizontalFlip on
    PIL images. Rotation selects the same pixels as PIL.Image.rotate. Jitter computes in float32;
    torchvision truncates to integers after each change, so its pixels are darker by one or two.

    Attributes:
      crop_padding: black pixels added on each side before a crop to the old size, 0 .. 10,000.
      flip: mirror left to right with probability 1/2.
      jitter: brightness, contrast and saturation change, in a random order per image, each by a
        factor from U(max(0, 1 - jitter), 1 + jitter); 0 .. 10.
      rotation: degrees, 0 .. 360; the angle is from U(-rotation, rotation), counter-clockwise about
        the centre, nearest neighbour, black outside the image.

    Raises a UserError for a value out of its range.
    """

    crop_padding: int = 0
    flip: bool = False
    jitter: float = 0.0
    rotation: float = 0.0

    def __post_init__(self) -> None:
        for name, most in (("crop_padding", 10_000), ("jitter", 10.0), ("rotation", 360.0)):
            check_between(0, getattr(self, name), most, f"data.{name}")

    def __call__(self, image: Array, key: Array) -> Array:
        """Augments images by random numbers that depend on key and position in the batch alone."""
        return self.apply(image, self.draw(key, image.shape[0]))

    def draw(self, key: Array, batch: int) -> dict[str, Array]:
        """Draws the random numbers for `batch` images; enabling a change does not affect another.

        Returns:
          For each enabled change: "crop" int32 (batch, 2), row and column of the crop's corner in
          the padded image; "factors" float32 (batch, 3), of brightness, contrast and saturation;
          "order" int32 (batch, 3) of the three; "angle" float32 (batch,); "flip" bool (batch,).
        """
        # One call, because each takes a third of a second to compile. A float32 has 23 random bits,
        # so n options are equally likely to within n / 2**23.
        uniform = jax.random.uniform(key, (batch, 8), jnp.float32)
        draws = {}
        if self.crop_padding:
            draws["crop"] = (uniform[:, :2] * (2 * self.crop_padding + 1)).astype(jnp.int32)
        if self.jitter:
            low, high = max(0.0, 1 - self.jitter), 1 + self.jitter
            draws["factors"] = low + uniform[:, 2:5] * (high - low)
            draws["order"] = jnp.asarray(ORDERS)[(uniform[:, 5] * len(ORDERS)).astype(jnp.int32)]
        if self.rotation:
            draws["angle"] = (2 * uniform[:, 6] - 1) * self.rotation
        if self.flip:
            draws["flip"] = uniform[:, 7] < 0.5
        return draws

    def apply(self, image: Array, draws: dict[str, Array]) -> Array:
        """Augments images, uint8 (B, H, W, C) with sides below 16384, by the result of `draw`.

        With jitter, the result is float32 in 0 .. 255. Raises a UserError for jitter of images with
        neither 1 nor 3 channels.
        """
        if self.crop_padding:
            row, column = (draws["crop"] - self.crop_padding).T[..., None, None]
            rows = row + jnp.arange(image.shape[1]).reshape(1, -1, 1)
            columns = column + jnp.arange(image.shape[2]).reshape(1, 1, -1)
            image = _sample(image, rows, columns)
        if self.jitter:
            image = _jitter(image, draws["factors"], draws["order"])
        if self.rotation:
            image = _rotate(image, draws["angle"])
        if self.flip:
            # A gather, because XLA on a CPU would compute both operands of a select twice.
            column = jnp.arange(image.shape[2]).reshape(1, 1, -1, 1)
            mirrored = draws["flip"].reshape(-1, 1, 1, 1)
            column = jnp.where(mirrored, image.shape[2] - 1 - column, column)
            image = jnp.take_along_axis(image, column, axis=2, mode="promise_in_bounds")
        return image


def augment(config: ConfigDict) -> Callable[[dict[str, Array], Array], dict[str, Array]] | None:
    """The augmentation of config.data as a function (batch, key) -> batch, or None for none."""
    augmentation = Augmentation(config.crop_padding, config.flip, config.jitter, config.rotation)
    if augmentation == Augmentation():
        return None
    return lambda batch, key: batch | {"image": augmentation(batch["image"], key)}


def _sample(image: Array, row: Array, column: Array) -> Array:
    """image[b, row, column], zero outside; row and column int32, together (B, H, W)."""
    batch, height, width, channels = image.shape
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    index = jnp.where(inside, row * width + column, 0).reshape(batch, height * width, 1)
    pixels = image.reshape(batch, height * width, channels)
    taken = jnp.take_along_axis(pixels, index, axis=1, mode="promise_in_bounds")
    return jnp.where(inside[..., None], taken.reshape(image.shape), 0)


def _jitter(image: Array, factors: Array, order: Array) -> Array:
    """Blends each image, in float32, with three targets in its `order`."""
    channels = image.shape[-1]
    if channels not in (1, 3):
        raise UserError(f"data.jitter needs 1 or 3 channels, not {channels}; set it to 0")
    image = image.astype(jnp.float32)
    for place in range(3):
        kind = order[:, place].reshape(-1, 1, 1, 1)
        factor = jnp.take_along_axis(factors, order[:, place : place + 1], axis=1)
        grey = image
        if channels == 3:  # a sum over an axis of 3 is several times slower on a CPU
            red, green, blue = (image[..., c : c + 1] for c in range(3))
            grey = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
        mean = grey.mean(axis=(1, 2, 3), keepdims=True)
        target = jnp.where(kind == SATURATION, grey, jnp.where(kind == CONTRAST, mean, 0.0))
        # f x + (1 - f) target, in a form that returns x exactly where x equals the target.
        image = (target + factor.reshape(-1, 1, 1, 1) * (image - target)).clip(0, 255)
    return image


def _rotate(image: Array, degrees: Array) -> Array:
    """Rotates about the centre in PIL's fixed-point arithmetic, in units of 1/65536 pixel."""
    _, height, width, _ = image.shape
    theta = jnp.deg2rad(degrees).reshape(-1, 1, 1)
    sine = jnp.sin(theta)
    versine = 2 * jnp.sin(theta / 2) ** 2  # 1 - cosine without cancellation
    x0, y0 = (width - 1) / 2, (height - 1) / 2
    x, y = jnp.arange(width).reshape(1, 1, -1), jnp.arange(height).reshape(1, -1, 1)

    def fixed(pixels: Array) -> Array:
        return jnp.floor(pixels * 65536 + 0.5).astype(jnp.int32)

    cosine = 65536 + fixed(-versine)
    column = 32768 + fixed(x0 * versine + y0 * sine) + cosine * x + fixed(-sine) * y
    row = 32768 + fixed(y0 * versine - x0 * sine) + fixed(sine) * x + cosine * y
    return _sample(image, row >> 16, column >> 16)
