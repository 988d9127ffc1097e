"""A signal ends a run between two steps, leaves a checkpoint, and says how to go on."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest

from firefly.config import load_config
from firefly.runs.checkpoints import checkpoints
from firefly.runs.interruption import Interrupted, Interruption, resume_command
from firefly.runs.metrics import read_metrics
from firefly.training import train
from runs.forking import Ended, Run, Server, Trap


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def result(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def start(server: Server, config_file: Path, folder: Path, *more: str, trap: Trap | None = None) -> Ended:
    return server.run("train", str(config_file), "--output_dir", str(folder), *more, trap=trap)


@pytest.fixture(scope="module")
def whole(server: Server, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert start(server, config_file, folder, "--save_strategy", "no").code == 0
    return folder


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_the_step_is_finished_a_checkpoint_saved_and_the_command_shown(
    name: str, server: Server, config_file: Path, whole: Path, tmp_path: Path
) -> None:
    number = getattr(signal, name)
    ended = start(server, config_file, tmp_path, "--save_strategy", "no", trap=Trap("step", 3, signals=(number,)))
    assert ended.code == 128 + number, ended.said
    assert "Traceback" not in ended.said
    assert names(tmp_path) == ["checkpoint-3"]
    assert f"stopped by {name} after step 3" in ended.said
    command = shlex.split(ended.said.rpartition("Go on with: ")[2])
    assert command[0] == "firefly"
    again = server.run(*command[1:])
    assert again.code == 0, again.said
    assert result(tmp_path) == result(whole)
    assert losses(tmp_path) == losses(whole)


def test_a_second_signal_ends_the_run_at_once(server: Server, config_file: Path, tmp_path: Path) -> None:
    both = (signal.SIGINT, signal.SIGTERM)
    ended = start(server, config_file, tmp_path, trap=Trap("step", 4, signals=both))
    assert ended.code == -signal.SIGTERM
    assert names(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_before_training_a_signal_ends_the_run_at_once(
    number: int, code: int, server: Server, config_file: Path, tmp_path: Path
) -> None:
    ended = start(server, config_file, tmp_path, trap=Trap("load", signals=(number,)))
    assert ended.code == code
    assert names(tmp_path) == []
    assert "Traceback" not in ended.said


def test_a_signal_in_the_last_step_lets_the_run_finish(
    server: Server, config_file: Path, whole: Path, tmp_path: Path
) -> None:
    ended = start(server, config_file, tmp_path, trap=Trap("step", 12, signals=(signal.SIGTERM,)))
    assert ended.code == 0, ended.said
    assert result(tmp_path) == result(whole)


def signalled(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every run of this process be asked to stop while it computes step `at`."""
    from firefly.tasks.base import Task

    original, calls = Task.backward, [0]

    def asked(self: Task, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(Task, "backward", asked)


def test_at_the_end_of_an_epoch_its_evaluation_comes_first(run: Run, place: Path, monkeypatch: Any) -> None:
    evaluated = {"eval_file": str(place / "eval.jsonl"), "eval_strategy": "epoch"}
    whole = run("whole", **evaluated)
    with monkeypatch.context() as patch:
        signalled(6, patch)
        with pytest.raises(Interrupted):
            run("stopped", **evaluated)
    stopped = run("stopped", **evaluated, resume_from_checkpoint=True)

    def lines(folder: Path) -> list[tuple[int, float]]:
        return [
            (line["step"], line["eval_loss"]) for line in read_metrics(folder / "metrics.jsonl") if "eval_loss" in line
        ]

    assert lines(stopped) == lines(whole)
    assert [step for step, _ in lines(whole)] == [6, 12]


def test_the_checkpoint_of_an_interruption_holds_everything_under_save_only_model(
    run: Run, settings: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    whole = run("whole")
    with monkeypatch.context() as patch:
        signalled(4, patch)
        with pytest.raises(Interrupted, match=r"checkpoint-4 is saved"):
            run("stopped", save_only_model=True)
    assert result(run("stopped", save_only_model=True, resume_from_checkpoint=True)) == result(whole)


def test_with_the_best_checkpoint_kept_an_interruption_keeps_its_own_too(
    run: Run, place: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """transformers removes all but the best at the end of training, where save_total_limit is 1."""
    signalled(5, monkeypatch)
    evaluated = {"eval_file": str(place / "eval.jsonl"), "eval_steps": 2, "load_best_model_at_end": True}
    with pytest.raises(Interrupted):
        run(**evaluated, save_total_limit=1)
    assert "checkpoint-5" in names(tmp_path / "out")


def test_a_repeat_within_moments_is_one_request_where_there_are_several_ranks(monkeypatch: Any) -> None:
    interruption = Interruption(ranks=2)
    with interruption.watched():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # torchrun passes on what the terminal has sent already
    assert interruption.signal == signal.SIGINT


def test_handlers_are_put_back(settings: dict[str, Any]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption().watched():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_command_of_several_ranks_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", "--train_args_file", "a.json"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    command = resume_command(Path("my out"))
    assert command == (
        "torchrun --nnodes 2 --nproc_per_node 4 train.py --train_args_file 'my out/train_args.json' "
        "--resume_from_checkpoint true"
    )


def test_the_configuration_that_the_command_names_is_the_run_s(run: Run, settings: dict[str, Any]) -> None:
    out = run()
    again = load_config(str(out / "train_args.json"), {"resume_from_checkpoint": True})
    assert again.flat() | {"resume_from_checkpoint": None} == load_config(json.loads(json.dumps(settings))).flat() | {
        "output_dir": str(out)
    }
    assert train(again) == out
