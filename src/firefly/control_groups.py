"""The control groups around a process (cgroup v1 or v2): a container's limits, which the machine's own figures lack."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class ControlGroup:
    """A folder in which a controller has its files; `version` (1 or 2) says which ones."""

    version: int
    folder: Path


def control_groups(controller: str, process: Path = PROCESS) -> Iterator[ControlGroup]:
    """Each group around a process that may have files of a controller ("memory", "cpu"), from the innermost out."""
    try:
        groups = [line.split(":", 2) for line in _lines(process / "cgroup") if line.count(":") >= 2]
        mounts = _lines(process / "mountinfo")
    except OSError:
        return
    for line in mounts:
        # 36 35 98:0 ROOT MOUNT_POINT OPTIONS … - TYPE SOURCE SUPER_OPTIONS, of which SOURCE may be empty
        place, _, what = line.partition(" - ")
        fields, (kind, _, options) = place.split(" "), (*what.split(" "), "", "", "")[:3]
        if len(fields) < 5:
            continue
        root, mount = PurePosixPath(fields[3]), Path(fields[4])
        if kind == "cgroup2":
            version, path = 2, next((path for number, _, path in groups if number == "0"), None)
        elif kind == "cgroup" and controller in options.split(","):
            version, path = 1, next((path for _, names, path in groups if controller in names.split(",")), None)
        else:
            continue
        # In a container without a namespace of its own the path is the host's, and only what lies below ROOT is shown.
        group = PurePosixPath(path or "/")
        inside = group.relative_to(root) if group.is_relative_to(root) else PurePosixPath()
        for level in (inside, *inside.parents):
            yield ControlGroup(version, mount / level)


def _lines(path: Path) -> list[str]:
    """Of a file that names other files, which may be in any encoding and have any character but a line feed."""
    return os.fsdecode(path.read_bytes()).split("\n")


def cpu_quota(process: Path = PROCESS) -> float | None:
    """Cores' worth of time that a process may use, by the tightest of its control groups; None where none limits it."""
    found: list[float] = []
    for group in control_groups("cpu", process):
        try:
            if group.version == 2:
                quota, period = (group.folder / "cpu.max").read_text().split()
            else:
                quota, period = ((group.folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota.strip() not in ("max", "-1"):
                found.append(int(quota) / int(period))
        except (OSError, ValueError, ArithmeticError):  # no files, as in the outermost group, or none that can be read
            continue
    return min(found, default=None)


def pids_room(process: Path = PROCESS) -> int | None:
    """Threads that a process may still start, by the tightest of its control groups; None where none limits them."""
    found: list[int] = []
    for group in control_groups("pids", process):
        try:
            limit = (group.folder / "pids.max").read_text().strip()
            if limit != "max":
                found.append(int(limit) - int((group.folder / "pids.current").read_text()))
        except (OSError, ValueError):
            continue
    return min(found, default=None)
