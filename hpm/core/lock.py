"""A lock on a folder, so that only one process trains into it. It ends with the process.

It is the system's `flock`. On NFS, the server holds it for all machines, unless the mount says that
locks are local; a machine that is cut off loses its lock when the server gives up on it.
"""

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

MOUNTS = Path("/proc/self/mountinfo")
# Kinds of network file systems, and options of theirs by which other machines see no lock.
LOCAL_LOCKS = {
    "nfs": {"nolock", "local_lock=all", "local_lock=flock"},
    "nfs4": {"nolock", "local_lock=all", "local_lock=flock"},
    "lustre": {"localflock"},
    "cifs": {"nobrl"},
    "smb3": {"nobrl"},
    "fuse.sshfs": set(),  # always
}

_held: dict[Path, int] = {}  # folder -> open file


def acquire(folder: Path) -> str | None:
    """Create a folder, and lock it until `release` or until the process ends.

    Returns a line for the log if the file system has no locks, or none that other machines see.
    Raises UserError if another process holds the lock.
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
    kind = _local_locks(folder)
    return kind and (
        f"warning: other machines see no locks of {folder} ({kind}): a run on one of them could "
        "write to this folder"
    )


def release(folder: Path) -> None:
    """Release the lock if this process holds it. The lock file stays, because another process may
    have opened it."""
    file = _held.pop(folder.resolve(), None)
    if file is not None:
        # Without unlocking, a program that a thread starts at this moment, which shares the open
        # file until it runs, would hold the lock.
        with contextlib.suppress(OSError):  # the file system is gone, or has no locks
            fcntl.flock(file, fcntl.LOCK_UN)
        with contextlib.suppress(OSError):  # it is closed nevertheless
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


def _local_locks(folder: Path) -> str | None:
    """The kind of file system of a folder, and an option of its mount, if its locks are only those
    of this machine."""
    mounts: dict[str, tuple[str, set[str]]] = {}  # where -> (kind, options); later ones cover
    try:
        lines = MOUNTS.read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        return None
    for line in lines:
        here, _, there = line.partition(" - ")
        if len(here.split()) > 4 and len(there.split()) > 2:
            kind, _, named = there.split()[:3]
            mounts[here.split()[4].replace("\\040", " ")] = kind, set(named.split(","))
    for above in (folder, *folder.parents):
        if str(above) in mounts:
            kind, given = mounts[str(above)]
            found = sorted(LOCAL_LOCKS.get(kind, set()) & given)
            local = found or LOCAL_LOCKS.get(kind) == set()
            return " ".join([kind, *found[:1]]) if local else None
    return None


def _release_inherited() -> None:
    """Release inherited locks in a forked worker, which may outlive its parent."""
    for file in _held.values():
        os.close(file)
    _held.clear()


os.register_at_fork(after_in_child=_release_inherited)
