"""What a disk, or a hand, can do to a checkpoint; and what the run did with it."""

import random
import shutil
from collections.abc import Callable
from typing import Any

from etils import epath

from rezero_jax.runs.files import is_bucket
from rezero_jax.runs.folder import saved_steps
from rezero_jax.runs.moving import copy_folder
from tests.faults.runs import UNAVAILABLE, Said, Task

RECORD = "record/metadata"

# Takes the checkpoint's folder, the folder of another checkpoint, and what draws; returns the
# changed files in words.
Damage = Callable[[epath.Path, epath.Path, random.Random], str]


def folders(folder: epath.Path) -> list[epath.Path]:
    """All folders below a folder."""
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    return found + [path for inner in found for path in folders(inner)]


def files(folder: epath.Path, under: str = "") -> list[epath.Path]:
    """Files with content, in an order that does not depend on their random names."""
    top = folder / under
    found = [path for place in (top, *folders(top)) for path in place.iterdir() if path.is_file()]
    sizes = {path: len(path.read_bytes()) for path in found}
    return sorted(filter(sizes.get, found), key=lambda path: (path.parent, sizes[path]))


def pick(folder: epath.Path, rng: random.Random) -> epath.Path:
    """A file: half of the time with equal probabilities, else weighted by size."""
    found = files(folder)
    weights = [len(path.read_bytes()) for path in found] if rng.random() < 0.5 else None
    return rng.choices(found, weights)[0]


def _rewrite(folder: epath.Path, path: epath.Path, data: bytes) -> str:
    before = path.read_bytes()
    path.write_bytes(data)
    pairs = enumerate(zip(before, data, strict=False))
    first = next((i for i, (a, b) in pairs if a != b), "the end")
    return f"{path.relative_to(folder)}: {len(before)} to {len(data)} bytes, changed from {first}"


