"""The user's own images: kinds of files, splits, damaged files, the cache, and a run on them."""

import dataclasses
import io
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rezero_jax import export
from rezero_jax.analysis.__main__ import main as analyse
from rezero_jax.data import ResidentSplit, datasets
from rezero_jax.data.images import image_files
from rezero_jax.data.pixels import Decode
from rezero_jax.errors import UserError
from rezero_jax.runs.folder import recorded_data
from rezero_jax.training.load import load_model
from rezero_jax.training.loop import evaluate, train
from tests.data import load, section
from tests.families import FAMILIES

RNG = np.random.default_rng(0)
CLASSES = ("ant", "bee", "cow")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def picture(mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    pixels = RNG.integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with 20 images of each class."""
    for name in CLASSES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(20):
            # Not compressed, so that all files have one length.
            content = encoded(picture(), compress_level=0)
            (tmp_path / "photos" / name / f"{number:02d}.png").write_bytes(content)
    return tmp_path / "photos"


def dataset(path: Path, **fields: Any) -> Any:
    return load("images", path=str(path), **fields)


def everything(path: Path | None, **fields: Any) -> None:
    """Loads a data set and reads all training images, as a run does."""
    split = load("images", path=path and str(path), **fields).train
    list(split.batches(lambda step: np.arange(split.size), 0, 1))


def names(path: Path, **fields: Any) -> dict[str, list[str]]:
    """The files of each split."""
    sources, _ = image_files(path, section("images", **fields))
    return {part: [name for name, _ in source.examples] for part, source in sources.items()}


def test_every_kind_of_image_becomes_upright_rgb_of_8_bits():
    rgb, decode = picture(size=(6, 4)), Decode(upright=True)
    array, grey = np.asarray(rgb), np.asarray(rgb.convert("L"))
    deep = (grey.astype(np.uint16) << 8) + 77
    alpha = Image.fromarray(np.dstack([array, np.where(grey > 99, 255, 0).astype(np.uint8)]))
    palette = rgb.quantize(16)
    clear = np.asarray(palette) == 3
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees, clockwise
    three = np.dstack([grey] * 3)
    for content, expected in (
        (encoded(rgb), array),
        (encoded(Image.fromarray(grey)), three),
        (encoded(Image.fromarray(deep)), three),
        (encoded(Image.fromarray(grey > 99)), np.dstack([(grey > 99) * np.uint8(255)] * 3)),
        (encoded(alpha), np.where(grey[..., None] > 99, array, 255)),
        (encoded(palette), np.asarray(palette.convert("RGB"))),
        (
            encoded(palette, transparency=3),
            np.where(clear[..., None], 255, np.asarray(palette.convert("RGB"))),
        ),
        (encoded(rgb, exif=turned), np.rot90(array, -1)),
    ):
        np.testing.assert_array_equal(decode(content), expected)
    for image in (rgb, rgb.convert("L"), rgb.convert("CMYK")):
        for content in (encoded(image, "JPEG", exif=turned), encoded(image, "JPEG", exif=b"Exif")):
            found = decode(content)
            with Image.open(io.BytesIO(content)) as opened:
                plain = np.asarray(opened.convert("RGB"))
            np.testing.assert_array_equal(found, np.rot90(plain, -1 if found.shape[0] == 6 else 0))
    square = Decode(4)(encoded(rgb))
    np.testing.assert_array_equal(square, array[:, 1:5])  # the central square, not resampled
    assert Decode(2)(encoded(rgb)).shape == (2, 2, 3)
    large = Image.fromarray(np.kron(array, np.ones((100, 100, 1), np.uint8)))
    small = [Decode(4)(encoded(large, kind)).astype(int) for kind in ("PNG", "JPEG")]
    np.testing.assert_allclose(*small, atol=16)  # the JPEG is decoded at an eighth


def test_the_split_of_a_file_never_changes_and_the_classes_are_the_folders(photos):
    before = names(photos)
    assert sorted(before["train"] + before["eval"]) == [
        f"{name}/{number:02d}.png" for name in CLASSES for number in range(20)
    ]
    assert 0 < len(before["eval"]) < 20
    for number in range(30):
        (photos / "bee" / f"new{number}.JPG").write_bytes(encoded(picture(), "JPEG"))
    after = names(photos)
    for part, files in before.items():
        assert [name for name in after[part] if "new" not in name] == files
    assert set(after["eval"]) < set(names(photos, eval_fraction=0.5)["eval"])
    loaded = dataset(photos)
    assert (loaded.classes, loaded.num_classes, loaded.example_shape) == (CLASSES, 3, (8, 8, 3))
    for split, files in ((loaded.train, after["train"]), (loaded.eval, after["eval"])):
        for image, label, name in zip(*split.arrays.values(), files, strict=True):
            assert CLASSES[label] == name[:3]
            np.testing.assert_array_equal(image, Decode()(str(photos / name)))
    streamed = dataset(photos, stream=True).train
    expected = loaded.train.arrays
    for name, values in streamed.fetch(np.arange(streamed.size)).items():
        np.testing.assert_array_equal(values, expected[name])


def test_folders_may_name_the_splits_and_may_be_links(photos, tmp_path, caplog):
    for part in ("Train", "val", "test"):
        (tmp_path / "data" / part).mkdir(parents=True)
        for name in CLASSES[: 3 if part == "Train" else 2]:
            (tmp_path / "data" / part / name).symlink_to(photos / name)
    (photos / "bee" / "again").symlink_to(photos / "bee")  # a cycle
    found = names(tmp_path / "data")
    assert {part: len(files) for part, files in found.items()} == {"train": 60, "validation": 40}
    assert names(tmp_path / "data", eval_split="test").keys() == {"train", "test"}
    assert not caplog.messages
    (tmp_path / "data" / "notes").mkdir()
    shutil.rmtree(tmp_path / "data" / "val")
    assert names(tmp_path / "data").keys() == {"train", "test"}
    assert re.search(r"/notes, .* split", caplog.messages[0])


def test_a_path_that_is_no_data_set_of_images_is_named(photos, tmp_path):
    def refused(path: Path | None, words: str, **fields: Any) -> None:
        for stream in (False, True):
            with pytest.raises(UserError, match=words):
                everything(path, stream=stream, **fields)

    os.mkfifo(tmp_path / "pipe.npz")
    refused(None, r"set --config\.data\.path")
    refused(tmp_path / "photo", "photo .*; did you mean .*photos")
    refused(photos / "ant/00.png", r"00\.png is not a folder")
    refused(tmp_path / "pipe.npz", r"pipe\.npz is not a folder")
    refused(photos / "ant", "ant has 0 folders of classes")
    refused(tmp_path / "photos" / "..", "1 folders? of classes; .* name the folder")
    refused(photos, r"data\.eval_fraction=1", eval_fraction=1.0)
    refused(photos, r'data\.eval_split "dev"', eval_split="dev")
    (photos / "cow" / "wide.png").write_bytes(encoded(picture(size=(9, 8))))
    refused(photos, r"cow/wide.png .*images/train.* uint8 \(8, 9, 3\)")
    (photos / "dog").mkdir()
    refused(photos, "dog has no PNG or JPEG")
    for part, name in itertools.product(("train", "training", "val"), ("ant", "bee")):
        shutil.copytree(photos / name, tmp_path / "split" / part / name)
    refused(tmp_path / "split", "both train and training")
    shutil.rmtree(tmp_path / "split" / "training")
    (tmp_path / "split/val/ant").rename(tmp_path / "split/val/dog")
    refused(tmp_path / "split", r"val/dog .*training class .*ant")


HUGE = encoded(Image.new("1", (30_000, 30_000)))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (encoded(picture(size=(64, 64)), "JPEG")[:-400], "truncated"),
        (encoded(picture(size=(64, 64)))[:-400], "truncated|broken"),
        (b"", "cannot be decoded as PNG or JPEG"),
        (EPS, "cannot be decoded as PNG or JPEG"),
        (encoded(picture(), "GIF"), "cannot be decoded as PNG or JPEG"),
        (HUGE, "exceeds limit|30000 x 30000 pixels; give at most"),
    ],
    ids=["jpeg", "png", "empty", "eps", "gif", "bomb"],
)
def test_a_damaged_image_is_named_with_its_split(content, words, photos):
    (photos / "bee" / "\x1b[2J.jpg").write_bytes(content)
    for stream in (False, True):
        with pytest.raises(UserError, match=words) as info:
            everything(photos, stream=stream)
        assert re.match(r'bee/\\x1b\[2J.jpg of data set "images/train" ', str(info.value))
        assert str(info.value).isprintable()


def test_other_files_are_left_out_with_a_warning(photos, caplog):
    expected = names(photos)
    os.mkfifo(photos / "ant" / "pipe.png")
    (photos / "ant" / "broken\x1b.png").symlink_to("nowhere")
    (photos / "bee" / "a.webp").touch()
    (photos / ".hidden").mkdir()
    (photos / "list.txt").touch()
    assert not caplog.messages
    assert names(photos) == expected
    text = "\n".join(caplog.messages)
    assert re.search(r"no PNG or JPEG images of a class: 2, such as .*(list\.txt|a\.webp)", text)
    assert re.search(r"no files: 2, such as .*(pipe|broken\\x1b)\.png", text)


def test_images_are_decoded_once_and_cached_by_their_content(photos, cache, monkeypatch, caplog):
    def images() -> np.ndarray:
        return dataset(photos).train.arrays["image"]

    first = images()
    assert len(list(cache.rglob("*.npz"))) == 2
    decoded = []
    real = datasets.Decode.__call__
    monkeypatch.setattr(Decode, "__call__", lambda *a: decoded.append(a) or real(*a))
    np.testing.assert_array_equal(images(), first)
    assert len(decoded) == 1  # for the shape
    for path in photos.rglob("*.png"):  # other content of the same length
        size = path.stat().st_size
        inverted = Image.fromarray(255 - np.asarray(Image.open(path)))
        path.write_bytes(encoded(inverted, compress_level=0))
        assert path.stat().st_size == size
    np.testing.assert_array_equal(images(), 255 - first)
    assert dataset(photos, image_size=4).example_shape == (4, 4, 3)
    for path in cache.rglob("*.npz"):  # another data set's
        np.savez(path, image=np.zeros((1, 8, 8, 3), np.uint8), label=np.zeros(1, np.int32))
    np.testing.assert_array_equal(images(), 255 - first)
    assert "images of other shapes" in caplog.text


IMAGE = RNG.integers(0, 256, (50, 6, 5), np.uint8)
LABEL = np.arange(50) % 4


def test_arrays_are_a_data_set(tmp_path):
    path, colour = tmp_path / "data.npz", RNG.integers(0, 256, (7, 6, 5, 3), np.uint8)
    np.savez(path, image=IMAGE, label=LABEL)
    whole = dataset(path)
    assert (whole.example_shape, whole.classes) == ((6, 5, 1), ("0", "1", "2", "3"))
    assert whole.train.size + whole.eval.size == 50
    held = {image.tobytes() for image in whole.eval.arrays["image"]}
    assert 0 < len(held) < 50
    np.savez(path, image=IMAGE[:30], label=LABEL[:30])  # without changes of the split
    assert {image.tobytes() for image in dataset(path).eval.arrays["image"]} < held
    test = {"x_test": IMAGE[:9], "y_test": LABEL[:9, None], "classes": [*"abcd"]}
    np.savez_compressed(path, x_train=IMAGE, y_train=LABEL, **test)
    given = dataset(path)
    assert (given.classes, given.train.size, given.eval.size) == (("a", "b", "c", "d"), 50, 9)
    np.testing.assert_array_equal(given.train.arrays["image"][..., 0], IMAGE)
    np.testing.assert_array_equal(given.train.arrays["label"], LABEL)
    train = {"train_images": colour, "train_labels": LABEL[:7]}
    np.savez(path, **train, val_images=colour, val_labels=LABEL[:7])
    assert dataset(path).example_shape == (6, 5, 3)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"image": IMAGE}, "label of the train split"),
        ({"image": IMAGE / 255, "label": LABEL}, "float64 .*; give uint8"),
        ({"image": IMAGE[:, None], "label": LABEL}, r"uint8 \(50, 1, 6, 5\)"),  # channels first
        ({"image": IMAGE[:0], "label": LABEL[:0]}, r"uint8 \(0, 6, 5\)"),
        ({"image": IMAGE, "label": LABEL[:9]}, r"int64 \(9,\)"),
        ({"image": IMAGE, "label": np.eye(50)}, "float64"),
        ({"image": IMAGE, "label": LABEL - 1}, r"0 \.\. 99999"),
        ({"image": IMAGE, "label": LABEL + 2**40}, r"0 \.\. 99999"),
        ({"pictures": IMAGE, "label": LABEL}, "pictures"),
        ({"image": np.array([{}]), "label": LABEL}, r"\.npz file .*pickle"),
        ({"x_train": IMAGE, "y_train": LABEL, "x_val": IMAGE}, "label of the validation split"),
        (b"PK\3\4" + bytes(100), r"\.npz file"),
    ],
)
def test_arrays_of_another_form_are_refused(arrays, words, tmp_path):
    path = tmp_path / "data.npz"
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    else:
        np.savez(path, **arrays)
    with pytest.raises(UserError, match=words):
        dataset(path)


def test_data_larger_than_memory_is_refused_before_it_is_read(photos, tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "data.npz", image=np.zeros((9, 99, 99), np.uint8), label=[0] * 9)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    for path in (photos, tmp_path / "data.npz"):
        with pytest.raises(UserError, match=r"memory; .* data\.stream=True"):
            dataset(path)
    assert dataset(photos, stream=True).train.size > 40


def test_a_run_is_resumed_evaluated_analysed_and_exported_on_its_own_data(photos, tmp_path, capsys):
    config = FAMILIES["mlp"].load_config(**{"data.name": "images", "data.path": str(photos)})
    run = tmp_path / "run"
    train(config, run)
    record = recorded_data(run)
    assert (record["classes"], record["num_classes"]) == (list(CLASSES), 3)
    assert record["train"]["examples"] + record["eval"]["examples"] == 60
    assert record["mean"] == [0.5] * 3
    shutil.move(photos, tmp_path / "moved")
    config.data.path = str(tmp_path / "moved")
    expected = evaluate(config, run)
    shutil.move(tmp_path / "moved", photos)
    # A path that a run recorded is not opened.
    assert analyse([str(run)]) == 2
    assert "--data=PATH" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"data\.path='.*photos'.*named again"):
        load_model(run)
    assert load_model(run, source=str(photos))[2].dataset.record()["train"] == record["train"]
    export.export(str(run), str(tmp_path / "out"))  # which needs no data
    described = json.loads((tmp_path / "out" / "config.json").read_text())["data"]
    assert (described["name"], described["classes"]) == ("images", list(CLASSES))
    assert "| classes | ant, bee, cow |" in (tmp_path / "out" / "README.md").read_text()

    config.data.path = str(photos)
    assert evaluate(config, run) == expected
    for change, use, words in (
        (lambda: (photos / "ant" / "new.png").write_bytes(encoded(picture())), train, "examples"),
        (lambda: (photos / "ant" / "new.png").rename(photos / "ant" / "00.png"), train, "content"),
        (lambda: (photos / "ant").rename(photos / "asp"), evaluate, "classes: .*ant.* -> .*asp"),
    ):
        change()
        with pytest.raises(UserError, match=f"holds a run on other data .*{words}"):
            use(config, run)


def test_a_run_on_a_data_set_that_was_passed_needs_it_again(tmp_path):
    digits = load("digits")
    inverted = ResidentSplit({**digits.eval.arrays, "image": 255 - digits.eval.arrays["image"]})
    mine = dataclasses.replace(digits, name="mine", eval=inverted)
    config = FAMILIES["mlp"].load_config()
    final = train(config, tmp_path / "run", mine)
    assert evaluate(config, tmp_path / "run", mine)["eval/loss"] == final["eval/loss"]
    for use in (train, evaluate, lambda config, run: load_model(run)):
        with pytest.raises(UserError, match=r'data set "mine", which was passed to train\(\)'):
            use(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"other data .*eval\.content"):
        evaluate(config, tmp_path / "run", dataclasses.replace(digits, name="mine"))
    assert load_model(tmp_path / "run", dataset=mine)[2].dataset is mine
    export.export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert '"name": "mine"' in (tmp_path / "out" / "config.json").read_text()
