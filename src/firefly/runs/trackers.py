"""Where a run's metrics go besides metrics.jsonl: TensorBoard beside the weights, and the trackers of `report_to`.

transformers has a callback for each tracker. Here is decided which of them run, before any weights are loaded, and what
they are told beyond the training arguments: the passport.
"""

from __future__ import annotations

import configparser
import difflib
import json
import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    get_available_reporting_integrations,
)

from firefly.config import names_in
from firefly.console import notice
from firefly.errors import UsageError
from firefly.runs.records import mapping, read_object

# Tracker → (modules that it needs, what pip calls them); a name that is not here needs no package.
PACKAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "azure_ml": (("azureml",), "azureml-core"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet_ml"),
    "dagshub": (("dagshub", "mlflow"), "dagshub mlflow"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "'swanlab<0.8'"),
    "tensorboard": (("tensorboard",), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}

# Tracker → an environment variable that its callback cannot do without.
REQUIRED_VARIABLES = {"kubeflow": "KUBEFLOW_TRAINER_SERVER_URL"}


def choose_trackers(asked: Any, given: bool) -> list[str]:
    """The trackers of a run: those of `report_to`, and TensorBoard always, unless the user asks for "none".

    Args:
        asked: the value of `report_to`: a name, several (a list, or separated by commas), "all" that are installed,
            or "none".
        given: whether the user wrote it.

    Raises:
        UsageError: no such tracker, or it is not installed.
    """
    if not isinstance(asked, (str, list, tuple)):
        raise UsageError(
            "config.bad_type",
            "{key} = {value} is not valid: expected {expected}.",
            key="report_to",
            value=json.dumps(asked),
            expected="a list of names",
        )
    names = names_in(asked) if given else []
    if given and names in ([], ["none"]):
        return []
    if names == ["all"]:
        names = get_available_reporting_integrations()
    for name in names:
        _check(name)
    if "tensorboard" in names:
        return names
    if not _installed("tensorboard"):
        notice(
            "tracker.no_tensorboard",
            "tensorboard is not installed, so no events are written (pip install tensorboard).",
        )
        return names
    return ["tensorboard", *names]


def _check(name: str) -> None:
    if name not in INTEGRATION_TO_CALLBACK:
        known = sorted(INTEGRATION_TO_CALLBACK)
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0)[0]
        raise UsageError(
            "tracker.unknown",
            "report_to: {name!r} is unknown; did you mean {near!r}? Known: {known}, all, none.",
            name=name,
            near=near,
            known=", ".join(known),
        )
    if not _installed(name):
        raise UsageError(
            "tracker.not_installed",
            "report_to: {name} is not installed. Install it with: pip install {package}",
            name=name,
            package=PACKAGES[name][1],
        )
    if name == "swanlab" and not _swanlab_fits():
        raise UsageError(
            "tracker.unfit",
            "report_to: the installed {name} does not go with this version of transformers. Install one that does: "
            "pip install {package}",
            name=name,
            package=PACKAGES[name][1],
        )
    variable = REQUIRED_VARIABLES.get(name)
    if variable and not os.environ.get(variable):
        raise UsageError(
            "tracker.no_variable",
            "report_to: {name} needs the environment variable {variable}. Set it, or leave {name} out.",
            name=name,
            variable=variable,
        )


def _installed(name: str) -> bool:
    modules, _ = PACKAGES.get(name, ((), ""))
    return all(find_spec(module) is not None for module in modules)


def _swanlab_fits() -> bool:
    """Whether the swanlab that is installed goes with transformers, whose callback asks for a run before it begins one:
    0.7 answers None, 0.10 raises."""
    import swanlab  # type: ignore[import-not-found]

    try:
        swanlab.get_run()
    except RuntimeError:
        return False
    return True


# ---- trackers that would ask for a key ----


def never_ask(trackers: Sequence[str]) -> None:
    """A run never waits for somebody to type a key: without one, W&B and SwanLab write their files here (offline).

    Their own files are read for that rather than their packages asked: once asked, W&B keeps the mode it then had.
    """
    for name in trackers:
        if name in ASKING and not ASKING[name]():
            os.environ[f"{name.upper()}_MODE"] = "offline"
            notice(
                "tracker.offline",
                "{name} has no key here, so the run is kept offline: upload it later with {name} sync. To report at "
                "once, run {name} login first, or set {variable}.",
                name=name,
                variable=f"{name.upper()}_API_KEY",
            )


