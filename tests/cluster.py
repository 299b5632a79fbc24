"""A slurm of one node in a folder of its own: started, asked, stopped. Nothing outside the folder is used or changed."""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trials import ROOT, free_port

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "squeue", "scancel", "munged")
PLACES = "/usr/local/sbin:/usr/sbin:/sbin"  # where daemons are, which is not on everyone's PATH
CONFIG = """ClusterName=sandbox
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmctldParameters=node_reg_mem_percent=50
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
KillWait=30
MessageTimeout=30
SlurmdTimeout=10
JobRequeue=1
OverTimeLimit=1
MinJobAge=600
NodeName={host} NodeAddr=127.0.0.1 NodeHostname={host} CPUs=6 Boards=1 SocketsPerBoard=1 CoresPerSocket=6 ThreadsPerCore=1 \
RealMemory=2000 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES:4
"""


def missing() -> list[str]:
    """Programs of slurm and munge that are not here."""
    return [name for name in PROGRAMS if found(name) is None]


def found(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:{PLACES}")


class Cluster:
    """A controller, a node that believes to have six cores and munge with a key of their own."""

    def __init__(self, root: Path) -> None:
        self.root, self.host = root, socket.gethostname().partition(".")[0]
        for folder in ("state", "spool"):
            (root / folder).mkdir(parents=True)
        config = {"root": root, "host": self.host, "user": getpass.getuser()}
        config |= {"ctld_port": free_port(), "slurmd_port": free_port()}
        (root / "slurm.conf").write_text(CONFIG.format(**config))
        (root / "munge.key").write_bytes(secrets.token_bytes(128))
        (root / "munge.key").chmod(0o400)
        root.chmod(0o755)
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.environment |= {"SLURM_CONF": str(root / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{PLACES}"}
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        files["seed-file"] = "munged.seed"
        self.call("munged", "--force", *(f"--{option}={root / name}" for option, name in files.items()))
        self.call("slurmctld")
        self.start_node()

    def call(self, *command: str, **environment: str) -> str:
        """What a command says; the two daemons of slurm go into the background by themselves."""
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**self.environment, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout.strip()

    def start_node(self) -> None:
        self.call("slurmd")
        self.until(lambda: self.call("sinfo", "--noheader", "--format=%t") in ("idle", "mix", "alloc"), 30)

    def kill_node(self) -> None:
        """As if the power went: the daemon and all that it began, at once."""
        processes = {int(path.name): _status(path) for path in Path("/proc").glob("[0-9]*")}
        daemon = int((self.root / "slurmd.pid").read_text())
        steps = {pid for pid, (name, _, environ) in processes.items() if name == "slurmstepd" and str(self.root) in environ}
        lost = {daemon, *steps}
        while more := {pid for pid, (_, parent, _) in processes.items() if parent in lost} - lost:
            lost |= more
        for pid in sorted(lost):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def state(self, job: str) -> str:
        """Of a job, or `<array>_<task>`."""
        lines = self.call("scontrol", "show", "job", job, "--oneliner").splitlines()
        return " ".join(sorted({line.split("JobState=")[1].split()[0] for line in lines}))

    def wait(self, *jobs: str, seconds: float = 300.0) -> list[str]:
        """The states that they ended in."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}
        self.until(lambda: all(set(self.state(job).split()) <= over for job in jobs), seconds)
        return [self.state(job) for job in jobs]

    def until(self, holds: Callable[[], bool], seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"{self.call('squeue')}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        files = [*sorted(self.root.glob("*.log")), *sorted(self.root.glob("jobs/*"))]
        return "\n".join(f"--- {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files)

    def stop(self) -> None:
        """By the numbers that the daemons wrote down, the node's jobs first."""
        with suppress(AssertionError, subprocess.TimeoutExpired):
            self.call("scancel", f"--user={getpass.getuser()}", "--signal=KILL", "--full")
            self.call("scancel", f"--user={getpass.getuser()}")
        for name in ("slurmd", "slurmctld", "munged"):
            with suppress(FileNotFoundError, ProcessLookupError, ValueError):
                pid = int((self.root / f"{name}.pid").read_text())
                os.kill(pid, signal.SIGTERM)
                for _ in range(100):
                    os.kill(pid, 0)
                    time.sleep(0.1)
                os.kill(pid, signal.SIGKILL)


def _status(process: Path) -> tuple[str, int, str]:
    """Name, parent and environment of a process, as far as it lets us see."""
    try:
        lines = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)
        return lines["Name"], int(lines["PPid"]), (process / "environ").read_bytes().decode(errors="replace")
    except OSError:
        return "", 0, ""
