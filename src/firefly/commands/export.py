"""`firefly export`: gguf, ollama, vllm."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from firefly.commands.options import (
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
    report = export_gguf(model, adapter_name_or_path or None, save_path, number_type.lower(), adapter_alone, force)
    show(report, as_json)


def show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(json.dumps(report, ensure_ascii=False))
    else:
        print(report["file"])
