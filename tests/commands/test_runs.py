"""`firefly runs list | show | diff` as people and programs call them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

import firefly
from firefly.cli import main
from firefly.commands.runs import clock, compare_runs, shown
from firefly.console import notice, take_notices
from firefly.errors import UsageError
from firefly.runs.manifest import describe_error
from firefly.runs.records import read_object, read_run
from run_folders import CONFIG, PASSPORT, RESULTS, write_run

LOSSES = {step: 3.0 - step / 10 for step in range(1, 21)}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A terminal of 80 columns without colours, in a folder of the test's own."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(["runs", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def columns(text: str) -> int:
    """The columns of a terminal that the widest line takes."""
    wide = {"W": 2, "F": 2}
    return max(sum(wide.get(unicodedata.east_asian_width(sign), 1) for sign in line) for line in text.splitlines())


def resolved(**changes: object) -> dict[str, object]:
    return PASSPORT["resolved"] | changes


# ---- list ----


def test_the_list_says_what_became_of_each_run(capsys):
    write_run(Path("output/good"), LOSSES, {20: 1.25})
    write_run(Path("output/bad"), {3: 9.0}, state="failed", started="2026-11-25T11:00:00+0000", results=None)
    code, out, err = run(capsys, "list")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["run", "state", "steps", "loss", "eval_loss", "started", "took"]
    assert lines[1][:5] == ["output/bad", "failed", "3/20", "9.0000", "–"]
    assert lines[2][:5] == ["output/good", "finished", "20/20", "1.0000", "1.2500"]
    assert lines[2][-1] == "0:03:20"
    assert len(lines) == 3


def test_the_list_as_json_is_one_value(capsys):
    write_run(Path("there/good"), LOSSES)
    code, out, _ = run(capsys, "list", "there", "--json")
    (found,) = json.loads(out)
    assert code == 0
    assert (found["path"], found["state"], found["steps"], found["total_steps"]) == ("there/good", "finished", 20, 20)
    assert (found["loss"], found["seconds"], found["model"]) == (1.0, 200.0, "models/tiny")


def test_where_there_is_no_run_the_list_says_what_one_is(capsys):
    code, out, _ = run(capsys, "list")
    assert code == 0
    assert out.startswith("no runs in: .")
    assert json.loads(run(capsys, "list", "--json")[1]) == []


def test_long_names_are_folded_and_not_cut(capsys):
    name = "a-rather-long-name-for-a-run-that-somebody-gave-it-to-tell-it-from-forty-others-of-that-day"
    write_run(Path(name) / name, LOSSES)
    _, out, _ = run(capsys, "list")
    assert columns(out) <= 80
    width = out.index("state")
    assert "".join(line[:width].strip() for line in out.splitlines()[1:]) == f"{name}/{name}"


# ---- show ----


def test_a_run_is_shown_with_everything_that_a_person_asks_for(capsys):
    folder = write_run(Path("output/run"), LOSSES, {10: 2.5, 20: 1.25}, resumed_from="output/run/checkpoint-10")
    for step in (10, 20):
        (folder / f"checkpoint-{step}").mkdir()
    (folder / "checkpoint-10" / "plan.json").touch()
    code, out, err = run(capsys, "show", "output/run")
    assert (code, err) == (0, "")
    shown = " ".join(out.split())
    for text in (
        "finished step 20/20",
        "resumed from output/run/checkpoint-10",
        "learning_rate 0.0001",
        "precision float32",
        'rows 42 kept 38 cut 2 lost {"too_long": 2} tokens 10,000 target_tokens 4,000 train_examples 40',
        "loss 2.9000 → 1.0000 lowest 1.0000 at step 20",
        "eval_loss 2.5000 → 1.2500",
        "train_runtime 0:03:00",
        "peak_memory_bytes 3.00 GiB",
        "10, 20 (incomplete)",
        "bf16 was asked for [here].",
        "torch 2.13.0",
        "cpu AMD EPYC",
        "memory_bytes 8.00 GiB",
        f"firefly_commit {'5' * 40}",
    ):
        assert text in shown
    assert "lora_rank" not in shown  # at its default
    assert columns(out) <= 80


def test_a_failed_run_shows_its_error(capsys):
    error = {"code": "cli.out_of_memory", "type": "OutOfMemoryError", "message": "no [bytes] left"}
    write_run(Path("run"), LOSSES, state="failed", error=error)
    assert "cli.out_of_memory: no [bytes] left" in run(capsys, "show", "run")[1]
    assert json.loads(run(capsys, "show", "run", "--json")[1])["error"] == error


def test_what_a_run_recorded_is_shown_in_the_language_of_the_reader(capsys, monkeypatch):
    monkeypatch.setenv("FIREFLY_LANG", "en")
    take_notices()
    notice("resume.from", "resuming from {path}.", path=Path("out/checkpoint-8"))
    told = [*take_notices(), {"code": "old", "message": "of an earlier version"}, {"text": "{x}", "values": 3}]
    error = describe_error(
        UsageError("config.no_file", "configuration file {path} does not exist.", path=Path("x.json"))
    )
    write_run(Path("run"), LOSSES, state="failed", notices=told, error=error)
    monkeypatch.setenv("FIREFLY_LANG", "zh")
    shown = run(capsys, "show", "run")[1]
    assert "从 out/checkpoint-8 继续训练。" in shown
    assert "config.no_file: 配置文件 x.json 不存在。" in shown
    assert "of an earlier version" in shown
    assert read_object(Path("run/run.json"))["notices"][0]["message"] == "resuming from out/checkpoint-8."


def test_a_run_as_json_has_its_files_and_curves(capsys):
    write_run(Path("run"), {1: 2.0, 2: float("nan")}, {2: 1.5}, results=RESULTS | {"train_loss": float("nan")})
    code, out, _ = run(capsys, "show", "run", "--json")
    found = json.loads(out, parse_constant=pytest.fail)  # NaN is no JSON
    assert code == 0
    assert found["manifest"]["hashes"] == PASSPORT["hashes"]
    assert found["changed"].keys() == CONFIG.keys() - {"task_type", "lora_rank"}  # which are at their defaults
    assert found["curves"] == {"loss": [[1, 2.0], [2, None]], "eval_loss": [[2, 1.5]]}
    assert (found["results"]["train_loss"], found["results"]["steps"]) == (None, 20)
    assert found["data"]["rows"] == 42
    assert "findings" not in found["data"]


@pytest.mark.parametrize("command", ["list", "show", "diff"])
def test_a_bare_run_json_is_enough(capsys, command):
    for name in ("a", "b"):
        Path(name).mkdir()
        Path(name, "run.json").write_text('{"config": {}, "notices": null, "versions": 3, "hashes": []}')
    arguments = {"list": [], "show": ["a"], "diff": ["a", "b"]}[command]
    assert run(capsys, command, *arguments)[0] == 0
    assert json.loads(run(capsys, command, *arguments, "--json")[1])


@pytest.mark.parametrize("arguments", [["show", "nothing"], ["diff", "run", "nothing"], ["diff", "nothing", "run"]])
def test_a_folder_that_is_no_run_is_exit_2_with_a_remedy(capsys, arguments):
    write_run(Path("run"), LOSSES)
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: nothing holds no run")
    assert "firefly runs list" in err


def test_a_folder_to_search_that_is_not_there_is_exit_2(capsys):
    assert run(capsys, "list", "nowhere")[0] == 2


@pytest.mark.parametrize("command", ["list", "show", "diff"])
def test_all_is_chinese_and_fits_with_firefly_lang_zh(capsys, monkeypatch, command):
    monkeypatch.setenv("FIREFLY_LANG", "zh")
    write_run(Path("output/a"), LOSSES, {20: 1.0})
    write_run(Path("output/b"), LOSSES | {20: 2.0}, config={"learning_rate": 1e-5}, hashes={})
    arguments = {"list": [], "show": ["output/a"], "diff": ["output/a", "output/b"]}[command]
    expected = {"list": "已完成", "show": "版本与硬件", "diff": "模型与数据"}[command]
    _, out, _ = run(capsys, command, *arguments)
    assert expected in out
    assert columns(out) <= 80


def test_the_commands_answer_without_the_heavy_libraries(tmp_path):
    write_run(tmp_path / "a", LOSSES)
    heavy = ("torch", "transformers", "numpy", "matplotlib")
    code = (
        "import sys; from firefly.cli import main\n"
        "for command in (['list'], ['show', 'a'], ['diff', 'a', 'a']): assert main(['runs', *command]) == 0\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(firefly.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (59.6, "0:01:00"), (3723, "1:02:03"), (90061, "1d 1:01:01")]
)
def test_a_duration_is_read_like_a_clock(seconds, text):
    assert clock(seconds) == text


# ---- diff ----


def test_what_differs_is_told_by_part(capsys):
    write_run(Path("a"), LOSSES)
    hashes = PASSPORT["hashes"] | {"data": "7" * 32, "base_weights": {"sha256": "8" * 64}}
    write_run(
        Path("b"),
        LOSSES,
        config={"learning_rate": 1e-5, "logging_steps": 1, "beta": 0.5},
        hashes=hashes,
        resolved=resolved(precision="bfloat16", tokens_per_microbatch=99),
        versions=PASSPORT["versions"] | {"numpy": "2", "torch": "2.14.0"},
        firefly_commit="9" * 40,
        world_size=2,
    )
    found = compare_runs(read_run("a"), read_run("b"))
    assert {part: list(pairs) for part, pairs in found.items()} == {
        "settings": ["beta", "logging_steps", "learning_rate"],
        "data": ["base_weights", "data"],
        "choices": ["precision", "tokens_per_microbatch", "world_size"],
        "versions": ["torch", "firefly_commit", "numpy"],
    }
    assert found["settings"]["learning_rate"] == (1e-4, 1e-5)
    assert found["versions"]["numpy"] == (None, "2")  # only one of them recorded it
    code, out, err = run(capsys, "diff", "a", "b")
    assert (code, err) == (0, "")
    assert columns(out) <= 80
    lines = [line.split() for line in out.splitlines()]
    assert ["learning_rate", "0.0001", "1e-05"] in lines
    assert ["base_weights", "4444444444…", "8888888888…"] in lines
    assert ["numpy", "–", "2"] in lines


def test_runs_that_differ_in_nothing_say_so(capsys):
    for name in ("a", "b"):
        write_run(Path(name), LOSSES)
    assert not any(compare_runs(read_run("a"), read_run("b")).values())
    assert "settings, data, choices and versions are the same" in run(capsys, "diff", "a", "b")[1]


def test_a_key_that_only_one_run_names_is_compared_with_the_default_of_the_other():
    write_run(Path("a"), LOSSES, config={"weight_decay": 0.0, "lora_dropout": 0.05})
    write_run(Path("b"), LOSSES)
    write_run(Path("c"), LOSSES, config={"num_train_epochs": 1.0, "max_prompt_length": None, "task_type": "dpo"})
    assert compare_runs(read_run("a"), read_run("b"))["settings"] == {}
    assert compare_runs(read_run("b"), read_run("c"))["settings"] == {
        "task_type": ("sft", "dpo"),
        "max_prompt_length": (512, None),
        "num_train_epochs": (3.0, 1.0),
    }


def test_the_results_stand_side_by_side(capsys):
    write_run(Path("a"), LOSSES, {20: 2.0})
    write_run(Path("b"), LOSSES | {20: float("nan")}, {20: 1.0}, results=RESULTS | {"input_tokens_per_second": 111.0})
    _, out, _ = run(capsys, "diff", "a", "b", "--json")
    found = json.loads(out, parse_constant=pytest.fail)  # NaN is no JSON
    assert (found["a"]["path"], found["b"]["path"]) == ("a", "b")
    assert found["results"]["eval_loss"] == [2.0, 1.0]
    assert found["results"]["tokens_per_second"] == [55.5, 111.0]
    assert found["results"]["loss"] == [1.0, None]
    lines = [line.split() for line in run(capsys, "diff", "a", "b")[1].splitlines()]
    assert ["tokens_per_second", "55.5", "111"] in lines
    assert ["peak_memory_bytes", "3.00", "GiB", "3.00", "GiB"] in lines


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a" * 64, "aaaaaaaaaa…"),
        ("b" * 40 + "+", "bbbbbbbbbb…+"),
        ("c" * 32 + "-train0.25", "cccccccccc…-train0.25"),
        ("a name", "a name"),
        (1e-4, "0.0001"),
        (["q_proj"], '["q_proj"]'),
    ],
)
def test_hashes_are_shown_as_far_as_they_tell(value, text):
    assert shown("", value) == text


# ---- evaluations ----


def test_show_lists_the_newest_evaluation_of_each_task_and_passes_over_damaged_files(capsys):
    write_run(Path("output/good"), LOSSES)
    folder = Path("output/good/evaluations")
    folder.mkdir()
    figure = {"task": "arc", "metric": "acc", "filter": "none", "base": {"value": 0.25}, "tuned": {"value": 0.5}}
    for created, verdict in (("2026-11-25T10:00:00+00:00", "better"), ("2026-11-26T10:00:00+00:00", "no_difference")):
        value = {"task": "arc", "created": created, "figures": [figure | {"verdict": verdict}], "samples": {"arc": []}}
        (folder / f"arc-{created[:10]}.json").write_text(json.dumps(value))
    single = [{"task": "mine", "metric": "chrf", "filter": "strict", "tuned": {"value": 50.0}, "verdict": "too_few"}]
    (folder / "mine-1.json").write_text(json.dumps({"task": "mine", "created": "1", "figures": single}))
    group = [{**each, "tuned": {"value": 0.5}} for each in (figure | {"is_group": True, "task": "both"}, figure)]
    (folder / "both.json").write_text(json.dumps({"task": "both", "created": "1", "figures": group}))
    for name, text in (("cut", '{"task": "arc", "crea'), ("list", "[]"), ("odd", '{"task": "odd", "figures": 3}')):
        (folder / f"{name}.json").write_text(text)
    code, out, err = run(capsys, "show", "output/good")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.partition("\nevaluations\n")[2].splitlines()]
    assert lines[:3] == [
        "arc acc 0.2500 → 0.5000 no difference",
        "both acc 0.2500 → 0.5000",
        "mine chrf (strict) 50.0000 too few to tell",
    ]
    assert not lines[3]
    code, out, _ = run(capsys, "show", "output/good", "--json")
    assert [(each["task"], "samples" in each) for each in json.loads(out)["evaluations"]] == [
        ("arc", False),
        ("both", False),
        ("mine", False),
        ("odd", False),
    ]
