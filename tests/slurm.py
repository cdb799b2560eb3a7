"""A Slurm of two nodes on this machine. Each node has a network, a host name and processes of its
own, so that it can be killed as a whole; the controller runs on the first."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "nsenter", "setpriv", "ip")
CONFIGURATION = """
ClusterName=test
SlurmctldHost=node1(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SlurmdTimeout=20
KillWait=60
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n/log
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node[1-2] NodeAddr=10.77.0.[1-2] CPUs=2 Gres=gpu:2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2
"""
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
# Its first process, whose end is that of all others. It waits for its network.
NODE = """
hostname {name}
mount --bind {folder}/hosts /etc/hosts
until ip link show cable 2>&1 | grep -q "master lan"; do sleep 0.1; done
export SLURM_CONF={folder}/slurm.conf
{controller}
slurmd -f $SLURM_CONF
while :; do sleep 0.2; done  # and take in orphans
"""


class Slurm:
    """Two nodes with two CPUs and two GPUs (which are none) each."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.nodes: dict[str, subprocess.Popen] = {}
        self._munged: subprocess.Popen | None = None

    def start(self):
        (self.folder / "state").mkdir()
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(folder=self.folder))
        # Files of the system that are there: nothing opens them.
        (self.folder / "gres.conf").write_text("NodeName=node[1-2] Name=gpu File=/dev/tty[1-2]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # and not systemd's
        names = "10.77.0.1 node1\n10.77.0.2 node2\n"
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + names)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "log-file": "munged.log",
            "seed-file": "munged.seed",
        }
        self._munged = subprocess.Popen(
            [
                *(*DIES_WITH_US, "munged", "--foreground", "--force"),
                *(f"--{option}={self.folder / name}" for option, name in files.items()),
            ],
            stderr=subprocess.DEVNULL,
        )
        self.boot("node1", "node2")

    def boot(self, *names: str):
        """Start nodes, and wait until the cluster has both."""
        for name in names:
            (self.folder / name).mkdir(exist_ok=True)
            text = NODE.format(
                name=name,
                folder=self.folder,
                controller="slurmctld -f $SLURM_CONF" if name == "node1" else "",
            )
            spaces = ("--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc")
            command = [*DIES_WITH_US, "unshare", *spaces, "--kill-child", "bash", "-c", text]
            self.nodes[name] = subprocess.Popen(command, start_new_session=True)
        for name in names:
            pid = self._first_process(name)
            self._inside(pid, "ip", "link", "add", "lan", "type", "bridge")
            self._inside(pid, "ip", "address", "add", f"10.77.0.{name[-1]}/24", "dev", "lan")
            for device in ("lo", "lan"):
                self._inside(pid, "ip", "link", "set", device, "up")
        # A cable between them. It is gone when a node is; the addresses of the other one stay.
        one, two = (self._first_process(name) for name in ("node1", "node2"))
        cable = f"ip link add cable netns {one} type veth peer name cable netns {two}"
        subprocess.run(cable.split(), check=True)
        for pid in (one, two):
            self._inside(pid, "ip", "link", "set", "cable", "master", "lan", "up")
        wait_until(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", 60)

    def kill(self, name: str):
        """Cut a node off, and end all of its processes."""
        self.nodes[name].kill()
        self.nodes.pop(name).wait()

    def run(self, *command) -> str:
        """The output of a command on the first node."""
        return self._inside(self._first_process("node1"), *command)

    def _inside(self, pid: int, *command) -> str:
        done = subprocess.run(
            ["nsenter", "--target", str(pid), "--net", "--uts", *map(str, command)],
            env=os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")},
            capture_output=True,
            text=True,
        )
        return done.stdout + done.stderr

    def state(self, job: str) -> str:
        """Such as RUNNING or PENDING."""
        told = self.run("scontrol", "show", "job", job)
        return told.partition("JobState=")[2].split()[0] if "JobState=" in told else "GONE"

    def end(self):
        for name in list(self.nodes):
            self.kill(name)
        if self._munged:
            self._munged.terminate()
            self._munged.wait()

    def _first_process(self, name: str) -> int:
        """Of a node, as it is seen from outside."""
        pid = self.nodes[name].pid
        children = Path(f"/proc/{pid}/task/{pid}/children")
        wait_until(lambda: children.read_text().split(), 10)
        return int(children.read_text().split()[0])


def wait_until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def slurm(tmp_path):
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and Slurm; not here: {json.dumps(missing)}")
    cluster = Slurm(tmp_path / "slurm")
    cluster.folder.mkdir()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.end()
