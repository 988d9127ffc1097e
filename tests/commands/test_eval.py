"""`firefly eval`: figures of a base and what was tuned of it, shown, printed and kept beside the run."""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import shlex
import sys
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from firefly.cli import main
from firefly.commands.eval import eval_command
from firefly.config import load_config
from firefly.evaluation import benchmarks, evaluations, harness
from firefly.files import cache_folder
from firefly.training import train
from run_folders import write_run
from tiny import save_tiny_model, with_plain_lora

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"question": f"{word} or blue?", "choices": [word, "blue"], "answer": 0} for word in ("red", "one", "天", "地")]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("eval") / "model", "llama")


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with an adapter."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("runs") / "run"
    write_run(folder, {1: 2.0})
    manifest = json.loads((folder / "run.json").read_text("utf-8"))
    manifest["config"]["model_name_or_path"] = str(model)
    (folder / "run.json").write_text(json.dumps(manifest), "utf-8")
    adapted = with_plain_lora(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS * 3), "utf-8")
    return path


def evaluate(*options: object) -> int:
    return main(["eval", *map(str, options), "--template_name", "default", "--dtype", "float32"])


def columns(text: str) -> int:
    return max(sum(1 + (unicodedata.east_asian_width(sign) in "WF") for sign in line) for line in text.splitlines())


