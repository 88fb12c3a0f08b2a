"""ImageNet's crops: torchvision's boxes under a triangle filter, by (seed, step, position)."""

import io
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rezero_jax.data import pixels
from rezero_jax.data.order import SplitMix64
from rezero_jax.data.pixels import Crop, random_box

SIZE = 32


def encoded(
    width: int, height: int, mode: str = "RGB", kind: str = "JPEG", noise: int = 40
) -> bytes:
    """An image file, darkest at the left (red) and at the top (green), with noise."""
    x = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    y = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    ramps = np.stack([x, y, (x + y) / 2], axis=-1)
    ramps += np.random.default_rng(0).integers(-noise, noise + 1, ramps.shape)
    buffer = io.BytesIO()
    options = {"quality": 95} if kind == "JPEG" else {}
    image = Image.fromarray(np.clip(ramps, 0, 255).astype(np.uint8))
    image.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


FILES = {
    "landscape": encoded(60, 45),
    "grey": encoded(45, 60, "L"),
    "CMYK": encoded(50, 50, "CMYK"),
    "PNG": encoded(70, 50, kind="PNG"),
    "wide": encoded(300, 20),
    "small": encoded(20, 30),
    "large": encoded(520, 400, noise=0),  # decoded at 1/2, 1/4 or 1/8
}


def torchvision_box(rng: SplitMix64, width: int, height: int) -> tuple[int, ...]:
    """get_params of torchvision 0.20's RandomResizedCrop, with the numbers of `rng`."""
    for _ in range(10):
        target_area = height * width * rng.uniform(0.08, 1.0)
        aspect_ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w = int(np.round(np.sqrt(target_area * aspect_ratio)))
        h = int(np.round(np.sqrt(target_area / aspect_ratio)))
        if 0 < w <= width and 0 < h <= height:
            (i,) = rng.integers(height - h + 1, size=1).tolist()
            (j,) = rng.integers(width - w + 1, size=1).tolist()
            return j, i, j + w, i + h
    in_ratio = width / height
    w, h = width, height
    if in_ratio < 3 / 4:
        h = int(np.round(w / (3 / 4)))
    elif in_ratio > 4 / 3:
        w = int(np.round(h * (4 / 3)))
    i, j = (height - h) // 2, (width - w) // 2
    return j, i, j + w, i + h


def resized(content: bytes, box: tuple[float, ...]) -> np.ndarray:
    """The box of the whole decoded image under a triangle filter, float64 (SIZE, SIZE, 3)."""
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.float64)
    rows, columns = (triangle(pixels.shape[axis], box[1 - axis], box[3 - axis]) for axis in (0, 1))
    return np.stack([rows @ pixels[..., c] @ columns.T for c in range(3)], axis=-1)


def triangle(length: int, start: float, end: float) -> np.ndarray:
    """Weights (SIZE, length) of output pixels spread over start .. end; shrinking widens them."""
    scale = (end - start) / SIZE
    centre = start + (np.arange(SIZE) + 0.5) * scale
    distance = np.abs(np.arange(length) + 0.5 - centre[:, None])
    weights = np.maximum(0, 1 - distance / max(scale, 1))
    return weights / weights.sum(axis=1, keepdims=True)


def test_boxes_never_change():
    for key, box in (  # seed, step, position; see test_data_order.FIRST
        ((5, 0, 0), (313, 123, 479, 260)),
        ((5, 7, 3), (269, 177, 438, 355)),
        ((5, 2**33, 1), (48, 2, 423, 345)),
    ):
        assert random_box(SplitMix64(*key), 500, 400) == box
    for width, height, box in (  # where no box fits
        (3000, 10, (1493, 0, 1506, 10)),
        (10, 3000, (0, 1493, 10, 1506)),
        (1, 1, (0, 0, 1, 1)),
    ):
        assert random_box(SplitMix64(1), width, height) == box
        assert torchvision_box(SplitMix64(1), width, height) == box


@pytest.mark.parametrize("name", list(FILES))
def test_a_crop_is_that_of_the_reference(name):
    content = FILES[name]
    # Pillow rounds after each of two passes; decoding a JPEG small is another filter.
    tolerance = 3 if name == "large" else 1.01
    with Image.open(io.BytesIO(content)) as image:
        size = image.size
        w, h = (37 * side // min(size) for side in size)  # 37 is round(32 * 256 / 224)
        whole = image.convert("RGB").resize((w, h), Image.Resampling.BILINEAR)
    left, top = round((w - SIZE) / 2), round((h - SIZE) / 2)
    central = np.asarray(whole.crop((left, top, left + SIZE, top + SIZE)), int)
    for step in range(8):
        box = torchvision_box(SplitMix64(5, step, 3), *size)
        for crop, expected in ((Crop(SIZE, seed=5), resized(content, box)), (Crop(SIZE), central)):
            actual = crop(content, step, 3)
            assert (actual.shape, actual.dtype) == ((SIZE, SIZE, 3), np.uint8)
            np.testing.assert_allclose(actual, expected, atol=tolerance)


def test_a_jpeg_is_decoded_small_only_where_every_needed_pixel_is_left(monkeypatch):
    decoded = []
    resize = Image.Image.resize

    def spy(image: Image.Image, size: tuple[int, int], *args: Any, box: Any) -> Image.Image:
        decoded.append((image.size, box))
        return resize(image, size, *args, box=box)

    monkeypatch.setattr(Image.Image, "resize", spy)
    monkeypatch.setattr(pixels, "random_box", lambda rng, w, h: (0, 0, w, h))
    for crop, sides in (
        (Crop(64, 0), {40: 1, 127: 1, 128: 2, 511: 4, 512: 8}),
        (Crop(64), {40: 1, 145: 1, 146: 2, 583: 4, 584: 8}),
    ):
        for side, scale in sides.items():
            assert crop(encoded(side, side), 0, 0).shape == (64, 64, 3)
            size, (left, top, right, bottom) = decoded.pop()
            assert size == (math.ceil(side / scale),) * 2
            assert scale == 1 or min(right - left, bottom - top) >= 64