def truncated_file(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    path = pick(folder, rng)
    data = path.read_bytes()
    return _rewrite(folder, path, data[: rng.choice((0, rng.randrange(len(data))))])


def deleted_file(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    path = pick(folder, rng)
    path.unlink()
    return f"{path.relative_to(folder)}"


def deleted_folder(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folders(folder)))
    path.rmtree()
    return f"{path.relative_to(folder)}/"


def appended_bytes(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    path = pick(folder, rng)
    return _rewrite(folder, path, path.read_bytes() + rng.randbytes(rng.randint(1, 100)))


def zeroed_block(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    path = rng.choice([path for path in files(folder) if any(path.read_bytes())])
    data = path.read_bytes()
    at = rng.choice([i for i, byte in enumerate(data) if byte])
    zeros = bytes(min(64, len(data) - at))
    return _rewrite(folder, path, data[:at] + zeros + data[at + len(zeros) :])


def _flip_bit(folder: epath.Path, path: epath.Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return _rewrite(folder, path, bytes(data))


def flipped_bit_of_arrays(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    largest = max(files(folder, "state"), key=lambda path: len(path.read_bytes()))
    data = [path for path in files(folder, "state") if path.parent.name == "d"]
    return _flip_bit(folder, rng.choice([*data, largest]), rng)


def flipped_bit_of_record(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    return _flip_bit(folder, folder / RECORD, rng)


def changed_digit_of_progress(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    """The worst that one bit of the record can do: it can be read, and is another number."""
    data = bytearray((folder / RECORD).read_bytes())
    end = data.index(b'"fingerprint"')
    at = rng.choice([i for i in range(end) if chr(data[i]).isdigit()])
    data[at] ^= 1
    return _rewrite(folder, folder / RECORD, bytes(data))


def file_of_another_checkpoint(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    """The file of the same name if there is one, else another file of the same folder."""
    path = pick(folder, rng)
    where = path.parent.relative_to(folder)
    theirs = [p for p in files(other, str(where)) if p.read_bytes() != path.read_bytes()]
    theirs = [p for p in theirs if p.name == path.name] or theirs or files(other)
    return _rewrite(folder, path, rng.choice(theirs).read_bytes())


def _replace_folder(folder: epath.Path, other: epath.Path, name: str) -> str:
    (folder / name).rmtree()
    copy_folder(other / name, folder / name)
    return f"{name}/"


def state_of_another_checkpoint(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    return _replace_folder(folder, other, "state")


def record_of_another_checkpoint(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    return _replace_folder(folder, other, "record")


def half_written(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    """As if the process had been killed before it wrote the last files."""
    last = [
        ["_CHECKPOINT_METADATA"],
        ["_CHECKPOINT_METADATA", "commit_success.txt"],
        ["_CHECKPOINT_METADATA", "commit_success.txt", "state/_METADATA", "state/_sharding"],
        ["state/_METADATA"],
        ["state/manifest.ocdbt", "state/_METADATA", "_CHECKPOINT_METADATA"],
        [RECORD, "_CHECKPOINT_METADATA"],
    ]
    gone = [name for name in rng.choice(last) if (folder / name).exists()]
    for name in gone:
        (folder / name).unlink()
    return ", ".join(gone)


KINDS: tuple[Damage, ...] = (
    truncated_file,
    deleted_file,
    deleted_folder,
    appended_bytes,
    zeroed_block,
    flipped_bit_of_arrays,
    flipped_bit_of_record,
    changed_digit_of_progress,
    file_of_another_checkpoint,
    state_of_another_checkpoint,
    record_of_another_checkpoint,
    half_written,
)


def name_of(kind: Damage) -> str:
    """The name of a damage in the report."""
    return kind.__name__.replace("_", " ")


def outcome_of(said: Said, step: int, before: int, is_finished: bool) -> str:
    """What a run that succeeded did with its newest checkpoint, of `step`; "" is a failure."""
    if said.resumed_at == step and not said.damaged:
        return "harmless"  # if the run ends with the same bits
    if said.resumed_at == before and said.damaged == [step]:
        return "set aside"
    return "taken as unfinished" if said.resumed_at == before and not is_finished else ""


def damage_run(task: Task, kind: Damage) -> list[dict[str, Any]]:
    """Damages the newest checkpoint of an unfinished copy of the run, and lets it go on."""
    home, family = task.home, task.reference.family
    home.mkdir(parents=True)
    workdir = family.folder(home) / "run"
    copy_folder(task.reference.workdir, workdir)
    (workdir / "final.json").unlink()
    steps = saved_steps(workdir)
    at = task.rng.randrange(1, len(steps))
    for later in steps[at + 1 :]:
        (workdir / "checkpoints" / str(later)).rmtree()
    step, before = steps[at], steps[at - 1]
    folder = workdir / "checkpoints" / str(step)
    what = kind(folder, folder.parent / str(before), task.rng)
    # In a bucket, as after a kill; on a disk the folder would have another name.
    is_finished = not is_bucket(folder) or (folder / "commit_success.txt").exists()

    said, outages = Said(""), 0
    while True:
        process = task.start(workdir, home / f"log{outages}")
        code = process.wait()
        # Of several starts, the first to get that far reports what became of the checkpoint.
        said = said if said.resumed_at is not None else Said(said.text + process.said.text)
        if code != UNAVAILABLE or outages == 10:
            break
        outages += 1
    outcome = "" if code else outcome_of(said, step, before, is_finished)
    problems = task.differences(workdir) if outcome else [f"status {code}, after {said.resumed_at}"]
    if outcome == "set aside" and not (workdir / "damaged" / str(step)).is_dir():
        problems.append(f"damaged/{step} is missing")
    if not problems:
        workdir.rmtree()
        shutil.rmtree(home)
    result = {"family": family.name, "kind": name_of(kind), "files": what, "outcome": outcome}
    return [result | {"step": step, "problems": problems, "outages": outages}]
