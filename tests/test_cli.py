"""The command line: arguments, exit codes, and that nothing heavy is loaded to answer a question."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import firefly
from firefly.cli import VERBS, main
from firefly.errors import UsageError, VerificationError

LEAST = {"output_dir": "out", "model_name_or_path": "model", "train_file": "data.jsonl"}


HEAVY = ("torch", "transformers", "numpy", "pyarrow", "datasets", "jinja2")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LEAST), encoding="utf-8")
    return path


@pytest.fixture
def trained(monkeypatch) -> list[Any]:
    """Replaces training: the configurations that `train` was called with."""
    calls: list[Any] = []

    class FakeTraining:
        @staticmethod
        def train(config: Any) -> str:
            calls.append(config)
            return config.output_dir

    monkeypatch.setitem(sys.modules, "firefly.training", FakeTraining)
    return calls


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(firefly.__file__).parents[1]), "NO_COLOR": "1"}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)


def test_help_answers_at_once_without_the_heavy_libraries():
    code = (
        "import sys; from firefly.cli import VERBS, main; code = main(['--help']); "
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        answer = python(code)
        seconds.append(time.perf_counter() - started)
        assert answer.returncode == 0, answer.stderr
        assert answer.stderr.strip() == "[]"
        assert all(command in answer.stdout for command in ("train", "merge", "chat"))
        if seconds[-1] < 0.6:
            break
    assert min(seconds) < 0.6


def test_the_help_of_no_command_needs_the_heavy_libraries():
    code = (
        "import sys; from firefly.cli import VERBS, main\n"
        "for verb in VERBS: assert main([verb, '--help']) == 0\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    answer = python(code)
    assert (answer.returncode, answer.stderr.strip()) == (0, "[]")


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("arguments", [[], *([verb] for verb in VERBS), ["runs", "diff"], ["templates", "verify"]])
def test_help_is_whole_in_both_languages(capsys, monkeypatch, arguments, language):
    monkeypatch.setenv("FIREFLY_LANG", language)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    assert main([*arguments, "--help"]) == 0
    shown = capsys.readouterr().out
    assert ("在" in shown or "的" in shown or "训练" in shown) == (language == "zh")
    without_sample = shown.replace("value …", "").replace("[…], …", "")
    assert "…" not in without_sample  # how rich ends a word of Chinese that is too long for its column


def test_the_module_is_the_command() -> None:
    shown = subprocess.run([sys.executable, "-m", "firefly", "--version"], capture_output=True, text=True)
    assert shown.stdout == f"firefly {firefly.__version__}\n"


def test_version_is_one_line(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"firefly {firefly.__version__}\n"


def test_no_command_shows_the_help(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "Usage: firefly" in captured.out + captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "{config}"],
        ["train", "--train_args_file", "{config}"],
        ["train", "--train_args_file={config}"],
        ["train", "--local_rank=0", "--train_args_file", "{config}"],
    ],
)
def test_a_configuration_is_given_by_place_or_as_the_tutorial_does(capsys, trained, config_file, arguments):
    assert main([argument.format(config=config_file) for argument in arguments]) == 0
    assert [config.model.name_or_path for config in trained] == ["model"]
    assert capsys.readouterr().out == "out\n"


@pytest.mark.parametrize(
    "overrides",
    [
        ["--seed", "7", "--learning_rate=1e-4", "--fp16", "--max_steps", "-1", "--output_dir", "a b"],
        ["--fp16", "True", "--output_dir=a b", "--max_steps=-1", "--learning-rate", "1e-4", "--seed", "7"],
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_overrides_may_stand_before_or_after_the_tutorials_option(trained, config_file, overrides, first):
    file = ["--train_args_file", str(config_file)]
    assert main(["train", *(overrides + file if first else file + overrides)]) == 0
    (config,) = trained
    assert (config.training["seed"], config.training["learning_rate"], config.training["max_steps"]) == (7, 1e-4, -1)
    assert config.precision.fp16 is True
    assert config.output_dir == "a b"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train"], "CONFIG"),
        (["train", "missing.json"], "missing.json"),
        (["train", "{config}", "stray"], "stray"),
        (["train", "{config}", "--train_args_file", "other.json"], "{config}"),
        (["train", "--seed", "1", "{config}"], "CONFIG"),
        (["train", "{config}", "--lora_rnk", "8"], "lora_rank"),
        (["train", "{config}", "--lora_rank", "many"], "lora_rank"),
        (["train", "{config}", "--lora_rank"], "lora_rank"),
        (["train", "{config}", "--task_type", "rlhf"], "task_type"),
        (["merge", "--adapter_name_or_path", "a"], "save_path"),
        (["merge", "--adapter_name_or_path", "a", "--save_path", "s", "--bogus"], "bogus"),
        (["chat", "--top_p", "much"], "top_p"),
        (["trian"], "trian"),
    ],
)
def test_a_fault_of_the_input_is_one_message_and_exit_2(capsys, trained, config_file, arguments, named):
    assert main([argument.format(config=config_file) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert named.format(config=config_file) in captured.err
    assert captured.err.lower().count("error") == 1
    assert trained == []


def test_messages_are_chinese_with_firefly_lang_zh(capsys, monkeypatch):
    monkeypatch.setenv("FIREFLY_LANG", "zh")
    assert main(["train", "没有.json"]) == 2
    assert capsys.readouterr().err == "错误： 配置文件 没有.json 不存在。\n"


def test_legacy_notices_stand_on_stderr_before_the_result(capsys, trained, config_file):
    assert main(["train", str(config_file), "--use_unsloth", "true"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "out\n"
    assert captured.err == "note: use_unsloth has no effect any more and is ignored.\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("config.no_file", "{path} does not exist.", path="x"), 2),
        (VerificationError("merge.failed", "{path} differs.", path="x"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(capsys, monkeypatch, trained, config_file, error, code):
    def fail(config: Any) -> None:
        raise error

    monkeypatch.setattr(sys.modules["firefly.training"], "train", fail)
    assert main(["train", str(config_file)]) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error:")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch, trained, config_file):
    def fail(config: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["firefly.training"], "train", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train", str(config_file)])


@pytest.mark.parametrize(
    ("error", "problem"),
    [(MemoryError("cannot allocate 8 GiB\nmore"), "cannot allocate 8 GiB."), (MemoryError(), "MemoryError.")],
)
def test_running_out_of_memory_names_a_remedy(capsys, monkeypatch, trained, config_file, error, problem):
    def fail(config: Any) -> None:
        raise error

    monkeypatch.setattr(sys.modules["firefly.training"], "train", fail)
    with pytest.raises(MemoryError):
        main(["train", str(config_file)])
    message = capsys.readouterr().err
    assert problem in message
    assert "tokens_per_microbatch" in message


def test_a_rank_closes_its_process_group_before_it_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """At the interpreter's end gloo's threads would abort a process whose work is done (pytorch/pytorch#179291)."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments in (["--version"], ["train", str(tmp_path / "none.json")]):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / arguments[0]}", rank=0, world_size=1)
        main(arguments)
        assert not dist.is_initialized()


def test_a_folder_that_may_not_be_written_is_named_without_a_traceback(config_file, monkeypatch, capsys):
    class Refusing:
        @staticmethod
        def train(config: Any) -> str:
            raise PermissionError(errno.EACCES, "Permission denied", "/cache/firefly")

    monkeypatch.setitem(sys.modules, "firefly.training", Refusing)
    assert main(["train", str(config_file)]) == 2
    said = capsys.readouterr().err
    assert "/cache/firefly: Permission denied" in said
    assert "FIREFLY_CACHE" in said


def test_brackets_in_what_is_printed_are_text(capsys):
    from firefly.console import stderr_console, stdout_console

    for make in (stderr_console, stdout_console):
        make().print("runs/[a]/[/x]")
    said = capsys.readouterr()
    assert said.out == said.err == "runs/[a]/[/x]\n"
