"""`firefly serve`: an OpenAI server for a model and adapters over it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from firefly.commands.options import (
    DtypeOption,
    EngineArgumentsOption,
    EngineKeyOption,
    EngineOption,
    EnginePythonOption,
    EngineUrlOption,
    ForceOption,
    FourBitOption,
    HubOption,
    ModelOption,
    RemoteCodeOption,
    TemplateOption,
    imports_without_gc,
)
from firefly.console import notice
from firefly.errors import UsageError
from firefly.translation import translate

KEYS = "FIREFLY_API_KEY"
"""Environment variable that holds keys, separated by commas: other users of the machine see a command line."""

app = typer.Typer(add_completion=False)


@app.command()
def serve_command(
    model_name_or_path: ModelOption = "",
    adapter_name_or_path: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter_name_or_path",
            help="Folder of an adapter, served under its last part, or NAME=FOLDER; may be given several times.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; beyond this machine only with --api_key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option("--api_key", help="A key that requests must bring; several, or FIREFLY_API_KEY=K1,K2."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option("--cors_origin", help="Pages that may call this server from a browser, as https://host; none."),
    ] = None,
    template_name: TemplateOption = "auto",
    load_in_4bit: FourBitOption = False,
    dtype: DtypeOption = "auto",
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            "--cache_tokens",
            min=64,
            help="Tokens in the key-value cache of each model; by default as many as memory has room for.",
        ),
    ] = None,
    max_requests: Annotated[int, typer.Option("--max_requests", min=1, help="Answers that grow at a time.")] = 64,
    max_queue: Annotated[
        int, typer.Option("--max_queue", min=0, help="Answers that may wait for a place; beyond: error 429.")
    ] = 256,
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", min=1, help="Longest chat answer where a request names none.")
    ] = 500,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="Where a request names none; 0: the likeliest token.")
    ] = 0.35,
    top_p: Annotated[float, typer.Option("--top_p", help="Where a request names none.")] = 0.9,
    max_body: Annotated[int, typer.Option("--max_body", min=1024, help="Largest request, in bytes.")] = 4 << 20,
    request_timeout: Annotated[
        float, typer.Option("--request_timeout", min=0.1, help="Seconds within which a request is answered.")
    ] = 600.0,
    client_timeout: Annotated[
        float, typer.Option("--client_timeout", min=0.1, help="Seconds that a client may keep the server waiting.")
    ] = 30.0,
    drain_timeout: Annotated[
        float, typer.Option("--drain_timeout", min=0, help="Seconds for open requests after SIGTERM or Ctrl-C.")
    ] = 30.0,
    engine: EngineOption = "transformers",
    engine_python: EnginePythonOption = "",
    engine_url: EngineUrlOption = "",
    engine_api_key: EngineKeyOption = "",
    engine_arguments: EngineArgumentsOption = "",
    force: ForceOption = False,
    hub: HubOption = "huggingface",
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    keys = read_keys(api_key or [])
    origins = tuple(cors_origin or ())
    need_packages()
    from firefly.server.running import LOCAL_NAMES, bind, is_loopback, serve

    if not keys and not is_loopback(host):
        raise UsageError(
            "serve.no_key",
            "--host {host} lets other machines in, and that takes a key: give --api_key, or {variable} in the "
            "environment.",
            host=host,
            variable=KEYS,
        )
    if not keys and "*" in origins:
        raise UsageError(
            "serve.any_origin",
            "--cors_origin * lets every page that a browser opens use this server, and that takes a key: give "
            "--api_key, or name the pages.",
        )
    sock = bind(host, port)  # before the minutes that a model takes to load
    with imports_without_gc():
        from firefly.config import ModelConfig
        from firefly.generation import GenerationSettings, Generator
        from firefly.generation.batched import BatchLimits
        from firefly.generation.loading import named_adapters
        from firefly.generation.vllm import EngineChoice
        from firefly.server.service import ServerLimits, ServerOptions, Service
    options = ServerOptions(
        limits=ServerLimits(max_requests + max_queue, max_body, client_timeout, request_timeout, drain_timeout),
        defaults=GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p),
        api_keys=keys,
        hosts=None if keys else frozenset({*LOCAL_NAMES, host.lower()}),
        origins=origins,
    )
    model = ModelConfig(name_or_path=model_name_or_path, hub=hub, trust_remote_code=trust_remote_code)
    limits = BatchLimits(cache_tokens=cache_tokens, max_requests=max_requests, max_waiting=max_queue)
    adapters = named_adapters(adapter_name_or_path or [])
    choice = EngineChoice(engine, engine_python, engine_url, engine_api_key, engine_arguments)
    generator = Generator.load(model, adapters, template_name, load_in_4bit, force, limits, dtype, choice)
    for name, reason in generator.unserved.items():
        notice("serve.unserved", "{name} is not served: {reason}.", name=name, reason=reason)
    service = Service(generator, options)
    try:
        serve(service, sock, lambda address: say_ready(address, list(service.models)))
    finally:
        service.close()


def say_ready(address: str, models: Sequence[str]) -> None:
    print(
        translate(
            "Serving {models} at {address}/v1. Ctrl-C ends it when the open requests are answered.",
            models=", ".join(models),
            address=address,
        ),
        file=sys.stderr,
        flush=True,
    )


def need_packages() -> None:
    """Say what to install, where the server's packages are not there."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "serve.no_packages",
            "firefly serve needs the package {package}: pip install 'firefly-llm[serve]'",
            package=error.name,
        ) from None


def read_keys(given: Sequence[str]) -> tuple[str, ...]:
    """The keys that let in, of the command line and of the environment."""
    found = [*given, *filter(None, map(str.strip, os.environ.get(KEYS, "").split(",")))]
    if not all(key.isascii() and key.isprintable() and key == key.strip() and key for key in found):
        raise UsageError("serve.bad_key", "an API key has to be printable ASCII without spaces around it.")
    return tuple(dict.fromkeys(found))
