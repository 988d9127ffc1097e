"""Where a run's metrics go besides metrics.jsonl: TensorBoard beside the weights, and the trackers of `report_to`.

transformers has a callback for each tracker. Here is decided which of them run, before any weights are loaded, and what
they are told beyond the training arguments: the manifest.
"""

from __future__ import annotations

import difflib
import json
import netrc
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
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

from firefly.config import bad_type, names_in
from firefly.console import notice
from firefly.errors import UsageError
from firefly.runs.records import mapping, read_object
from firefly.translation import Phrase

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
        raise bad_type("report_to", json.dumps(asked), Phrase("a list of names"))
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
    if name == "swanlab":
        import swanlab  # type: ignore[import-not-found]

        try:
            swanlab.get_run()  # as transformers' callback does before it begins one: 0.7 answers None, 0.10 raises
        except RuntimeError:
            raise UsageError(
                "tracker.unfit",
                "report_to: the installed {name} does not go with this version of transformers. Install one that does: "
                "pip install {package}",
                name=name,
                package=PACKAGES[name][1],
            ) from None
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


# ---- trackers that would ask for a key ----

# Tracker → environment variables each of which answers what it would ask.
ASKING = {
    "wandb": ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"),
    "swanlab": ("SWANLAB_MODE", "SWANLAB_API_KEY"),
}


def never_ask(trackers: Sequence[str]) -> None:
    """A run never waits for somebody to type a key: without one, W&B and SwanLab write their files here (offline).

    Their logins are looked up rather than their packages asked: once asked, W&B keeps the mode it then had.
    """
    for name in trackers:
        if name not in ASKING or any(map(os.environ.get, ASKING[name])) or _logged_in(name):
            continue
        os.environ[f"{name.upper()}_MODE"] = "offline"
        notice(
            "tracker.offline",
            "{name} has no key here, so the run is kept offline: upload it later with {name} sync. To report at "
            "once, run {name} login first, or set {variable}.",
            name=name,
            variable=f"{name.upper()}_API_KEY",
        )


def _logged_in(name: str) -> bool:
    """Whether a netrc file has a login for W&B's server; SwanLab keeps that for its one server in a file of its own."""
    host = None
    places = [f"{os.environ.get('SWANLAB_SAVE_DIR') or '~/.swanlab'}/.netrc"]
    if name == "wandb":
        host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
        places = [os.environ.get("NETRC") or "~/.netrc", "~/.netrc", "~/_netrc"]
    for place in places:
        with suppress(OSError, netrc.NetrcParseError):
            logins = netrc.netrc(Path(place).expanduser())
            if logins.hosts if host is None else logins.authenticators(host):
                return True
    return False


# ---- what trackers are told ----


class ManifestReporter(TrainerCallback):
    """Tells trackers the manifest of the run, run.json: Firefly's own keys, the choices made, hashes and versions.

    Put behind the trackers' callbacks, which open the run that is told it.
    """

    def __init__(self, output_dir: Path, boards: Sequence[TensorBoardCallback]) -> None:
        self.path = output_dir / "run.json"
        self.boards = boards

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        manifest = read_object(self.path)
        for board in self.boards:
            if board.tb_writer is not None:
                text = json.dumps(manifest, indent=2, ensure_ascii=False)
                board.tb_writer.add_text("run.json", "    " + text.replace("\n", "\n    "))  # Markdown's code
        values = flat_manifest(manifest)
        for name in args.report_to:
            if name in ("wandb", "trackio"):
                import_module(name).config.update(values, allow_val_change=True)
            elif name == "swanlab":
                import_module(name).config.update(values)
            elif name == "mlflow":  # an artifact: its parameters are short, and some of these are not
                import_module(name).log_dict(values, "firefly.json")


def flat_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a tracker's table of runs has columns for, as `firefly/KEY`: configuration, choices, hashes, versions."""
    sections = {"": "config", "resolved/": "resolved", "hashes/": "hashes", "versions/": "versions"}
    values = {
        f"firefly/{prefix}{name}": value
        for prefix, section in sections.items()
        for name, value in mapping(manifest.get(section)).items()
    }
    return values | {f"firefly/{name}": manifest.get(name) for name in ("firefly_commit", "world_size", "total_steps")}
