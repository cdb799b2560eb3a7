"""A lock on a folder, so that only one process trains into it. It ends with the process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
from pathlib import Path

from hpm.core.errors import UserError, why

FILE = ".lock"
# Errors of file systems without locks.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK)

_held: dict[Path, int] = {}  # folder -> open file


def acquire(folder: Path) -> str | None:
    """Create a folder, and lock it until `release` or until the process ends.

    Returns a line for the log if the file system has no locks. Raises UserError if another process
    holds the lock.
    """
    folder = folder.resolve()
    if folder in _held:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {why(error)}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(file, 200, 0).decode(errors="replace").strip()
        os.close(file)
        if error.errno in NO_LOCKS:
            return (
                f"warning: the file system of {folder} has no locks ({why(error)}): a second "
                "run could write to this folder"
            )
        raise UserError(
            f"{folder} is in use by another run{f' ({holder})' if holder else ''}: wait for it, "
            "stop it, or choose another --out"
        ) from None
    _held[folder] = file
    with contextlib.suppress(OSError):  # the disk is full
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {platform.node()}".encode(), 0)
    return None


def release(folder: Path) -> None:
    """Release the lock if this process holds it. The lock file stays, because another process may
    have opened it."""
    file = _held.pop(folder.resolve(), None)
    if file is not None:
        os.close(file)


def may_be_held(folder: Path) -> bool:
    """Whether a process may hold the lock of a folder: False only if it is known that none does."""
    if folder.resolve() in _held:
        return True
    try:
        file = os.open(folder / FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:  # held, or the file system has no locks
        return True
    finally:
        os.close(file)


def _release_inherited() -> None:
    """Release inherited locks in a forked worker, which may outlive its parent."""
    for file in _held.values():
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_release_inherited)