def test_an_adapter_is_measured_beside_its_base_and_the_run_shows_it(
    run: Path, model: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--adapter_name_or_path", run, "--tasks", rows, "--json") == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert "mine.jsonl: 12 rows, read as multiple choice among texts" in printed.err
    assert "Custom kwargs" not in printed.err
    acc, norm = found["figures"]
    assert (acc["task"], acc["metric"], norm["metric"], acc["count"]) == ("mine", "acc", "acc_norm", 12)
    assert acc["difference"]["value"] == pytest.approx(acc["tuned"]["value"] - acc["base"]["value"])
    assert acc["verdict"] in ("better", "worse", "no_difference")
    assert (found["base"]["model"], found["tuned"]["adapter"]) == (str(model), str(run))
    (file,) = found["files"]
    assert Path(file).parent == run / "evaluations"
    kept = json.loads(Path(file).read_text("utf-8"))
    assert kept["figures"] == found["figures"]
    first = kept["samples"]["mine"][0]
    assert first["place"].endswith("mine.jsonl:1")
    assert first["base"]["answers"] != first["tuned"]["answers"]

    assert main(["runs", "show", str(run)]) == 0
    shown = capsys.readouterr().out
    assert f"mine acc       {acc['base']['value']:.4f} → {acc['tuned']['value']:.4f}  " in shown
    assert main(["runs", "show", str(run), "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["evaluations"]
    assert listed["task"] == "mine"
    assert "samples" not in listed

    alone = ["--model_name_or_path", model, "--tasks", rows]
    assert evaluate(*alone, "--json") == 0
    single = json.loads(capsys.readouterr().out)
    assert single["base"] is None
    assert single["figures"][0]["tuned"] == acc["base"]
    assert single["files"] == []


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_table_fits_a_terminal_and_two_equal_models_show_no_difference(
    model: Path,
    rows: Path,
    tmp_path: Path,
    language: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FIREFLY_LANG", language)
    questions = tmp_path / "written.jsonl"
    questions.write_text(json.dumps({"question": "red", "answer": "blue"}) + "\n", "utf-8")
    given = ("--model_name_or_path", model, "--base", model, "--save_path", tmp_path / "kept")
    given = (*given, "--tasks", f"{rows},{questions}")
    assert evaluate(*given, "--metric", "exact_match,contains", "--max_new_tokens", 4, "--no_chat_template") == 0
    printed = capsys.readouterr()
    words = {"en": ("no difference", "too few to tell", "plain text"), "zh": ("无差别", "太少，无法判断", "纯文本")}
    for word in words[language]:
        assert word in " ".join(printed.out.split())
    assert "contains" in printed.out
    assert columns(printed.out) <= 80
    assert len(list((tmp_path / "kept").iterdir())) == 2


def described(folder: Path, name: str, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text('{"q": "red", "a": "blue"}\n' * 3, "utf-8")
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{q}}",
        "doc_to_target": " {{a}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        **changes,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(config), "utf-8")
    return folder


def test_a_task_of_ones_own_is_found_by_its_name_and_prepared_in_our_cache(
    model: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "theirs"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", theirs)
    folder = described(tmp_path / "tasks", "blues")
    given = ("--adapter_name_or_path", run, "--include_path", folder, "--tasks", "blues")
    given = (*given, "--save_path", tmp_path / "kept")
    assert evaluate(*given, "--limit", 2, "--json") == 0
    captured = capsys.readouterr()
    figures = {figure["metric"]: figure for figure in json.loads(captured.out)["figures"]}
    assert figures["perplexity"]["count"] == 2
    assert not figures["perplexity"]["higher_is_better"]
    assert figures["acc"]["verdict"] == "too_few"
    assert not theirs.exists()
    assert (cache_folder() / "datasets").is_dir()
    assert theirs == datasets.config.HF_DATASETS_CACHE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dataset_path": "nobody/nothing", "dataset_name": "part", "dataset_kwargs": {}},
            "load_dataset('nobody/nothing', 'part')",
        ),
        ({"metric_list": [{"metric": "unheard_of", "aggregation": "mean", "higher_is_better": True}]}, "unheard_of"),
        ({"unsafe_code": True}, "runs code that the model writes"),
    ],
)
def test_what_keeps_a_task_from_being_asked_is_said_without_a_traceback(
    model: Path, tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = described(tmp_path / "tasks", "broken", **changes)
    assert evaluate("--model_name_or_path", model, "--include_path", folder, "--tasks", "broken") == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    "changes",
    [
        {"process_results": "!function metrics.judge"},
        {"metric_list": [{"metric": "mine", "aggregation": "!function metrics.combine", "higher_is_better": True}]},
    ],
)
def test_a_metric_that_fails_on_answers_is_named_and_its_place_shown_to_whoever_asks(
    model: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judge = {"process_results": "!function metrics.count", **changes}
    folder = described(tmp_path / "tasks", "broken", **judge)
    description = folder / "broken.yaml"
    text = description.read_text("utf-8")
    description.write_text(re.sub(r'"(!function [\w.]+)"', r"\1", text), "utf-8")
    (folder / "metrics.py").write_text(
        "def count(doc, results):\n    return {'mine': 1.0}\n"
        "def judge(doc, results):\n    raise KeyError('label')\n"
        "def combine(items):\n    raise KeyError('label')\n",
        "utf-8",
    )
    given = ("--model_name_or_path", model, "--include_path", folder, "--tasks", "broken")
    assert evaluate(*given) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert "the task broken fails: KeyError: 'label'" in printed
    assert "Traceback" not in printed
    monkeypatch.setenv("FIREFLY_DEBUG", "1")
    with pytest.raises(KeyError):
        evaluate(*given)


def test_a_fault_of_the_model_is_not_laid_on_the_task(model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any, **more: Any) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(harness, "score_continuations", fail)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        evaluate("--model_name_or_path", model, "--tasks", rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", "missing.jsonl"), "missing.jsonl"),
        (("--tasks", " , "), "--tasks names none"),
        (("--tasks", "{rows},{rows}"), "names mine twice"),
        (("--tasks", "{rows}", "--metric", "bertscore"), '--metric = "bertscore" is not valid'),
        (("--tasks", "{rows}", "--limit", "0"), "--limit = 0 is not valid"),
        (("--tasks", "{rows}", "--num_fewshot", "12"), "(11)"),
        (("--tasks", "x", "--include_path", "nowhere"), "is no folder"),
    ],
)
def test_a_wrong_option_ends_with_a_message(
    model: Path, rows: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [option.replace("{rows}", str(rows)) for option in options]
    assert evaluate("--model_name_or_path", model, *given) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "file/below", "long" * 100, "/proc"])
def test_a_folder_that_takes_no_results_is_refused_before_a_model_is_loaded(
    model: Path,
    rows: Path,
    tmp_path: Path,
    place: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluations, "load_for_generation", pytest.fail)
    monkeypatch.setattr(benchmarks, "open_task", pytest.fail)
    (tmp_path / "file").touch()
    given = ("--model_name_or_path", model, "--tasks", rows, "--save_path", tmp_path / place)
    assert evaluate(*given) == 2
    assert place in "".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_file_that_cannot_be_written_loses_no_figures(
    model: Path,
    rows: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = evaluations.atomic_file

    def full(path: Path) -> Any:
        if path.name.startswith("second"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path)

    monkeypatch.setattr(evaluations, "atomic_file", full)
    second = tmp_path / "second.jsonl"
    second.write_bytes(rows.read_bytes())
    kept = tmp_path / "kept"
    given = ("--model_name_or_path", model, "--tasks", f"{rows},{second}", "--save_path", kept, "--limit", 2)
    assert evaluate(*given, *options) == 2
    printed = capsys.readouterr()
    (file,) = kept.iterdir()
    assert file.name.startswith("mine-")
    assert re.search(r"second-[-0-9]+\.json could not be written: No space left", " ".join(printed.err.split()))
    if options:
        found = json.loads(printed.out)
        assert [figure["task"] for figure in found["figures"]] == ["mine", "mine", "second", "second"]
        assert found["files"] == [str(file)]
    else:
        assert printed.out.count("second") == 2
        assert str(file) in printed.err


def test_without_lm_eval_the_message_says_how_to_install_it(
    model: Path, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert evaluate("--model_name_or_path", model, "--tasks", rows) == 2
    assert "pip install -e '.[eval]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_misspelt_name_is_answered_with_names_of_lm_evals_tasks(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--model_name_or_path", model, "--tasks", "arc_eazy") == 2
    printed = capsys.readouterr().err
    assert "takes some ten seconds" in printed
    assert "arc_easy" in printed


@pytest.mark.slow
def test_a_folder_of_files_has_their_mean(model: Path, rows: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "val"
    folder.mkdir()
    (folder / "one.jsonl").write_bytes(rows.read_bytes())
    (folder / "two.csv").write_text("question,A,B,answer\n1+1,2,3,A\n2+2,3,4,B\n", "utf-8")
    assert evaluate("--model_name_or_path", model, "--base", model, "--tasks", folder, "--json") == 0
    figures = {(each["task"], each["metric"]): each for each in json.loads(capsys.readouterr().out)["figures"]}
    mean, one, two = (figures[name, "acc"] for name in ("val/", "one", "two"))
    assert mean["is_group"]
    assert mean["count"] == 14
    expected = (12 * one["tuned"]["value"] + 2 * two["tuned"]["value"]) / 14
    assert mean["tuned"]["value"] == pytest.approx(expected)
    assert mean["verdict"] == "no_difference"


def test_the_rows_of_the_page_are_read_as_it_says_and_its_commands_are_real() -> None:
    from firefly.evaluation.own_tasks import read_questions

    texts = [(ROOT / page).read_text("utf-8") for page in ("docs/eval.md", "docs/zh/eval.md")]
    blocks, chinese = (re.findall(r"```json\n(.*?)```", text, re.DOTALL) for text in texts)
    assert blocks == chinese
    kinds = []
    with tempfile.TemporaryDirectory() as folder:
        for number, block in enumerate(blocks):
            path = Path(folder, f"{number}.jsonl")
            path.write_text(block, "utf-8")
            kind, rows = read_questions(path)
            kinds.append(kind)
            assert len(rows) == 2
    assert kinds == ["answers", "letters", "choices"]
    known = {parameter.name for parameter in inspect.signature(eval_command).parameters.values()}
    for text in texts:
        named = set(re.findall(r"--([a-z_]+)", text)) - {"json"}
        assert named <= known
        assert {"base", "no_base", "metric", "fewshot_file", "include_path", "save_path"} <= named


def command_of(page: str) -> str:
    """The one that a reader can run as it stands."""
    text = (ROOT / page).read_text("utf-8")
    text = re.sub(r"<!-- .*? -->\n```bash\n.*?```", "", text, flags=re.DOTALL)
    (command,) = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    return command


@pytest.mark.slow
def test_the_command_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = command_of("docs/eval.md")
    assert command == command_of("docs/zh/eval.md")
    adapter = tmp_path / "output/smollm2-135m-sft-lora"
    changes = {
        "train_file": str(ROOT / "data/dummy_data.jsonl"),
        "output_dir": str(adapter),
        "max_steps": 1,
        "compare": False,
    }
    train(load_config(ROOT / "train_args/sft/lora/smollm2-135m-sft-lora.json", changes))
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(command)
    assert program == "firefly"
    assert main([*arguments, "--limit", "2"]) == 0
    assert "identity" in capsys.readouterr().out
    assert list((adapter / "evaluations").glob("identity-*.json"))


@pytest.mark.slow
def test_a_data_set_that_was_downloaded_elsewhere_is_found_in_the_cache_of_datasets(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = described(
        tmp_path / "tasks", "far", dataset_path="someone/prepared", dataset_name="part", dataset_kwargs={}
    )
    datasets.load_dataset("json", data_files={"test": str(folder / "rows.jsonl")}, cache_dir=str(tmp_path / "prepared"))
    (made,) = (tmp_path / "prepared" / "json").glob("default-*/0.0.0/*/")
    place = tmp_path / "cache" / "someone___prepared" / "part" / "0.0.0" / ("0" * 40)
    place.parent.mkdir(parents=True)
    made.rename(place)
    (place / "json-test.arrow").rename(place / "prepared-test.arrow")
    info = json.loads((place / "dataset_info.json").read_text("utf-8"))
    info |= {"builder_name": "parquet", "dataset_name": "prepared", "config_name": "part"}
    info["splits"]["test"]["dataset_name"] = "prepared"
    (place / "dataset_info.json").write_text(json.dumps(info), "utf-8")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert evaluate("--model_name_or_path", model, "--include_path", folder, "--tasks", "far", "--json") == 0
    assert json.loads(capsys.readouterr().out)["figures"][0]["count"] == 3


def test_a_base_model_without_a_template_is_asked_in_plain_text(
    model: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--model_name_or_path", str(model), "--tasks", str(rows), "--limit", "2"]) == 0
    printed = capsys.readouterr()
    assert "asked in plain text" in printed.out
    assert "--save_path names a folder" in printed.err
