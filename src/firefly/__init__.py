"""Firefly: from a base model and data to a trained, checked and served model.

What stands in `__all__` is the Python API (docs/api.md). Each name is imported when it is first used, so that
`import firefly` alone costs nothing and the command line answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from firefly.commands.check import check_data
    from firefly.config import Config, ModelConfig, load_config
    from firefly.data.schema import Message
    from firefly.errors import FireflyError, UsageError, VerificationError
    from firefly.export.merge import merge
    from firefly.generation import GenerationSettings, Generator
    from firefly.runs.records import read_run
    from firefly.setup.plan import make_plan
    from firefly.setup.serving_plan import make_serving_plan
    from firefly.training import train

__version__ = "0.1.0"

__all__ = [
    "Config",
    "FireflyError",
    "GenerationSettings",
    "Generator",
    "Message",
    "ModelConfig",
    "UsageError",
    "VerificationError",
    "check_data",
    "load_config",
    "make_plan",
    "make_serving_plan",
    "merge",
    "read_run",
    "train",
]

_HOMES = {
    "check_data": "commands.check",
    "Message": "data.schema",
    "merge": "export.merge",
    "read_run": "runs.records",
    "make_plan": "setup.plan",
    "make_serving_plan": "setup.serving_plan",
    "train": "training",
    **dict.fromkeys(("Config", "ModelConfig", "load_config"), "config"),
    **dict.fromkeys(("FireflyError", "UsageError", "VerificationError"), "errors"),
    **dict.fromkeys(("GenerationSettings", "Generator"), "generation"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'firefly' has no attribute {name!r}")
    return getattr(import_module(f"firefly.{_HOMES[name]}"), name)
