"""What a disk, or a hand, can do to a checkpoint; and what the run did with it."""

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from etils import epath

from rezero_jax.runs.files import copy_folder, is_bucket
from rezero_jax.runs.folder import saved_steps
from tests.faults.runs import Process, Reference, Said

FOUND, HARMLESS, UNFINISHED = "found and set aside", "harmless", "taken as unfinished"
LOADED, CRASHED, PASSED_OVER = "LOADED", "CRASHED", "PASSED OVER SILENTLY"
GOOD = (FOUND, HARMLESS, UNFINISHED)
OUTCOMES = (*GOOD, LOADED, CRASHED, PASSED_OVER)

# Takes the checkpoint's folder, that of another checkpoint, and what draws; says what it did.
Damage = Callable[[epath.Path, epath.Path, random.Random], str]


def folders(folder: epath.Path) -> list[epath.Path]:
    """The folders in it, and in these."""
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    return found + [path for inner in found for path in folders(inner)]


def files(folder: epath.Path, under: str = "") -> list[epath.Path]:
    """The files with something in them, in an order that their random names have no part in."""
    top = folder / under
    inside = [path for place in (top, *folders(top)) for path in place.iterdir()]
    found = [path for path in inside if path.is_file() and path.stat().length]
    return sorted(found, key=lambda path: (path.parent, path.stat().length))


def pick(folder: epath.Path, rng: random.Random) -> epath.Path:
    """A file: half the time each as likely as any other, else each byte."""
    found = files(folder)
    weights = [path.stat().length for path in found] if rng.random() < 0.5 else None
    return rng.choices(found, weights)[0]


