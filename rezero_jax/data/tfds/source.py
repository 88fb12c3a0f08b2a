"""A split of a prepared TFDS data set, read without TensorFlow."""

from collections.abc import Mapping, Sequence
from typing import Any

from rezero_jax.errors import UserError


class TfdsSource:
    """The examples of a split; see stream.DataSource. Reading damaged files raises UserError.

    Images stay PNG or JPEG bytes: Pillow decodes them, whatever else is installed, so that pixels
    never depend on the machine.
    """

    def __init__(self, builder: Any, split: str) -> None:
        import tensorflow_datasets as tfds

        keep_bytes = {"image": tfds.decode.SkipDecoding()}
        decoders = keep_bytes if "image" in builder.info.features else None
        self._source = builder.as_data_source(split, decoders=decoders)

    def __len__(self) -> int:
        return len(self._source)

    def __getitems__(self, keys: Sequence[int]) -> list[Mapping[str, Any]]:
        try:
            return self._source.__getitems__(list(keys))
        except RuntimeError as error:  # array_record checks a hash of every chunk
            info = self._source.dataset_info
            raise UserError(
                f'data set "{info.name}" in {info.data_dir} is damaged ({error}); delete that '
                "folder to have the data set prepared again"
            ) from error


def check_files(builder: Any) -> None:
    """Checks that the files of a prepared data set can be read, all open at once.

    Raises:
      UserError: one is missing or of another format, or the system allows too few open files.
    """
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise UserError(
            f'data set "{builder.name}" in {builder.data_dir} is in {file_format} form, which only '
            "TensorFlow reads; set TFDS_DATA_DIR or --config.data.dir to another folder, where it "
            "can be prepared as array_record"
        )
    paths = [path for split in builder.info.splits.values() for path in split.filepaths]
    for path in paths:
        if not path.exists():
            raise UserError(
                f'data set "{builder.name}" is incomplete: {path} is missing; copy that file '
                "there, or delete its folder to have the data set prepared again"
            )
    allow_open_files(len(paths))


def allow_open_files(count: int) -> None:
    """Lets this process hold `count` files open besides its own, as readers of array_record do.

    ImageNet has 1,088 files; most systems allow a process 1,024 unless it asks for more. Raises
    UserError where it may not.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UserError(
            f"the data set needs {wanted} open files and the system allows {hard}; raise the hard "
            f"limit (ulimit -Hn) to at least {wanted}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
