"""Checkpoints appear whole or not at all, and a disk that takes no more costs none of those that are there."""

from __future__ import annotations

import builtins
import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from firefly import loop, saving
from firefly import training as trained
from firefly.cli import main
from firefly.distributed.model import TrainableModel
from firefly.errors import UsageError
from firefly.files import is_write_failure, seal, unfinished
from firefly.runs.checkpoints import checkpoints, missing_files, newest_complete
from firefly.runs.folders import finish_replacing, rotate
from firefly.runs.metrics import read_metrics
from runs.forking import Run


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def result(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- what cannot be written ----


def python_writes(patch: pytest.MonkeyPatch) -> None:
    """Files that Python opens take nothing."""
    original = builtins.open

    def opening(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if "w" in mode and "checkpoint-" in str(file):
            raise full()
        return original(file, mode, *more, **options)

    patch.setattr(builtins, "open", opening)


def failing(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def fail(*_: Any, **__: Any) -> None:
        raise full()

    return lambda patch: patch.setattr(name, fail)


def failing_mkdir(patch: pytest.MonkeyPatch) -> None:
    original = Path.mkdir

    def mkdir(self: Path, *more: Any, **options: Any) -> None:
        if self.name.endswith(".partial"):
            raise full()
        original(self, *more, **options)

    patch.setattr(Path, "mkdir", mkdir)


def failing_rename(patch: pytest.MonkeyPatch) -> None:
    original = Path.rename

    def rename(self: Path, target: Any) -> Path:
        if self.name.endswith(".partial"):
            raise full()
        return original(self, target)

    patch.setattr(Path, "rename", rename)


def limit(size: int) -> Callable[[pytest.MonkeyPatch], None]:
    """No file may grow beyond `size` bytes: the kernel itself refuses, to whichever library writes."""

    def lower(patch: pytest.MonkeyPatch) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    return lower


@contextmanager
def trouble(cause: Callable[[pytest.MonkeyPatch], None]) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        cause(patch)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def trouble_at(step: int, cause: Callable[[pytest.MonkeyPatch], None], patch: pytest.MonkeyPatch) -> None:
    """Let every writing of runs in this process fail after `step`, and no other."""
    attempt, save_checkpoint = saving.attempt, loop.save_checkpoint
    at = [0]

    def attempting(model: Any, parts: Any) -> str | None:
        if at[0] != step:
            return attempt(model, parts)
        with trouble(cause):
            return attempt(model, parts)

    def saving_checkpoint(folder: Path, model: Any, tokenizer: Any, observers: Any, *more: Any) -> bool:
        at[0] = observers.progress.state.global_step
        return save_checkpoint(folder, model, tokenizer, observers, *more)

    patch.setattr(saving, "attempt", attempting)
    patch.setattr(loop, "save_checkpoint", saving_checkpoint)


CAUSES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the folder": failing_mkdir,
    "weights": failing("safetensors.torch.serialize_file"),
    "small files": python_writes,
    "optimizer": failing("torch.save"),
    "plan.json": failing("firefly.runs.checkpoints.write_json"),
    "flushing": failing("os.fsync"),
    "the last rename": failing_rename,
    # Sizes between those of the files here: which one is refused first differs.
    "beyond 100 bytes": limit(100),
    "beyond 2 kB": limit(2_000),
    "beyond 20 kB": limit(20_000),
    "beyond 40 kB": limit(40_000),
}


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from firefly.config import load_config
    from firefly.training import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("firefly.runs.plots.draw_loss", lambda *_: None)
        return train(load_config(settings | {"output_dir": str(tmp_path_factory.mktemp("undisturbed") / "out")}))


@pytest.mark.parametrize("cause", CAUSES)
def test_a_full_disk_costs_one_checkpoint_and_nothing_else(
    cause: str, run: Run, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    original = loop.save_checkpoint

    def watched(folder: Path, model: Any, tokenizer: Any, observers: Any, *more: Any) -> bool:
        before = {path: path.read_bytes() for path in folder.rglob("checkpoint-2/*")}
        saved = original(folder, model, tokenizer, observers, *more)
        if observers.progress.state.global_step == 4:
            assert not saved
            assert {path: path.read_bytes() for path in before} == before != {}
            assert names(folder) == ["checkpoint-2"]
        return saved

    monkeypatch.setattr(loop, "save_checkpoint", watched)
    trouble_at(4, CAUSES[cause], monkeypatch)
    out = run(save_total_limit=1)
    said = capfd.readouterr().err
    assert "checkpoint-4 could not be written" in said
    assert "checkpoint-2 is safe." in said
    assert " free)" in said
    assert names(out) == ["checkpoint-12"]
    assert missing_files(out / "checkpoint-12") == []
    assert not list(out.glob("*.partial"))
    assert result(out) == result(undisturbed)


def test_trackers_are_told_of_checkpoints_that_are_there_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(
        "firefly.runs.metrics.RunRecorder.on_save",
        lambda self, args, state, control, **_: told.append(state.global_step),
        raising=False,
    )
    trouble_at(4, CAUSES["optimizer"], monkeypatch)
    run()
    assert told == [2, 6, 8, 10, 12]


def test_other_checkpoints_than_the_best_stay_until_the_result_is_written(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate is so high that the best is not the last."""
    more = {"eval_file": str(place / "eval.jsonl"), "eval_steps": 2, "load_best_model_at_end": True}
    more |= {"learning_rate": 0.5, "optim": "sgd", "train_mode": "full", "save_total_limit": 1, "num_train_epochs": 1}
    with monkeypatch.context() as patch:
        patch.setattr(trained, "save_result", failing_result)
        with pytest.raises(OSError, match="No space"):
            run(**more)
    out = run(**more, resume_from_checkpoint=True)
    best = json.loads((out / names(out)[0] / "trainer_state.json").read_text())["best_global_step"]
    assert names(out) == [f"checkpoint-{best}"]


def failing_result(folder: Path, *_: Any) -> None:
    assert "checkpoint-6" in names(folder)
    raise full()


def test_what_is_no_fault_of_the_disk_is_not_taken_for_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> None:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(TrainableModel, "save_schedule", wrong)
    with pytest.raises(KeyError):
        run()
    for error in (ValueError("x"), ConnectionResetError(104, "Connection reset by peer"), TimeoutError()):
        assert not is_write_failure(error)


def test_a_result_that_cannot_be_written_names_what_is_safe(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run()
    before = result(out)
    original, attempt = trained.save_result, saving.attempt

    def attempting(model: Any, parts: Any) -> str | None:
        with trouble(limit(20_000)):
            return attempt(model, parts)

    def troubled(*arguments: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(saving, "attempt", attempting)
            original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trained, "save_result", troubled)
        with pytest.raises(UsageError) as refusal:
            run(learning_rate=0.02)
    assert refusal.value.exit_code == 2
    assert f"{out / 'checkpoint-12'} is safe." in str(refusal.value)
    assert f"firefly train {out / 'train_args.json'} --resume_from_checkpoint true" in str(refusal.value)
    assert result(out) == before  # the earlier result stands whole
    again = run(learning_rate=0.02, resume_from_checkpoint=True)
    assert result(again) == (out / "checkpoint-12" / "adapter_model.safetensors").read_bytes() != before


def test_a_disk_that_is_full_from_the_start_is_one_message(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(settings | {"output_dir": str(tmp_path / "out")}))

    def fail(path: Path, value: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("firefly.setup.build.write_json", fail)
    assert main(["train", str(file)]) == 2
    said = capsys.readouterr().err
    assert "no space is left" in said
    assert "template_certificate.json" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("what", ["metrics.jsonl", "loss.png", "TensorBoardCallback"])
def test_reports_that_cannot_be_written_end_no_run(
    what: str, run: Run, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise full()

    if what == "metrics.jsonl":
        original = Path.open
        monkeypatch.setattr(
            Path, "open", lambda self, mode="r", **more: original(self, mode, **more) if mode != "a" else fail()
        )
    elif what == "loss.png":
        monkeypatch.undo()
        monkeypatch.setattr("firefly.runs.plots.paint_loss", fail)
    else:
        from torch.utils.tensorboard import SummaryWriter

        monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    out = run(report_to="tensorboard" if what == "TensorBoardCallback" else "none")
    assert capfd.readouterr().err.count(f"{what} could not be") == 1
    assert result(out) == result(undisturbed)


# ---- whole or not at all ----


def test_a_checkpoint_of_that_name_stays_until_the_new_one_is_complete(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that passes over a damaged checkpoint repeats its steps."""
    out = run()
    for step in range(6, 13, 2):
        shutil.rmtree(out / f"checkpoint-{step}")
    (out / "checkpoint-4" / "mark").touch()
    (out / "checkpoint-4" / "optimizer.pt").unlink()
    with monkeypatch.context() as patch:
        trouble_at(4, failing_rename, patch)
        run(resume_from_checkpoint=True)
    assert (out / "checkpoint-4" / "mark").is_file()
    for step in range(6, 13, 2):
        shutil.rmtree(out / f"checkpoint-{step}")
    run(resume_from_checkpoint=True)
    assert missing_files(out / "checkpoint-4") == []
    assert not (out / "checkpoint-4" / "mark").exists()
    assert not list(out.glob("*.old"))
    assert names(out) == [f"checkpoint-{step}" for step in range(2, 13, 2)]


def test_what_a_death_between_two_renames_left_is_put_right(tmp_path: Path) -> None:
    for name in ("checkpoint-2.old", "checkpoint-4", "checkpoint-4.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    finish_replacing(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "checkpoint-2",
        "checkpoint-2.old",
        "checkpoint-4",
        "checkpoint-4",
    ]


def test_a_folder_is_flushed_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    original = os.fsync

    def fsync(descriptor: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    partial = unfinished(tmp_path / "checkpoint-1")
    partial.mkdir()
    (partial / "weights").write_text("1")
    (partial / "inner").mkdir()
    (partial / "inner" / "shard").write_text("2")
    seal(partial, tmp_path / "checkpoint-1")
    assert set(events[:-1]) == {"weights", "shard", "inner", "checkpoint-1.partial"}
    assert events[-1] == tmp_path.name
    assert (tmp_path / "checkpoint-1" / "inner" / "shard").read_text() == "2"


def test_unfinished_checkpoints_are_passed_over_and_removed_when_training_begins(
    run: Run, tmp_path: Path, undisturbed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    shutil.rmtree(out / "checkpoint-12")
    (out / "checkpoint-10").rename(out / "checkpoint-10.partial")
    (out / "result.partial").mkdir()
    (out / "notes.partial").mkdir()  # not one of ours
    run(resume_from_checkpoint=True)
    said = capfd.readouterr().err
    assert "checkpoint-10.partial was interrupted while it was written" in said
    assert "resuming from" in said
    assert f"{out / 'checkpoint-8'}." in said.replace("\n", "")
    assert [path.name for path in out.glob("*.partial")] == ["notes.partial"]
    assert result(out) == result(undisturbed)


def test_a_refused_run_removes_nothing(run: Run, tmp_path: Path, undisturbed: Path) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    (out / "checkpoint-14.partial").mkdir()
    with pytest.raises(UsageError):
        run(resume_from_checkpoint=True, seed=2)
    assert (out / "checkpoint-14.partial").is_dir()


@pytest.mark.parametrize("change", ["cut short", "gone"])
@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_config.json", "trainer_state.json"])
def test_a_checkpoint_that_lost_part_of_a_file_is_passed_over(
    name: str, change: str, undisturbed: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    file = out / "checkpoint-12" / name
    if change == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    assert missing_files(out / "checkpoint-12") == [name]
    assert newest_complete(out) == out / "checkpoint-10"


def test_paths_in_the_state_are_final_ones(run: Run, place: Path) -> None:
    out = run(eval_file=str(place / "eval.jsonl"), eval_steps=2, load_best_model_at_end=True)
    for path in checkpoints(out):
        text = (path / "trainer_state.json").read_text()
        assert ".partial" not in text
        best = json.loads(text)["best_model_checkpoint"]
        assert best is not None
        assert Path(best).is_dir()


def test_the_best_checkpoint_is_found_again_after_its_folder_was_moved(run: Run, place: Path, tmp_path: Path) -> None:
    """The rate is so high that the loss rises again: the best one is not the last."""
    more = {"eval_file": str(place / "eval.jsonl"), "eval_steps": 2, "load_best_model_at_end": True}
    more |= {"train_mode": "full", "learning_rate": 0.5, "lr_scheduler_type": "constant", "num_train_epochs": 1}
    whole = run("whole", **more)
    best = Path(json.loads((whole / "checkpoint-6" / "trainer_state.json").read_text())["best_model_checkpoint"])
    assert best.name == "checkpoint-2"
    moved = tmp_path / "moved"
    whole.rename(moved)
    shutil.rmtree(moved / "checkpoint-6")
    out = run("moved", resume_from_checkpoint=True, **more)
    assert (out / "model.safetensors").read_bytes() == (out / best.name / "model.safetensors").read_bytes()


def test_a_best_step_whose_checkpoint_failed_is_not_the_best(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        trouble_at(12, CAUSES["optimizer"], patch)
        patch.setattr(
            trained, "save_result", lambda folder, model, tokenizer, best: model.save_weights(folder, tokenizer)
        )
        out = run(eval_file=str(place / "eval.jsonl"), eval_steps=2, load_best_model_at_end=True)
    state = json.loads((out / "checkpoint-10" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 10
    assert result(out) == (out / "checkpoint-10" / "adapter_model.safetensors").read_bytes()


def test_rotation_goes_by_age_and_keeps_what_it_is_told_to(tmp_path: Path) -> None:
    folders = [tmp_path / f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    for age, folder in enumerate(reversed(folders)):  # a run that went on from an earlier checkpoint: 2 is the newest
        folder.mkdir()
        os.utime(folder, (age, age))
    rotate(folders, 2, keep=[folders[0]])
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    rotate(folders[:2], 1, keep=folders[:2])
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    rotate(folders[:2], None, keep=[])
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_a_checkpoint_of_the_model_alone_is_no_place_to_go_on_from(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    out = run(save_only_model=True)
    assert not (out / "checkpoint-4" / "optimizer.pt").exists()
    with pytest.raises(UsageError, match="holds the model alone"):
        run(resume_from_checkpoint=str(out / "checkpoint-4"))
    run(save_only_model=True, resume_from_checkpoint=True)
    said = " ".join(capfd.readouterr().err.split())
    assert "holds the model alone (save_only_model)" in said
    assert "training starts from the beginning" in said
    assert [path.name for path in out.glob("earlier-*")]


def test_the_torch_and_rust_libraries_failures_are_known_as_such(tmp_path: Path) -> None:
    """By their words, as their types say nothing: a new version may choose others."""
    from tiny import tiny_tokenizer

    tensors = {"x": torch.zeros(10_000)}
    writers: list[Callable[[], Any]] = [
        lambda: torch.save(tensors, tmp_path / "x.pt"),
        lambda: safetensors.torch.save_file(tensors, tmp_path / "x.safetensors"),
        lambda: tiny_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json")),
        lambda: (tmp_path / "x.txt").write_text("x" * 10_000),
        lambda: torch.save(tensors, tmp_path / "nowhere" / "x.pt"),
    ]
    for write in writers:
        with trouble(limit(1_000)), pytest.raises(Exception, match=r".") as failure:
            write()
        assert is_write_failure(failure.value), repr(failure.value)


def test_half_a_line_in_the_log_does_no_harm(run: Run, undisturbed: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(undisturbed, tmp_path / "out"))
    shutil.rmtree(out / "checkpoint-12")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    run(resume_from_checkpoint=True)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 13), 12]  # and the line of the whole run
    assert read_metrics(out / "metrics.jsonl")[:10] == read_metrics(undisturbed / "metrics.jsonl")[:10]
