"""What kind of machine this is, by measurement, and which tunings were the fastest on machines of its kind.

Flags do not say which type is fast: of two CPUs with bf16 instructions one multiplied bf16 at twice the rate of
float32, the other at two thirds of it. So the rates of the model's own matrix products decide. One file a kind in
`results/machines`: what it is, and for each case and engine the sweep that was made on it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from measuring import hardware
from processes import Side, Tuning
from reporting import saver

SAME = 1.5
"""Ratios of rates between types that are closer than this are the same: clocks and neighbours move all types alike."""
EVEN = 1.1


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine as far as it decides which tuning is fast."""

    cpu: str
    threads: int
    instruction_sets: tuple[str, ...]
    rates: Mapping[str, float]
    """Type → FLOP/s of matrix products of the model's shapes."""
    name: str = ""
    """Of its kind, in the names of result files."""

    def is_like(self, other: "Machine") -> bool:
        """Whether both are of one kind: the same CPU and threads, with the same type ahead by about as much."""
        if (self.cpu, self.threads, self.instruction_sets) != (other.cpu, other.threads, other.instruction_sets):
            return False
        apart = [
            (self.rates[dtype] / self.rates["float32"]) / (other.rates[dtype] / other.rates["float32"])
            for dtype in ("bfloat16", "float16")
        ]
        return all(1 / SAME < ratio < SAME for ratio in apart)

    def named(self, taken: set[str]) -> "Machine":
        """Give it a name that no other kind has: the CPU, the threads, the fastest of float32 and bf16."""
        fast = self.rates["bfloat16"] / self.rates["float32"]
        ahead = "bf16" if fast > EVEN else "fp32" if fast < 1 / EVEN else "even"
        cpu = re.sub(r"[^a-z0-9]+", "_", self.cpu.lower()).strip("_")
        base = f"{cpu}_{self.threads}_threads_{ahead}"
        names = [base, *(f"{base}_{number}" for number in range(2, len(taken) + 2))]
        return replace(self, name=next(name for name in names if name not in taken))


def measure_machine(rate_side: Side) -> Machine:
    """Time products of the model's shapes in each type; `rate_side` is `matmul_rate.py` for some job."""
    found = rate_side.run(Tuning(name="matrix products", arguments="--dtype float32 bfloat16 float16"))
    described = hardware()
    return Machine(
        cpu=described["cpu"],
        threads=rate_side.threads,
        instruction_sets=tuple(described["instruction_sets"]),
        rates=found["rates"],
    )


class KnownMachine:
    """The file of a kind of machine: its sweeps are read, and written as they are made."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        """Find the file of the kind that `machine` is of, in `folder`, or begin one."""
        known = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
        of_its_kind = [name for name, content in known.items() if machine_of(content).is_like(machine)]
        self.machine = replace(machine, name=of_its_kind[0]) if of_its_kind else machine.named(set(known))
        self.content: dict[str, Any] = known.get(self.machine.name) or {"machine": asdict(self.machine), "sweeps": {}}
        self.save = saver(folder / f"{self.machine.name}.json", self.content)

    def sweep(self, case: str, engine: str, model: str) -> dict[str, Any] | None:
        """Return the recorded sweep of an engine with this model, whether it came to its end or not."""
        found = self.content["sweeps"].get(case, {}).get(engine)
        return found if found and found["model"] == Path(model).name else None

    def begin_sweep(self, case: str, engine: str, begun: Mapping[str, Any]) -> dict[str, Any]:
        """Put a new sweep in the place of the recorded one; the caller fills and saves it."""
        self.content["sweeps"].setdefault(case, {})[engine] = made = dict(begun) | {"complete": False, "attempts": []}
        return made


def machine_of(content: Mapping[str, Any]) -> Machine:
    """Read what `KnownMachine` wrote."""
    found = content["machine"]
    return Machine(**found | {"instruction_sets": tuple(found["instruction_sets"])})
