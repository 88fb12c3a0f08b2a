"""enwik8, the first 100,000,000 bytes of an English Wikipedia dump of 2006, as a TFDS data set.

TFDS has no builder for it, so this is one, with the usual split: the first 90 % of the bytes to
train, the next 5 % to validate and the last 5 % to test. Importing this module registers it.
"""

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.checksums import UrlInfo

from rezero_jax.data.tfds.prepare import prepared_builder
from rezero_jax.data.tfds.source import TfdsSource
from rezero_jax.errors import UserError

URL = "http://mattmahoney.net/dc/enwik8.zip"


class Enwik8(tfds.core.GeneratorBasedBuilder):
    """Each split in chunks of CHUNK bytes, in order: {"text": uint8 (up to CHUNK,)}.

    The file is downloaded, unless <data_dir>/downloads/manual holds enwik8 or enwik8.zip already.

    Raises:
      UserError: what was found is not enwik8, byte for byte.
    """

    VERSION = tfds.core.Version("1.0.0")
    # In place of a file checksums.tsv: size and SHA-256 of the archive, which TFDS checks.
    url_infos: ClassVar[dict[str, UrlInfo]] = {
        URL: UrlInfo(
            tfds.core.utils.Size(36_445_475),
            "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
            "enwik8.zip",
        )
    }
    # Of the file in it, as http://mattmahoney.net/dc/textdata.html gives it.
    MD5 = "a1fa5ffddb56f4953e226637dabbb36a"
    SIZES: ClassVar[dict[str, int]] = {
        "train": 90_000_000,
        "validation": 5_000_000,
        "test": 5_000_000,
    }
    CHUNK = 1_000_000

    def _info(self) -> Any:
        text = tfds.features.Tensor(shape=(None,), dtype=np.uint8, encoding="bytes")
        return tfds.core.DatasetInfo(
            builder=self,
            description="The first 100,000,000 bytes of the English Wikipedia of March 3, 2006.",
            features=tfds.features.FeaturesDict({"text": text}),
            homepage="http://mattmahoney.net/dc/textdata.html",
            disable_shuffling=True,  # the chunks make sense in their order only
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
        ends = np.cumsum(list(self.SIZES.values()))
        parts = map(self._generate_examples, np.split(self._text(dl_manager), ends[:-1]))
        return dict(zip(self.SIZES, parts, strict=True))

    def _generate_examples(self, text: np.ndarray) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for number, start in enumerate(range(0, len(text), self.CHUNK)):
            yield number, {"text": text[start : start + self.CHUNK]}

    def _text(self, dl_manager: Any) -> np.ndarray:
        """All bytes, uint8 (sum of SIZES,), verified."""
        manual = Path(self.data_dir_root) / "downloads" / "manual"
        given = (path for path in (manual / "enwik8", manual / "enwik8.zip") if path.exists())
        path = next(given, None) or Path(dl_manager.download(URL))
        again = "delete that file to have it downloaded again"
        if path.name == "enwik8":
            content = path.read_bytes()
        else:
            try:
                with zipfile.ZipFile(path) as archive:
                    content = archive.read("enwik8")
            except (zipfile.BadZipFile, KeyError) as error:
                raise UserError(
                    f"{path} is no archive of enwik8 ({error.args[0]}); {again}"
                ) from error
        size = sum(self.SIZES.values())
        if len(content) != size:
            raise UserError(
                f"enwik8 has {size} bytes and the one in {path} has {len(content)}; {again}"
            )
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != self.MD5:
            raise UserError(
                f"{path} does not hold enwik8, whose MD5 checksum is {self.MD5}; {again}"
            )
        return np.frombuffer(content, np.uint8)


def enwik8_bytes(split: str, data_dir: str | None = None) -> np.ndarray:
    """The bytes of "train", "validation" or "test" in order, uint8 (90,000,000,) or (5,000,000,).

    See prepare.prepared_builder for data_dir and errors.
    """
    source = TfdsSource(prepared_builder("enwik8", data_dir), split)
    chunks = source.__getitems__(range(len(source)))
    return np.concatenate([chunk["text"] for chunk in chunks])
