"""`firefly export`: gguf, ollama, vllm."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Annotated, Any

import typer

from firefly.commands.options import (
    EngineArgumentsOption,
    EngineKeyOption,
    EnginePythonOption,
    EngineUrlOption,
    ForceOption,
    HubOption,
    JsonOption,
    ModelOption,
    RemoteCodeOption,
    imports_without_gc,
)
from firefly.console import print_json

AdapterOption = Annotated[
    str, typer.Option("--adapter_name_or_path", help="Folder of a LoRA or QLoRA adapter to export with its base.")
]
FolderOption = Annotated[str, typer.Option("--save_path", help="Folder to write.")]
TypeOption = Annotated[str, typer.Option("--type", help="f32, f16, bf16, q8_0, q6_k, q5_k_m or q4_k_m.")]

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.command("gguf")
def gguf_command(
    save_path: Annotated[str, typer.Option("--save_path", help="File to write, such as model.gguf.")],
    model_name_or_path: ModelOption = "",
    adapter_name_or_path: AdapterOption = "",
    number_type: TypeOption = "q8_0",
    adapter_alone: Annotated[
        bool, typer.Option("--adapter", help="Write the adapter alone, for llama.cpp's --lora.")
    ] = False,
    as_json: JsonOption = False,
    force: ForceOption = False,
    hub: HubOption = "huggingface",
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """A GGUF file, read back by llama.cpp and compared with the trained model. Exit 3 if it differs."""
    with imports_without_gc():
        from firefly.config import ModelConfig
        from firefly.export.exporting import export_gguf
    model = ModelConfig(name_or_path=model_name_or_path, hub=hub, trust_remote_code=trust_remote_code)
    adapter, kind = adapter_name_or_path or None, number_type.lower()
    show(lambda: export_gguf(model, adapter, save_path, kind, adapter_alone, force), as_json)


@app.command("ollama")
def ollama_command(
    save_path: FolderOption,
    model_name_or_path: ModelOption = "",
    adapter_name_or_path: AdapterOption = "",
    number_type: TypeOption = "q8_0",
    as_json: JsonOption = False,
    force: ForceOption = False,
    hub: HubOption = "huggingface",
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """A folder for ollama create: a GGUF file as above, and a Modelfile that gives the trained prompt."""
    with imports_without_gc():
        from firefly.config import ModelConfig
        from firefly.export.exporting import export_ollama
    model = ModelConfig(name_or_path=model_name_or_path, hub=hub, trust_remote_code=trust_remote_code)
    adapter, kind = adapter_name_or_path or None, number_type.lower()
    show(lambda: export_ollama(model, adapter, save_path, kind, force), as_json)


@app.command("vllm")
def vllm_command(
    save_path: FolderOption,
    model_name_or_path: ModelOption = "",
    adapter_name_or_path: AdapterOption = "",
    unmerged: Annotated[
        bool, typer.Option("--unmerged", help="Serve the adapter over its base, in place of a merged model.")
    ] = False,
    engine_python: EnginePythonOption = "",
    engine_url: EngineUrlOption = "",
    engine_api_key: EngineKeyOption = "",
    engine_arguments: EngineArgumentsOption = "",
    as_json: JsonOption = False,
    force: ForceOption = False,
    hub: HubOption = "huggingface",
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    """A folder and the command by which vLLM serves it as it was trained; vLLM reads it back, where it is named."""
    with imports_without_gc():
        from firefly.config import ModelConfig
        from firefly.export.exporting import export_vllm
        from firefly.generation.vllm import PYTHON_VARIABLE, EngineChoice
    has_engine = engine_python or engine_url or engine_arguments or os.environ.get(PYTHON_VARIABLE)
    choice = EngineChoice(
        "vllm" if has_engine else "transformers", engine_python, engine_url, engine_api_key, engine_arguments
    )
    model = ModelConfig(name_or_path=model_name_or_path, hub=hub, trust_remote_code=trust_remote_code)
    adapter = adapter_name_or_path or None
    show(lambda: export_vllm(model, adapter, save_path, choice, unmerged, force), as_json)


def show(export: Callable[[], dict[str, Any]], as_json: bool) -> None:
    """Export, and print the file's name or the report; the report of a file that failed, too."""
    from firefly.export.proof import ExportFailed

    try:
        report = export()
    except ExportFailed as error:
        if as_json:
            print_json(json.dumps(error.found, ensure_ascii=False))
        raise
    if as_json:
        print_json(json.dumps(report, ensure_ascii=False))
    else:
        print(report["file"])