def truncated_file(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    path = pick(folder, rng)
    data = path.read_bytes()
    size = rng.randrange(1, len(data)) if len(data) > 1 else 0
    path.write_bytes(data[:size])
    return f"{path.relative_to(folder)} cut from {len(data)} to {size} bytes"


def emptied_file(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    path = pick(folder, rng)
    path.write_bytes(b"")
    return f"{path.relative_to(folder)} emptied"


def deleted_file(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    path = pick(folder, rng)
    path.unlink()
    return f"{path.relative_to(folder)} deleted"


def deleted_folder(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folders(folder)))
    path.rmtree()
    return f"{path.relative_to(folder)}/ deleted"


def appended_bytes(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    path, count = pick(folder, rng), rng.randint(1, 100)
    path.write_bytes(path.read_bytes() + rng.randbytes(count))
    return f"{count} bytes appended to {path.relative_to(folder)}"


def zeroed_block(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    path = rng.choice([path for path in files(folder) if any(path.read_bytes())])
    data = bytearray(path.read_bytes())
    at = rng.choice([i for i, byte in enumerate(data) if byte])
    end = min(at + 64, len(data))
    data[at:end] = bytes(end - at)
    path.write_bytes(data)
    return f"bytes {at} to {end} of {path.relative_to(folder)} zeroed"


def _flip_bit(folder: epath.Path, path: epath.Path, rng: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at, bit = rng.randrange(len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {at} of {path.relative_to(folder)} flipped"


def flipped_bit(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    return _flip_bit(folder, pick(folder, rng), rng)


def flipped_bit_of_arrays(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    largest = max(files(folder, "state"), key=lambda path: path.stat().length)
    data = [path for path in files(folder, "state") if path.parent.name == "d"]
    return _flip_bit(folder, rng.choice([*data, largest]), rng)


def flipped_bit_of_record(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    return _flip_bit(folder, folder / "record" / "metadata", rng)


def changed_digit_of_progress(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    """The worst that one bit of the record can do: what can be read, and is another number."""
    path = folder / "record" / "metadata"
    text = path.read_text()
    digits = [i for i, char in enumerate(text[: text.index('"fingerprint"')]) if char.isdigit()]
    at = rng.choice(digits)
    path.write_text(text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :])
    return f"digit {text[at]} at byte {at} of record/metadata changed"


def swapped_files(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    a = pick(folder, rng)
    b = rng.choice([path for path in files(folder) if path.read_bytes() != a.read_bytes()])
    of_a, of_b = a.read_bytes(), b.read_bytes()
    a.write_bytes(of_b)
    b.write_bytes(of_a)
    return f"{a.relative_to(folder)} and {b.relative_to(folder)} swapped"


def file_of_another_checkpoint(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    """The file of the same name where there is one, else another of the same folder."""
    path = pick(folder, rng)
    where = path.parent.relative_to(folder)
    theirs = [p for p in files(other, str(where)) if p.read_bytes() != path.read_bytes()]
    theirs = [p for p in theirs if p.name == path.name] or theirs or files(other)
    source = rng.choice(theirs)
    path.write_bytes(source.read_bytes())
    return f"{path.relative_to(folder)} replaced by {source.relative_to(other.parent)}"


def state_of_another_checkpoint(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    (folder / "state").rmtree()
    copy_folder(other / "state", folder / "state")
    return f"state/ replaced by that of {other.name}"


def record_of_another_checkpoint(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    (folder / "record").rmtree()
    copy_folder(other / "record", folder / "record")
    return f"record/ replaced by that of {other.name}"


def half_written(folder: epath.Path, other: epath.Path, rng: random.Random) -> str:
    """As if the process had been killed before it wrote the last files."""
    last = [
        ["_CHECKPOINT_METADATA"],
        ["_CHECKPOINT_METADATA", "commit_success.txt"],
        ["_CHECKPOINT_METADATA", "commit_success.txt", "state/_METADATA", "state/_sharding"],
        ["state/_METADATA"],
        ["state/manifest.ocdbt", "state/_METADATA", "_CHECKPOINT_METADATA"],
        ["record/metadata", "_CHECKPOINT_METADATA"],
    ]
    gone = [name for name in rng.choice(last) if (folder / name).exists()]
    for name in gone:
        (folder / name).unlink()
    return f"{', '.join(gone)} missing"


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
    """What the table calls it."""
    return kind.__name__.replace("_", " ")


@dataclasses.dataclass
class DamagedRun:
    """A damaged checkpoint and what became of it.

    Attributes:
      step: of the checkpoint, the newest one.
      outcome: one of OUTCOMES.
      problems: empty if nothing was lost.
    """

    family: str
    kind: str
    what: str
    step: int
    outcome: str
    problems: list[str]


def classify(
    said: Said,
    code: int,
    step: int,
    before: int,
    is_as_saved: Callable[[], bool],
    is_finished: bool = True,
) -> str:
    """What a run did with its newest checkpoint, of `step`; the one before is of step `before`.

    Args:
      said: the run's output.
      code: its exit status.
      step: of the damaged checkpoint.
      before: of the sound one before it.
      is_as_saved: whether what it is restored to is, to the bit, what was saved.
      is_finished: whether it still has the sign by which its storage knows a finished checkpoint.
    """
    if code or said.has_traceback:
        return CRASHED
    if said.resumed_at == step:
        return HARMLESS if is_as_saved() and not said.damaged else LOADED
    if said.resumed_at == before and said.damaged == [step]:
        return FOUND
    if said.resumed_at == before and not is_finished and not said.damaged:
        return UNFINISHED
    return PASSED_OVER


def damage_run(
    reference: Reference,
    kind: Damage,
    home: Path,
    cache: epath.Path,
    rng: random.Random,
    compare: Callable[[epath.Path, epath.Path], list[str]],
    is_as_saved: Callable[[Reference, epath.Path], bool],
) -> list[DamagedRun]:
    """Damages the newest checkpoint of an unfinished copy of the run, and lets it go on.

    Args:
      reference: the run that nothing stopped.
      kind: one of KINDS.
      home: folder of the run and its output; removed if there are no problems.
      cache: folder of what JAX compiled.
      rng: draws what is damaged.
      compare: what differs between two workdirs.
      is_as_saved: whether a checkpoint's folder is restored to what the reference saved.
    """
    family = reference.family
    home.mkdir(parents=True)
    workdir = family.folder(home) / "run"
    copy_folder(reference.workdir, workdir)
    (workdir / "final.json").unlink()
    steps = saved_steps(workdir)
    at = rng.randrange(1, len(steps))
    for later in steps[at + 1 :]:
        (workdir / "checkpoints" / str(later)).rmtree()
    step, before = steps[at], steps[at - 1]
    folder = workdir / "checkpoints" / str(step)
    what = kind(folder, folder.parent / str(before), rng)
    evidence = epath.Path(home) / "evidence" / str(step)
    copy_folder(folder, evidence)

    process = Process(family, workdir, home / "log", cache)
    code = process.wait()
    # In a bucket, as after a kill; on a disk the folder would have another name.
    is_finished = not is_bucket(folder) or (evidence / "commit_success.txt").exists()
    outcome = classify(
        process.said, code, step, before, lambda: is_as_saved(reference, evidence), is_finished
    )
    problems = [] if outcome in GOOD else [outcome]
    if outcome == FOUND and not (workdir / "damaged" / str(step)).is_dir():
        problems.append(f"damaged/{step} is not there")
    if code == 0:
        problems += compare(workdir, reference.workdir)
    if not problems:
        workdir.rmtree()
        shutil.rmtree(home)
    return [DamagedRun(family.name, name_of(kind), what, step, outcome, problems)]
