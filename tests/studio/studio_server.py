"""A studio in a process of its own, for tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firefly.runs.jobs import list_jobs


@dataclass
class StudioServer:
    """
    Attributes:
        address: with the token.
        requests, refused: addresses that browsers asked for, and of these what was not answered as asked.
    """

    root: Path
    options: tuple[str, ...] = ()
    port: int = 0
    address: str = ""
    process: Any = None
    requests: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def start(self) -> None:
        command = [sys.executable, "-m", "firefly", "studio", "--root", str(self.root), "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, *self.options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=self.root
        )
        found = None
        while found is None:
            line = self.process.stderr.readline()
            assert line or self.process.poll() is None, "the studio ended"
            found = re.search(r"http://127\.0\.0\.1:(\d+)/\?token=\S+", line)
        self.address, self.port = found[0], int(found[1])

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """With all that it has started."""
        self.kill()
        for job in list_jobs(self.root / ".firefly" / "jobs"):
            process = job.started.get("command", {}).get("pid")
            if process and job.state == "running":
                os.kill(process, signal.SIGKILL)
