"""What a disk, or a hand, can do to a checkpoint; and what the run did with it."""

import dataclasses
import random
import shutil
from collections.abc import Callable

from etils import epath

from rezero_jax.config import load_config
from rezero_jax.runs.files import is_bucket
from rezero_jax.runs.folder import saved_steps
from rezero_jax.runs.moving import copy_folder
from tests.faults.runs import ROOT, UNAVAILABLE, Said, Task

FOUND, HARMLESS, UNFINISHED = "found and set aside", "harmless", "taken as unfinished"
LOADED, CRASHED, PASSED_OVER = "LOADED", "CRASHED", "PASSED OVER SILENTLY"
GOOD = (FOUND, HARMLESS, UNFINISHED)
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
    return sorted(
        (path for path in found if sizes[path]), key=lambda path: (path.parent, sizes[path])
    )


def pick(folder: epath.Path, rng: random.Random) -> epath.Path:
    """A file: half of the time with equal probabilities, else weighted by size."""
    found = files(folder)
    weights = [len(path.read_bytes()) for path in found] if rng.random() < 0.5 else None
    return rng.choices(found, weights)[0]


def _rewrite(folder: epath.Path, path: epath.Path, data: bytes) -> str:
    before = path.read_bytes()
    path.write_bytes(data)
    first = next(
        (i for i, (a, b) in enumerate(zip(before, data, strict=False)) if a != b), "the end"
    )
    return f"{path.relative_to(folder)}: {len(before)} to {len(data)} bytes, changed from {first}"


def truncated_file(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    path = pick(folder, rng)
    data = path.read_bytes()
    return _rewrite(folder, path, data[: rng.randrange(1, len(data)) if len(data) > 1 else 0])


def emptied_file(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    return _rewrite(folder, pick(folder, rng), b"")


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


def flipped_bit(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    return _flip_bit(folder, pick(folder, rng), rng)


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


def swapped_files(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    a = pick(folder, rng)
    b = rng.choice([path for path in files(folder) if path.read_bytes() != a.read_bytes()])
    of_a, of_b = a.read_bytes(), b.read_bytes()
    return f"{_rewrite(folder, a, of_b)}; {_rewrite(folder, b, of_a)}"


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
    emptied_file,
    deleted_file,
    deleted_folder,
    appended_bytes,
    zeroed_block,
    flipped_bit,
    flipped_bit_of_arrays,
    flipped_bit_of_record,
    changed_digit_of_progress,
    swapped_files,
    file_of_another_checkpoint,
    state_of_another_checkpoint,
    record_of_another_checkpoint,
    half_written,
)


def name_of(kind: Damage) -> str:
    """The name of a damage in the table."""
    return kind.__name__.replace("_", " ")


@dataclasses.dataclass
class DamagedRun:
    """A damaged checkpoint and what became of it."""

    family: str
    kind: str
    what: str  # the changed files
    step: int  # step of the checkpoint, the newest one
    outcome: str  # one of GOOD, or LOADED, CRASHED or PASSED_OVER
    problems: list[str]  # empty if nothing was lost
    outages: int  # see `kill.KilledRun`


def classify(
    said: Said,
    code: int,
    step: int,
    before: int,
    is_as_saved: Callable[[], bool],
    is_finished: bool = True,
) -> str:
    """What a run did with its newest checkpoint."""
    if code:
        return CRASHED
    if said.resumed_at == step:
        return HARMLESS if is_as_saved() and not said.damaged else LOADED
    if said.resumed_at == before and said.damaged == [step]:
        return FOUND
    if said.resumed_at == before and not is_finished and not said.damaged:
        return UNFINISHED
    return PASSED_OVER


def damage_run(task: Task, kind: Damage) -> list[DamagedRun]:
    """Damages the newest checkpoint of an unfinished copy of the run, and lets it go on."""
    reference, home, family = task.reference, task.home, task.reference.family
    home.mkdir(parents=True)
    workdir = family.folder(home) / "run"
    copy_folder(reference.workdir, workdir)
    (workdir / "final.json").unlink()
    steps = saved_steps(workdir)
    at = task.rng.randrange(1, len(steps))
    for later in steps[at + 1 :]:
        (workdir / "checkpoints" / str(later)).rmtree()
    step, before = steps[at], steps[at - 1]
    folder = workdir / "checkpoints" / str(step)
    what = kind(folder, folder.parent / str(before), task.rng)
    evidence = epath.Path(home) / "evidence" / str(step)
    copy_folder(folder, evidence)
    config = load_config(str(ROOT / family.config), [*family.settings, "mesh.data=1"])

    def is_as_saved() -> bool:
        sound = reference.workdir / "checkpoints" / str(step)
        return task.judge.are_restored_alike(family.name, config, evidence, sound)

    said, outages = Said(""), 0
    while True:
        process = task.start(workdir, home / f"log{outages}")
        code = process.wait()
        # Of several starts, the first to get that far says what became of the checkpoint.
        said = said if said.resumed_at is not None else Said(said.text + process.said.text)
        if code not in UNAVAILABLE or outages == 10:
            break
        outages += 1
    # In a bucket, as after a kill; on a disk the folder would have another name.
    is_finished = not is_bucket(folder) or (evidence / "commit_success.txt").exists()
    outcome = classify(said, code, step, before, is_as_saved, is_finished)
    problems = [] if outcome in GOOD else [outcome]
    if outcome == FOUND and not (workdir / "damaged" / str(step)).is_dir():
        problems.append(f"damaged/{step} is missing")
    if code == 0:
        problems += task.differences(workdir)
    if not problems:
        workdir.rmtree()
        shutil.rmtree(home)
    return [DamagedRun(family.name, name_of(kind), what, step, outcome, problems, outages)]
