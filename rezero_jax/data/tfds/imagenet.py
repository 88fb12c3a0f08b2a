"""Crops of ImageNet's JPEGs (ILSVRC 2012): random for training, central for evaluation."""

import dataclasses
import math

import numpy as np
from PIL import Image

from rezero_jax.data.order import SplitMix64
from rezero_jax.data.pixels import opened

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the whole image

MEAN = (0.485, 0.456, 0.406)  # of the training images, per channel; the conventional values
STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Crop:
    """Crops a JPEG and resizes it to uint8 (size, size, 3), bilinear with antialiasing.

    With a seed, the crop is a `random_box` of (seed, step, position in the batch), otherwise the
    `central_box`.
    """

    size: int
    seed: int | None = None

    def __call__(self, encoded: bytes, step: int = 0, position: int = 0) -> np.ndarray:
        size = self.size
        with opened(encoded) as image:
            width, height = image.size
            if self.seed is None:
                left, top, right, bottom = central_box(size, width, height)
            else:
                rng = SplitMix64(self.seed, step, position)
                left, top, right, bottom = random_box(rng, width, height)
            # Decoding at 1/2, 1/4 or 1/8 of the size is cheaper, and allowed if the box retains at
            # least `size` pixels on each side.
            shrink = next((s for s in (8, 4, 2) if s * size <= min(right - left, bottom - top)), 1)
            if image.draft(None, (width // shrink, height // shrink)) is None:
                shrink = 1
            scaled = left / shrink, top / shrink, right / shrink, bottom / shrink
            rgb = image.convert("RGB")  # a few images are grey or CMYK, and one is a PNG
            return np.asarray(rgb.resize((size, size), Image.Resampling.BILINEAR, box=scaled))


def random_box(rng: SplitMix64, width: int, height: int) -> Box:
    """Draws a box in an image of width x height pixels like torchvision's RandomResizedCrop.

    The fraction of the area is uniform in 0.08 .. 1, the aspect ratio log-uniform in 3/4 .. 4/3.
    After ten boxes that do not fit, returns the largest central box with a ratio in this range.
    """
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = rng.uniform(0.08, 1.0) * width * height
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = (int(rng.integers(room + 1, size=1)[0]) for room in (height - h, width - w))
            return left, top, left + w, top + h
    w, h = min(width, round(height * high)), min(height, round(width / low))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def central_box(size: int, width: int, height: int) -> Box:
    """The central size x size pixels after a resize of the short side to size * 256 / 224, rounded.

    The box is in pixels of the original image, which is width x height.
    """
    short = round(size * 256 / 224)
    w, h = (short * side // min(width, height) for side in (width, height))
    left, top = round((w - size) / 2), round((h - size) / 2)
    right, bottom = left + size, top + size
    return left * width / w, top * height / h, right * width / w, bottom * height / h
