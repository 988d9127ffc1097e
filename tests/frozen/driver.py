"""Train the runs of a list one after the other with whatever firefly is on PYTHONPATH, each in processes of its own.

    PYTHONPATH=TREE/src python driver.py JOBS.json

What takes long to import is imported once, by the process that forks the others: a run finds modules imported, and
nothing else of those before it. Of firefly only `firefly.cli.main` is called.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KILLED = -signal.SIGKILL
SECONDS = 600
"""After so long a run is taken for stuck."""


@dataclass(frozen=True)
class Job:
    """`firefly train CONFIG`.

    Attributes:
        log: the file that takes what the run says.
        cache: the run's FIREFLY_CACHE.
        ranks: how many processes train, with the variables that torchrun gives each.
        killed_after: a folder; once a checkpoint of this name is whole, the process is killed at the next file that it
            opens.
        code: the exit code that is expected.
    """

    config: str
    log: str
    cache: str
    ranks: int = 1
    killed_after: str | None = None

    @property
    def code(self) -> int:
        return 0 if self.killed_after is None else KILLED

    @property
    def imported(self) -> Path:
        """A list of the modules that this run had to import."""
        return Path(self.log).with_name("imported.txt")


def serve(file: Path) -> None:
    import_all(["transformers", "firefly.training", "firefly.train"])  # as it was called before
    for number, settings in enumerate(json.loads(file.read_text(encoding="utf-8"))):
        job = Job(**settings)
        print(number, run(job), flush=True)
        if job.imported.is_file():
            import_all(job.imported.read_text(encoding="utf-8").splitlines())


def import_all(names: list[str]) -> None:
    for name in names:
        with suppress(Exception):  # a run will say what is wrong; some can be imported by their parents alone
            importlib.import_module(name)


def run(job: Job) -> int:
    """The exit code of a run: of its ranks, the first that is not what was expected."""
    port = str(free_port())
    children = [fork(job, rank, port) for rank in range(job.ranks)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return next((code for code in codes if code != job.code), job.code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork(job: Job, rank: int, port: str) -> int:
    child = os.fork()
    if child:
        return child
    code, before = 1, set(sys.modules)
    try:
        output = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        signal.alarm(SECONDS)
        os.environ["FIREFLY_CACHE"] = job.cache
        if job.ranks > 1:
            here = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "ROLE_RANK": rank}
            sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), job.ranks)
            os.environ |= {name: str(number) for name, number in (here | sizes).items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        from firefly.cli import main
        from firefly.config import own_fields

        if job.killed_after:
            sys.addaudithook(Killer(Path(job.killed_after)))
        without = ["--compare", "false"] if "compare" in own_fields() else []  # the other side may be older
        code = main(["train", job.config, *without])
        if rank == 0:
            job.imported.write_text("\n".join(sorted(set(sys.modules) - before)), encoding="utf-8")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Killer:
    """Kills this process once a checkpoint is on the disk, always at the same moment of a run."""

    def __init__(self, checkpoint: Path) -> None:
        self.plan = checkpoint / "plan.json"
        self.looking = False

    def __call__(self, event: str, arguments: Any) -> None:
        if event != "open" or self.looking:
            return
        self.looking = True  # to read is to open
        with suppress(OSError, ValueError):
            json.loads(self.plan.read_text(encoding="utf-8"))
            os.kill(os.getpid(), signal.SIGKILL)
        self.looking = False


def write_jobs(jobs: list[Job], file: Path) -> None:
    file.write_text(json.dumps([asdict(job) for job in jobs]), encoding="utf-8")


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
