"""Which trackers a run reports to, that none ever asks for a key, and that each is told what the run was."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from firefly.console import take_notices
from firefly.errors import UsageError
from firefly.runs import trackers
from firefly.runs.trackers import ManifestReporter, choose_trackers, flat_manifest, never_ask
from run_folders import PASSPORT, write_run


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The modules that can be found; a test adds to them and takes away."""
    modules = {"tensorboard", "mlflow"}
    monkeypatch.setattr(trackers, "find_spec", lambda name: name if name in modules else None)
    take_notices()
    return modules


@pytest.mark.parametrize(
    ("asked", "given", "expected"),
    [
        ("tensorboard", False, ["tensorboard"]),
        ("tensorboard", True, ["tensorboard"]),
        ("none", True, []),
        (["none"], True, []),
        ("mlflow", True, ["tensorboard", "mlflow"]),
        (["mlflow", "tensorboard"], True, ["mlflow", "tensorboard"]),
        ("mlflow,tensorboard", True, ["mlflow", "tensorboard"]),
    ],
)
def test_events_are_always_left_unless_none_is_asked_for(installed, asked, given, expected):
    assert choose_trackers(asked, given) == expected
    assert take_notices() == []


def test_all_are_those_that_transformers_finds(installed, monkeypatch):
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: ["mlflow", "tensorboard"])
    assert choose_trackers("all", True) == ["mlflow", "tensorboard"]


@pytest.mark.parametrize(("asked", "given", "expected"), [("tensorboard", False, []), ("mlflow", True, ["mlflow"])])
def test_a_tensorboard_that_nobody_named_may_be_missing(installed, asked, given, expected):
    installed.remove("tensorboard")
    assert choose_trackers(asked, given) == expected
    assert [item["code"] for item in take_notices()] == ["tracker.no_tensorboard"]


@pytest.mark.parametrize(
    ("asked", "code", "named"),
    [
        ("wandb", "tracker.not_installed", "pip install wandb"),
        (["tensorboard", "comet_ml"], "tracker.not_installed", "pip install comet_ml"),
        ("dagshub", "tracker.not_installed", "pip install dagshub mlflow"),
        ("wandbb", "tracker.unknown", "'wandb'"),
        ("kubeflow", "tracker.no_variable", "KUBEFLOW_TRAINER_SERVER_URL"),
        (True, "config.bad_type", "report_to = true"),
    ],
)
def test_a_tracker_that_cannot_be_is_a_fault_of_the_input(installed, monkeypatch, asked, code, named):
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    with pytest.raises(UsageError) as raised:
        choose_trackers(asked, True)
    assert raised.value.code == code
    assert named in str(raised.value)


def test_every_tracker_of_transformers_is_known_with_its_package():
    assert {*trackers.PACKAGES, *trackers.REQUIRED_VARIABLES} == INTEGRATION_TO_CALLBACK.keys()
    assert trackers.ASKING.keys() <= trackers.PACKAGES.keys()


@pytest.mark.parametrize("fits", [True, False])
def test_a_swanlab_that_transformers_cannot_talk_to_is_refused(installed, monkeypatch, fits):
    def get_run() -> None:
        if not fits:
            raise RuntimeError("No active Run. Call swanlab.init() first.")

    installed.add("swanlab")
    monkeypatch.setitem(sys.modules, "swanlab", SimpleNamespace(get_run=get_run))
    if fits:
        assert choose_trackers("swanlab", True) == ["tensorboard", "swanlab"]
        return
    with pytest.raises(UsageError) as raised:
        choose_trackers("swanlab", True)
    assert raised.value.code == "tracker.unfit"


# ---- trackers without a key ----


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> ModuleType:
    """A package of that name with a table of values, and a home without a key."""
    module = ModuleType("wandb")
    module.config = Table()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    variables = ("MODE", "API_KEY", "IDENTITY_TOKEN_FILE", "BASE_URL")
    for name in ("NETRC", *(f"WANDB_{name}" for name in variables)):
        monkeypatch.setenv(name, "")  # so that what is set in a test is undone after it
    take_notices()
    return module


