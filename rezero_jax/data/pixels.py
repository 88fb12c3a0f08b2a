"""Decodes PNG and JPEG images, which may be a stranger's, to pixels of one shape."""

import contextlib
import dataclasses
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps

from rezero_jax.errors import UserError, first_line

FORMATS = ("PNG", "JPEG")  # for some of its other formats, Pillow runs programs
MOST_PIXELS = 89_000_000  # Pillow takes more for a decompression bomb


@contextlib.contextmanager
def opened(image: bytes | str) -> Iterator[Image.Image]:
    """Opens an image, the bytes or the path of a file; nothing else should be done inside.

    Raises:
      UserError: the image cannot be decoded or has more than MOST_PIXELS; its subject is missing.
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
