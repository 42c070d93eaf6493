"""Files that are whole or not there, whatever stops the process while it writes them."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows: there, nobody keeps two processes from one folder
    fcntl = None

#: What a failed write raises: the system's errors, and safetensors' own, which has the system's inside.
WRITE_ERRORS = (OSError, SafetensorError)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; what is written there takes the place of ``path`` at once, when all is on the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder of files; an earlier folder of this name is removed."""
    temporary = _emptied(path.with_name(f".{path.name}.tmp"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        old = _aside(path)
        temporary.replace(path)
        _flush(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def whole_files(path: Path) -> Iterator[Path]:
    """The same for the files of a folder that is never missing: each takes the place of the one of its name."""
    temporary = _emptied(path.with_name(f".{path.name}.tmp"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        path.mkdir(exist_ok=True)
        for file in temporary.iterdir():
            _flush(file)
            file.replace(path / file.name)
        _flush(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder so that it is never seen in part."""
    shutil.rmtree(_aside(path), ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file."""
    with whole_file(path) as temporary:
        temporary.write_text(text)


def lock(path: Path) -> int:
    """Open a file that no other process has then: until ``os.close`` of what is returned, or the process ends.

    Raises:
        BlockingIOError: another process has it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    if fcntl is None:
        return descriptor
    try:
        # Of this process: no loader process inherits it, and a second object of the same notebook may have it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # else a file system without locks
            os.close(descriptor)
            raise BlockingIOError(error.errno, error.strerror) from error
    return descriptor


def sha256(path: Path) -> str:
    """The checksum that ``sha256sum`` prints."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def why(error: BaseException) -> str:
    """What went wrong with a file, in the system's words: "No space left on device"."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os error (\d+)", str(error))  # Rust's, in safetensors
    return os.strerror(int(code[1])) if code else (str(error).strip() or type(error).__name__).splitlines()[0]


def _umask() -> int:
    mask = os.umask(0)  # which there is no other way to ask for
    os.umask(mask)
    return mask


def _emptied(path: Path) -> Path:
    """A place for a temporary folder, without what an earlier process may have left there."""
    shutil.rmtree(path, ignore_errors=True)
    return path


def _aside(path: Path) -> Path:
    """Where a folder, if it is there, has been renamed to: what is done to it then nobody sees."""
    aside = _emptied(path.with_name(f".{path.name}.old"))
    return path.replace(aside) if path.exists() else aside


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; and let others read it as they may any new file."""
    if path.is_file():  # safetensors writes files that only their owner may read
        with suppress(PermissionError):  # file systems without Unix permissions (FAT, SMB, some of FUSE)
            path.chmod(0o666 & ~_umask())
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
