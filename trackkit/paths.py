"""Where things live: the user's home for runs and caches, the data set, and files that are never
half written.

Nothing is remembered in a settings file. A path is an argument, else an environment variable
(`TRACKKIT_HOME`, `TRACKKIT_GOT10K`), else a default that works on a machine with nothing set up.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

from trackkit.errors import DataError, TrackkitError

# an installed wheel has the course inside the package (setup.py), a checkout beside it
_PACKAGE = Path(__file__).resolve().parent
_COURSE = _PACKAGE / "_data" if (_PACKAGE / "_data").is_dir() else _PACKAGE.parent
SAMPLES = _COURSE / "data_samples"
LESSONS = _COURSE / "lessons"


def home() -> Path:
    """Folder for runs, results and caches: `TRACKKIT_HOME`, else `~/.cache/trackkit`. Not created
    here.
    """
    given = os.environ.get("TRACKKIT_HOME")
    try:
        return expanded(given) if given else Path.home() / ".cache" / "trackkit"
    except RuntimeError as error:
        raise DataError(
            "there is no home folder here for runs and results; say where they go: TRACKKIT_HOME"
        ) from error


def expanded(path: str | os.PathLike) -> Path:
    """The path with a leading ~ resolved, or as it is if there is no such user, as a shell does."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


@contextmanager
def alone(folder: str | os.PathLike, what: str) -> Iterator[None]:
    """Hold `folder` for this process while the block runs; the lock of a process that was killed
    does not count.

    Raises DataError if another process holds it.
    """
    path = writable(folder) / ".lock"
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise DataError(
            f"{folder}: another process {what} here now; wait for it, or choose another folder"
        ) from error
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        yield
    finally:
        lock.release()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def command(name: str) -> str:
    """How the command `name` of this environment can be typed here: as it is where it is on the
    PATH, else with its folder, else as a module.
    """
    if shutil.which(name):
        return name
    script = Path(sys.executable).with_name(name)
    words = [str(script)] if script.is_file() else [sys.executable, "-m", name]
    return shlex.join(words)


def data_root(argument: str | os.PathLike | None = None) -> Path:
    """Root of the data set: the argument, else `TRACKKIT_GOT10K`, else the samples that come with
    trackkit.

    The first of the three that is given is used; when it does not exist the others are not tried,
    since a misspelt path must not silently train on other data.

    Raises DataError that says what was looked for and the command that mends it.
    """
    variable = os.environ.get("TRACKKIT_GOT10K")
    if argument is not None:
        root, source = expanded(argument), "the path that was given"
    elif variable:
        root, source = expanded(variable), "the environment variable TRACKKIT_GOT10K"
    else:
        root, source = SAMPLES, "the samples that come with trackkit (nothing else was given)"
    if os.path.isdir(root) and (root != SAMPLES or any(root.iterdir())):
        return root
    state = (
        "is empty"
        if os.path.isdir(root)
        else "is a file, not a folder"
        if os.path.exists(root)
        else "does not exist"
    )
    raise DataError(
        f"no data set: {root} {state}; it comes from {source}. Give the folder that holds "
        "GOT-10k's train/, val/ and "
        "test/ as an argument or in TRACKKIT_GOT10K, or make a small data set: trackkit synth "
        "--samples DIR"
    )


def writable(path: str | os.PathLike) -> Path:
    """Create the folder `path` if need be and return it once a file could be written in it.

    Raises DataError that names the folder and the reason: no permission, a file in the way, a full
    or read-only disk.
    """
    path = expanded(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Give the block the path of a temporary file to write, which replaces `path` when the block
    ends well.

        with atomic_write("results/boxes.txt") as partial:
            partial.write_text(lines)

    The temporary file exists already, beside the target and with the same suffix. It is flushed to
    disk and then renamed, so a reader, or a run that was killed, sees the old file or the new one,
    never a part; after an error nothing has changed. Missing parent folders are created. Of several
    writers at once the last wins.

    Raises DataError when the place cannot be written.
    """
    path = expanded(path)
    # not tempfile: its files are private to the user, this one gets the permissions of any other
    # file. Of a long name a part, or this one would be too long
    ending = f"{os.getpid()}-{secrets.token_hex(4)}{path.suffix}"
    partial = path.parent / f".{path.stem[:50]}.{ending}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch(exist_ok=False)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):  # the folder itself may be what is missing
            partial.unlink()
        # not what the block could not read elsewhere
        places = {None, *map(str, (partial, path, *path.parents))}
        if isinstance(error, OSError) and (error.filename and str(error.filename)) in places:
            raise cannot_write(path, error) from error
        raise


def remove_partials(files: Iterable[Path]) -> None:
    """Remove those of the files that `atomic_write` of a killed process left; nobody else may be
    writing there.
    """
    for file in files:
        if re.fullmatch(r"\..*\.\d+-[0-9a-f]{8}(\..+)?", file.name):
            with suppress(OSError):
                file.unlink()


def cannot_write(path: Path, error: OSError) -> TrackkitError:
    """The error to raise instead of one that came while `path` was written."""
    reason = error.strerror or str(error)
    blocker = next((p for p in (path, *path.parents) if os.path.isfile(p)), None)
    if blocker is not None and blocker != path:
        reason = f"{blocker} is a file where a folder is needed"
    return DataError(
        f"cannot write {path}: {reason}. Choose another place by an argument or TRACKKIT_HOME, "
        "or mend the permissions or the space there"
    )
