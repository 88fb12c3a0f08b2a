"""Files of a run, on a disk or in a bucket: each is whole or absent.

A bucket is whatever etils.epath names by a scheme, such as gs://bucket/run. Its objects are written
whole and never grow; it has no folders, no renames and no locks.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from rezero_jax.errors import UserError, first_line

AnyPath = str | os.PathLike[str]

# gcsfs asks for each bucket whether it has real folders, by gRPC and at some length if it may not
# know, and logs a traceback of what it then raises.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
for _protocol in ("gcs", "gs"):
    fsspec.register_implementation(
        _protocol,
        "rezero_jax.runs.cloud_storage.CloudStorage",
        clobber=True,
        errtxt="Please install gcsfs",
    )
# TensorStore writes beside fsspec, whose listings would not show it.
for _protocol in ("gcs", "gs", "s3"):
    fsspec.config.conf.setdefault(_protocol, {})["use_listings_cache"] = False


def is_bucket(path: AnyPath) -> bool:
    """Whether a path lies in a bucket."""
    return "://" in os.fspath(path)


def folder_of(path: AnyPath) -> epath.Path:
    """The path of a run's folder.

    Raises:
      UserError: it lies in a bucket that does not exist, cannot be reached or refuses.
    """
    if not is_bucket(path):
        return epath.Path(path)
    try:
        if not ((epath.Path(path) / "config.json").exists() or bucket_of(path).exists()):
            raise FileNotFoundError("no such bucket")
    except Exception as error:  # whatever the library of the storage raises
        raise unreachable(path, error) from error
    return epath.Path(path)


def absolute(path: epath.Path) -> epath.Path:
    """The path from the root of the disk; one in a bucket is that always."""
    return path if is_bucket(path) else path.absolute()


def bucket_of(path: AnyPath) -> epath.Path:
    """The bucket that a path lies in."""
    scheme, _, rest = os.fspath(path).partition("://")
    return epath.Path(f"{scheme}://{rest.split('/')[0]}")


def unreachable(path: AnyPath, error: Exception) -> UserError:
    """The error for a bucket that refuses."""
    text = str(error)
    if isinstance(error, FileNotFoundError):
        advice = "there is no such bucket; make it, or choose another --workdir"
    elif "Forbidden" in text or "403" in text:
        advice = "no permission; give this account roles/storage.admin on the bucket"
    elif any(word in text for word in ("401", "Credentials", "credentials")):
        advice = "no valid credentials; run `gcloud auth application-default login`"
    else:
        advice = f"{first_line(error)}; check the connection"
    return UserError(f"cannot use {bucket_of(path)}: {advice}")


def is_of_storage(error: Exception) -> bool:
    """Whether a disk or a bucket failed: each library of buckets has errors of its own."""
    libraries = ("aiohttp", "botocore", "gcsfs", "google")
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in libraries


def is_outage(path: AnyPath, error: BaseException | None) -> bool:
    """Whether the bucket that `path` lies in did not answer, which tells nothing of its content.

    An error that was raised from another is an outage if that is.
    """
    if not is_bucket(path):
        return False
    from rezero_jax.runs.cloud_storage import patience  # gcsfs: only for buckets

    while error is not None:
        # TensorStore's errors have no type of their own.
        if patience(error) > 0 or str(error).startswith(("UNAVAILABLE", "DEADLINE_EXCEEDED")):
            return True
        error = error.__cause__
    return False


def read_json(path: AnyPath) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: the file is not a JSON object, or is unreadable.
    """
    try:
        content = json.loads(epath.Path(path).read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is broken ({first_line(error)}); restore it from a copy, or choose another "
            "run folder"
        ) from None
    return content


def write_json(path: AnyPath, content: Any) -> None:
    """Writes a file that is either the old one or the new one, never half of it."""
    replace_file(path, json.dumps(content, indent=2) + "\n")


def replace_file(path: AnyPath, text: str) -> None:
    """Replaces a file in one step: a reader finds the old text or the new, whole."""
    if is_bucket(path):
        epath.Path(path).write_text(text)
        return
    temporary = Path(path).with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def move_folder(source: epath.Path, target: epath.Path) -> None:
    """Moves a folder to a place where there is none, or replaces what is there."""
    target.rmtree(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_bucket(source):
        copy_folder(source, target)
        source.rmtree()
    else:
        shutil.move(source, target)


def copy_folder(source: epath.Path, target: epath.Path) -> None:
    """Copies a folder with all that is in it, between a disk and a bucket too."""
    for path in source.iterdir():
        if path.is_dir():
            copy_folder(path, target / path.name)
        else:
            target.mkdir(parents=True, exist_ok=True)
            (target / path.name).write_bytes(path.read_bytes())