class Table(dict):
    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:  # type: ignore[override]
        assert allow_val_change
        super().update(values)


def mode() -> str:
    return os.environ["WANDB_MODE"]


def test_without_a_key_a_run_is_kept_offline_and_says_so(wandb):
    never_ask(["tensorboard", "wandb"])
    assert mode() == "offline"
    assert [item["code"] for item in take_notices()] == ["tracker.offline"]


@pytest.mark.parametrize("variable", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_with_a_key_a_run_reports_at_once(wandb, monkeypatch, variable):
    monkeypatch.setenv(variable, "x")
    never_ask(["wandb"])
    assert mode() == ""
    assert take_notices() == []


@pytest.mark.parametrize(
    ("machine", "server", "expected"),
    [
        ("api.wandb.ai", "", ""),
        ("wandb.example.org", "", "offline"),
        ("wandb.example.org", "https://wandb.example.org", ""),
        ("api.wandb.ai", "https://wandb.example.org", "offline"),
    ],
)
def test_a_login_counts_for_the_server_it_is_for(wandb, monkeypatch, tmp_path, machine, server, expected):
    (tmp_path / ".netrc").write_text(f"machine {machine}\n  login user\n  password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("WANDB_BASE_URL", server)
    never_ask(["wandb"])
    assert mode() == expected


def test_a_mode_that_the_user_set_stays(wandb, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    never_ask(["wandb"])
    assert mode() == "disabled"


def test_who_does_not_report_to_it_is_left_alone(wandb):
    never_ask(["tensorboard"])
    assert mode() == ""


@pytest.fixture
def swanlab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home without a key of SwanLab's."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("MODE", "API_KEY", "SAVE_DIR"):
        monkeypatch.setenv(f"SWANLAB_{name}", "")
    take_notices()
    return tmp_path


@pytest.mark.parametrize(
    ("variables", "place", "expected"),
    [
        ({}, None, "offline"),
        ({"SWANLAB_API_KEY": "x"}, None, ""),
        ({"SWANLAB_MODE": "local"}, None, "local"),
        ({}, ".swanlab", ""),
        ({"SWANLAB_SAVE_DIR": "~/elsewhere"}, "elsewhere", ""),
        ({"SWANLAB_SAVE_DIR": "~/elsewhere"}, ".swanlab", "offline"),
    ],
)
def test_swanlab_without_a_key_is_kept_offline_too(swanlab, monkeypatch, variables, place, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if place:
        (swanlab / place).mkdir()
        (swanlab / place / ".netrc").write_text("machine https://swanlab.cn\n  login x\n  password y\n")
    never_ask(["swanlab"])
    assert os.environ["SWANLAB_MODE"] == expected
    assert len(take_notices()) == (expected == "offline")


# ---- what trackers are told ----


def test_a_tracker_is_told_the_manifest_in_columns():
    told = flat_manifest(PASSPORT)
    assert told["firefly/lora_rank"] == 64
    assert told["firefly/resolved/precision"] == "float32"
    assert told["firefly/hashes/data"] == "2" * 32
    assert told["firefly/versions/torch"] == "2.13.0"
    assert told["firefly/firefly_commit"] == "5" * 40


def test_rank_0_alone_tells_them(tmp_path, wandb):
    folder = write_run(tmp_path / "run")
    arguments = SimpleNamespace(report_to=["tensorboard", "wandb", "clearml"])
    reporter = ManifestReporter(folder, [])
    reporter.on_train_begin(arguments, SimpleNamespace(is_world_process_zero=False), None)
    assert wandb.config == {}
    reporter.on_train_begin(arguments, SimpleNamespace(is_world_process_zero=True), None)
    assert wandb.config == flat_manifest(json.loads((folder / "run.json").read_text()))
