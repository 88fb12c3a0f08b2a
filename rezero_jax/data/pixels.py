"""From PNG and JPEG images, which may be a stranger's, to pixels; with the crops of ImageNet."""

import contextlib
import dataclasses
import io
import math
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from rezero_jax.data.order import SplitMix64
from rezero_jax.errors import UserError, first_line

FORMATS = ("PNG", "JPEG")  # for some of its other formats, Pillow runs programs
MOST_PIXELS = 89_000_000  # Pillow takes more for a decompression bomb

# ImageNet's training images, per channel; the conventional values.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the whole image


@contextlib.contextmanager
def opened(image: bytes | str) -> Iterator[Image.Image]:
    """Opens an image, the bytes or the path of a file; nothing else should be done inside.

    Raises a UserError without its subject for a damaged image or one of more than MOST_PIXELS.
    """
    try:
        file = io.BytesIO(image) if isinstance(image, bytes) else image
        with Image.open(file, formats=FORMATS) as loaded:
            width, height = loaded.size
            if width * height > MOST_PIXELS:  # before memory is taken
                raise UserError(f"has {width} x {height} pixels; give at most {MOST_PIXELS:,}")
            yield loaded
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds of errors for a damaged file.
        raise UserError(
            f"cannot be decoded as PNG or JPEG ({first_line(error)}); repair or remove it"
        ) from error


@dataclasses.dataclass(frozen=True)
class Decode:
    """Decodes an image to uint8 (H, W, C); see stream.StreamSplit.

    With 3 channels, every image becomes 8-bit RGB: transparent pixels are laid on white, and of 16
    bits the upper 8 remain.

    Attributes:
      size: height and width to which the central square is resized, bilinear with antialiasing;
        None keeps the image's own size.
      channels: number of channels; other numbers than 3 are not converted.
      upright: whether to turn an image as its EXIF orientation says.
    """

    size: int | None = None
    channels: int = 3
    upright: bool = False

    def __call__(self, image: bytes | str, step: int = 0, position: int = 0) -> np.ndarray:
        with opened(image) as loaded:
            pixels = loaded
            if self.size is not None:
                _draft(loaded, self.size, min(loaded.size))
            if self.upright:
                # A damaged EXIF block raises many kinds of errors, and the pixels may be sound.
                with contextlib.suppress(Exception):
                    pixels = ImageOps.exif_transpose(loaded)
            if self.channels == 3:
                pixels = _rgb(pixels)
            if self.size is not None:
                side = min(pixels.size)
                left, top = ((length - side) // 2 for length in pixels.size)
                box, size = (left, top, left + side, top + side), (self.size, self.size)
                pixels = pixels.resize(size, Image.Resampling.BILINEAR, box=box)
            return np.atleast_3d(np.asarray(pixels))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclasses.dataclass(frozen=True)
class Crop:
    """Crops a JPEG and resizes it to uint8 (size, size, 3), bilinear with antialiasing.

    The crop is the `central_box` or, with a seed, a `random_box` of (seed, step, position).
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
            shrink = _draft(image, size, min(right - left, bottom - top))
            scaled = left / shrink, top / shrink, right / shrink, bottom / shrink
            rgb = image.convert("RGB")  # a few images are grey or CMYK, and one is a PNG
            return np.asarray(rgb.resize((size, size), Image.Resampling.BILINEAR, box=scaled))


def _draft(image: Image.Image, size: int, side: float) -> int:
    """Has a JPEG decoded at 1/2, 1/4 or 1/8 of its size, which is cheaper, if `side` allows it.

    `side` is the shorter side of the box that becomes `size` pixels wide. Returns 1, 2, 4 or 8.
    """
    shrink = next((scale for scale in (8, 4, 2) if scale * size <= side), 1)
    width, height = (length // shrink for length in image.size)
    return 1 if image.draft(None, (width, height)) is None else shrink


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