def _wandb_knows() -> bool:
    """Whether W&B has been told a mode or a key."""
    settings = _wandb_settings()
    if settings.get("mode") or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(settings.get("base_url", "https://api.wandb.ai")).netloc
    return any(_has_login(place, host) for place in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc") if place)


def _wandb_settings() -> dict[str, str]:
    """What its settings files and the environment say, the later over the earlier."""
    folders = (os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb", f"{os.environ.get('WANDB_DIR') or '.'}/wandb")
    settings: dict[str, str] = {}
    for folder in folders:
        parser = configparser.ConfigParser(interpolation=None)
        with suppress(configparser.Error, OSError, UnicodeDecodeError):
            parser.read(Path(folder, "settings").expanduser(), encoding="utf-8")
            settings |= dict(parser["default"]) if parser.has_section("default") else {}
    variables = {"mode": "WANDB_MODE", "base_url": "WANDB_BASE_URL"}
    return settings | {name: os.environ[variable] for name, variable in variables.items() if os.environ.get(variable)}


def _swanlab_knows() -> bool:
    """Whether SwanLab has been told a mode or a key; it keeps the key of its one server in a netrc of its own."""
    if os.environ.get("SWANLAB_MODE") or os.environ.get("SWANLAB_API_KEY"):
        return True
    return _has_login(f"{os.environ.get('SWANLAB_SAVE_DIR') or '~/.swanlab'}/.netrc")


def _has_login(place: str, host: str | None = None) -> bool:
    """Whether a netrc file holds a login, for `host` if it is named."""
    try:
        logins = netrc.netrc(Path(place).expanduser())
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(logins.hosts if host is None else logins.authenticators(host))


# Tracker → whether it can begin without asking.
ASKING: dict[str, Callable[[], bool]] = {"wandb": _wandb_knows, "swanlab": _swanlab_knows}


# ---- what trackers are told ----


class PassportReporter(TrainerCallback):
    """Tells trackers the passport of the run, run.json: Firefly's own keys, the choices made, hashes and versions.

    Put behind the trackers' callbacks, which open the run that is told it.
    """

    def __init__(self, output_dir: Path, boards: Sequence[TensorBoardCallback]) -> None:
        self.path = output_dir / "run.json"
        self.boards = boards

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        passport = read_object(self.path)
        for board in self.boards:
            if board.tb_writer is not None:
                text = json.dumps(passport, indent=2, ensure_ascii=False)
                board.tb_writer.add_text("run.json", "    " + text.replace("\n", "\n    "))  # Markdown's code
        for name in args.report_to:
            if tell := TOLD.get(name):
                tell(flat_passport(passport))


def flat_passport(passport: Mapping[str, Any]) -> dict[str, Any]:
    """What a tracker's table of runs has columns for, as `firefly/KEY`: configuration, choices, hashes, versions."""
    sections = {"": "config", "resolved/": "resolved", "hashes/": "hashes", "versions/": "versions"}
    values = {
        f"firefly/{prefix}{name}": value
        for prefix, section in sections.items()
        for name, value in mapping(passport.get(section)).items()
    }
    return values | {f"firefly/{name}": passport.get(name) for name in ("firefly_commit", "world_size", "total_steps")}


def _tell_wandb(values: dict[str, Any]) -> None:
    import wandb  # type: ignore[import-not-found]

    wandb.config.update(values, allow_val_change=True)


def _tell_swanlab(values: dict[str, Any]) -> None:
    import swanlab  # type: ignore[import-not-found]

    swanlab.config.update(values)


def _tell_trackio(values: dict[str, Any]) -> None:
    import trackio  # type: ignore[import-not-found]

    trackio.config.update(values, allow_val_change=True)


def _tell_mlflow(values: dict[str, Any]) -> None:
    import mlflow  # type: ignore[import-not-found]

    mlflow.log_dict(values, "firefly.json")  # its parameters are short, and some of these are not


TOLD: dict[str, Callable[[dict[str, Any]], None]] = {
    "wandb": _tell_wandb,
    "swanlab": _tell_swanlab,
    "trackio": _tell_trackio,
    "mlflow": _tell_mlflow,
}
