"""A run that was killed, wherever it was, goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from firefly.runs.metrics import read_metrics
from runs.forking import Server, Trap

LONGEST = {"prepare": 0.05, "step": 0.03, "save": 0.06, "result": 0.01}
"""Seconds that each of them takes on these rows, generously."""
CALLS = {"prepare": 1, "step": 12, "save": 6, "result": 1}


def moment(seed: int, point: str | None = None) -> Trap:
    """A random moment of a run: in the preparation of its data, in a step, while it saves."""
    generator = np.random.default_rng(seed)
    chosen = point or str(generator.choice(list(CALLS), p=[0.2, 0.3, 0.4, 0.1]))
    count = int(generator.integers(1, CALLS[chosen] + 1))
    return Trap(chosen, count, killed_after=float(generator.uniform(0, LONGEST[chosen])))


def train(server: Server, config_file: Path, folder: Path, trap: Trap | None = None) -> int:
    arguments = ["--output_dir", str(folder / "out"), "--resume_from_checkpoint", "true"]
    ended = server.run("train", str(config_file), *arguments, trap=trap, FIREFLY_CACHE=str(folder / "cache"))
    assert ended.code in (0, -9), ended.said
    return ended.code


def log(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "out" / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def uninterrupted(server: Server, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert train(server, config_file, folder) == 0
    assert [step for step, _ in log(folder)] == list(range(1, 13))
    return folder


def assert_goes_on(server: Server, config_file: Path, folder: Path, uninterrupted: Path, *traps: Trap) -> None:
    codes = [train(server, config_file, folder, trap) for trap in traps]
    # A later trap may lie in what is behind the run already; the last call of its kind may be over before the kill.
    assert codes[0] == -9 or traps[0].count == CALLS[traps[0].point]
    assert train(server, config_file, folder) == 0
    result = "out/adapter_model.safetensors"
    assert (folder / result).read_bytes() == (uninterrupted / result).read_bytes()
    assert log(folder) == log(uninterrupted)
    found = (*(folder / "out").rglob("*"), *(folder / "cache").rglob("*"))
    left = [path for path in found if path.suffix in (".partial", ".old", ".lock") or path.name.startswith(".")]
    assert left == []
    assert len(list((folder / "cache" / "examples").iterdir())) == 1


@pytest.mark.parametrize("point", ["prepare", "step", "save"])
def test_a_killed_run_goes_on_to_the_same_bits(
    point: str, server: Server, config_file: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    assert_goes_on(server, config_file, tmp_path, uninterrupted, moment(len(point), point))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_a_run_killed_at_any_moment_twice_goes_on_to_the_same_bits(
    seed: int, server: Server, config_file: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    traps = (moment(1000 + seed), moment(2000 + seed))
    assert_goes_on(server, config_file, tmp_path, uninterrupted, *traps)


def test_a_run_killed_between_its_last_checkpoint_and_its_result_trains_no_step_too_many(
    server: Server, config_file: Path, tmp_path: Path
) -> None:
    """max_steps ends these runs in the middle of an epoch."""
    results = []
    for name, trap in (("whole", None), ("killed", Trap("result", killed_after=0.0))):
        arguments = ["train", str(config_file), "--output_dir", str(tmp_path / name), "--max_steps", "8"]
        arguments += ["--lr_scheduler_type", "constant"]  # a linear schedule would have ended: its rate is 0
        ended = server.run(*arguments, trap=trap)
        if trap is not None:
            assert ended.code == -9
            ended = server.run(*arguments, "--resume_from_checkpoint", "true")
        assert ended.code == 0, ended.said
        results.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert results[0] == results[1]
