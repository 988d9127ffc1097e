"""What several commands take."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from firefly.errors import UsageError

HUBS = ("huggingface", "modelscope")

ANY_KEY = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings of a command that takes every key of the configuration as an option."""

ConfigArgument = Annotated[str, typer.Argument(help="JSON or YAML file; every key can be given as --key value too.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON value on standard output.")]
ModelOption = Annotated[
    str, typer.Option("--model_name_or_path", help="Model folder, hub id, or smollm2-135m-instruct.")
]
AdapterOption = Annotated[str, typer.Option("--adapter_name_or_path", help="Folder of a LoRA or QLoRA adapter.")]


def known_hub(name: str) -> str:
    """
    Raises:
        UsageError: there is no such hub.
    """
    if name not in HUBS:
        raise UsageError(
            "config.bad_choice",
            "{key} = {value} is not valid; choose one of: {choices}.",
            key="hub",
            value=repr(name),
            choices=", ".join(HUBS),
        )
    return name


HubOption = Annotated[str, typer.Option("--hub", help="huggingface or modelscope.", callback=known_hub)]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Go on although the template is not the one that was trained.")
]
TemplateOption = Annotated[
    str, typer.Option("--template_name", help="auto (saved with the model), a name, or a .jinja file.")
]
FourBitOption = Annotated[bool, typer.Option("--load_in_4bit", help="Hold the weights in NF4.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto (as in training), float32, bfloat16 or float16.")]
RemoteCodeOption = Annotated[bool, typer.Option("--trust_remote_code", help="Run code that the model brings along.")]
EngineOption = Annotated[str, typer.Option("--engine", help="What computes the answers: transformers or vllm.")]
EnginePythonOption = Annotated[
    str, typer.Option("--engine_python", help="Interpreter of an environment that has vLLM, which is started on it.")
]
EngineUrlOption = Annotated[str, typer.Option("--engine_url", help="Address of a vLLM server that runs already.")]
EngineKeyOption = Annotated[str, typer.Option("--engine_api_key", help="API key of the server at --engine_url.")]
EngineArgumentsOption = Annotated[
    str, typer.Option("--engine_arguments", help="More arguments for vLLM's own command line, in quotes.")
]


def given_configuration(context: typer.Context, config: str) -> tuple[str, dict[str, Any]]:
    """The configuration file ("" where none is named), and the keys that are given as --key value.

    An option that typer does not know stands among the arguments: one in front of the file takes its place.
    """
    from firefly.config import parse_overrides

    if config.startswith("--"):
        return "", parse_overrides([config, *context.args])
    return config, parse_overrides(context.args)


def refuse_below(*options: tuple[str, float | None, float]) -> None:
    """
    Args:
        options: the name of each, its value (None: not given), and its least one.

    Raises:
        UsageError: a value is below its least one.
    """
    for option, value, least in options:
        if value is not None and value < least:
            raise UsageError(
                "generation.bad_setting",
                "--{option} = {value} is not valid: {expected}.",
                option=option,
                value=value,
                expected=f"≥ {least}",
            )


@contextmanager
def imports_without_gc() -> Iterator[None]:
    """For the import of torch and transformers: no garbage is looked for in the million objects that it makes and that
    stay, neither while they grow in number (a fifth of the time) nor, from then on, in any later collection."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
