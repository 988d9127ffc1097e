"""What every side of a case is given: one JSON file, written once and read by all.

Standard library only: the peers' programs import this file inside their own virtual environments.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run as all sides have to do it; how a peer does it (its tuning) is on its command line."""

    task: str
    """sft, pretrain or dpo."""
    mode: str
    """full, lora or qlora."""
    model: str
    dump: str
    """Token ids and labels, one example a line (`token_dump.py`, `pair_dump.py`)."""
    documents: str | None = None
    """Pretraining: the texts that the dump's blocks were cut from. Firefly cuts its own blocks."""
    isolated: bool = True
    """Pretraining: whether a document in a block sees itself alone."""
    adapter: str | None = None
    """The untrained adapter that all start from; None: each draws its own."""
    max_tokens: int
    examples_per_step: int
    rank: int
    alpha: float
    dropout: float = 0.0
    checkpointing: bool | str = False
    """Firefly's key; a peer's tuning says its own."""
    beta: float = 0.1
    seed: int = 42
    threads: int = 1
    device: str = "cpu"
    random_weights: bool = False
    """`model` holds a configuration and a tokenizer alone; the weights are made up while loading."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `TrainingArguments`, the same for all."""
    firefly: Mapping[str, Any] = field(default_factory=dict)
    """Further keys for Firefly alone."""

    def write(self, path: Path) -> Path:
        """Write the file that `read_job` reads."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path


def read_job(path: Path) -> Job:
    """Read what `Job.write` wrote."""
    return Job(**json.loads(path.read_text(encoding="utf-8")))
