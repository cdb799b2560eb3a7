"""A file system by FUSE that passes everything on to a folder, and fails or stalls when told to.

It runs as a process of its own: `python faulty.py BELOW MOUNT FAULT`. FAULT is a file, read at each
operation: {"match": "*.png", "operations": ["open", "read"], "error": 116, "times": 2}; without
"error", the operations stall until the file has changed.
"""

import errno
import fcntl
import fnmatch
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest


class Faulty:
    """As tests use it."""

    def __init__(self, folder: Path):
        self.below, self.path, self._fault = folder / "below", folder / "mount", folder / "fault"
        self.below.mkdir(parents=True)
        self.path.mkdir()
        self.works()
        command = [sys.executable, __file__, self.below, self.path, self._fault]
        self._process = subprocess.Popen(list(map(str, command)))
        deadline = time.monotonic() + 60
        while not os.path.ismount(self.path):
            assert self._process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)

    def fails(self, match: str, *operations: str, error: int = errno.ESTALE, times: int = 10**9):
        self._tell({"match": match, "operations": operations, "error": error, "times": times})

    def stalls(self, match: str, *operations: str):
        self._tell({"match": match, "operations": operations, "times": 10**9})

    def works(self):
        self._tell({"match": "", "operations": [], "times": 0})

    @property
    def met(self) -> int:
        """How often a fault has been met, since the last one was told."""
        file = Path(f"{self._fault}.met")
        return len(file.read_bytes()) if file.exists() else 0

    def kill(self):
        """End the process that serves it."""
        self._process.kill()
        self._process.wait()

    def end(self):
        self.works()
        subprocess.run(["umount", "--lazy", str(self.path)], check=False)
        self.kill()  # what still waits for an answer gets an error

    def _tell(self, fault):
        Path(f"{self._fault}.met").unlink(missing_ok=True)
        new = Path(f"{self._fault}.new")
        new.write_text(json.dumps(fault))
        new.rename(self._fault)


@pytest.fixture
def faulty(tmp_path):
    if not os.access("/dev/fuse", os.W_OK):
        pytest.skip("needs FUSE: /dev/fuse cannot be opened here")
    try:
        import mfusepy  # noqa: F401
    except (ImportError, OSError) as error:  # the latter without libfuse
        pytest.skip(f"needs mfusepy and libfuse: {error}")
    found = Faulty(tmp_path / "faulty")
    try:
        yield found
    finally:
        found.end()


def serve(below: str, mount: str, fault: str) -> None:
    import mfusepy

    lock, times = threading.Lock(), {}

    def check(operation: str, path: str) -> None:
        """Raise, or wait, if that is what the file says."""
        while True:
            text = Path(fault).read_text()
            told = json.loads(text)
            with lock:
                if operation not in told["operations"] or not fnmatch.fnmatch(path, told["match"]):
                    return
                if times.setdefault(text, 0) >= told["times"]:
                    return
                if "error" in told or (path, text) not in times:
                    times[text] += 1
                    times[path, text] = 1
                    with open(f"{fault}.met", "ab") as met:
                        met.write(b".")
            if "error" in told:
                raise mfusepy.FuseOSError(told["error"])
            time.sleep(0.02)

    def passed_on(operation: str, call):
        def checked(self, path, *arguments):
            check(operation, path)
            return call(below + path, *arguments)

        return checked

    def of_file(operation: str, call):
        def checked(self, path, *arguments):
            check(operation, path)
            return call(*arguments)

        return checked

    def status(path, file=None):
        found = os.lstat(path)
        names = ("mode", "ino", "nlink", "uid", "gid", "size", "blocks")
        times = {f"st_{which}time": getattr(found, f"st_{which}time_ns") for which in "amc"}
        return times | {f"st_{name}": getattr(found, f"st_{name}") for name in names}

    def truncate(path, length, file=None):
        os.truncate(path, length)

    def rename(self, old, new):
        check("rename", new)
        os.rename(below + old, below + new)

    def statfs(path):
        found = os.statvfs(path)
        return {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}

    members = {
        "getattr": passed_on("getattr", status),
        "readdir": passed_on("readdir", lambda path, file: [".", "..", *os.listdir(path)]),
        "open": passed_on("open", os.open),
        "create": passed_on(
            "create", lambda path, mode: os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)
        ),
        "mkdir": passed_on("mkdir", os.mkdir),
        "rmdir": passed_on("rmdir", os.rmdir),
        "unlink": passed_on("unlink", os.unlink),
        "chmod": passed_on("chmod", os.chmod),
        "utimens": passed_on("utimens", lambda path, times: os.utime(path, ns=times)),
        "truncate": passed_on("truncate", truncate),
        "statfs": passed_on("statfs", statfs),
        "rename": rename,
        "read": of_file("read", lambda size, start, file: os.pread(file, size, start)),
        "write": of_file("write", lambda data, start, file: os.pwrite(file, data, start)),
        "fsync": of_file("fsync", lambda data_only, file: os.fsync(file)),
        "flush": of_file("flush", lambda file: None),
        "release": of_file("release", os.close),
        "flock": of_file("flock", lambda file, how: fcntl.flock(file, how)),
    }
    operations = type("Below", (mfusepy.Operations,), {**members, "use_ns": True})
    mfusepy.FUSE(operations(), mount, foreground=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
