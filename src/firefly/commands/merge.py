"""`firefly merge`"""

from __future__ import annotations

from typing import Annotated

import typer

from firefly.commands.options import (
    AdapterOption,
    ForceOption,
    HubOption,
    ModelOption,
    RemoteCodeOption,
    imports_without_gc,
)

app = typer.Typer(add_completion=False)


@app.command()
def merge_command(
    adapter_name_or_path: AdapterOption,
    save_path: Annotated[str, typer.Option("--save_path", help="Folder for the merged model.")],
    model_name_or_path: ModelOption = "",
    onto: Annotated[
        str, typer.Option("--onto", help="original, or dequantized (QLoRA: the weights as trained).")
    ] = "original",
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto (the base model's), float32, bfloat16 or float16.")
    ] = "auto",
    force: ForceOption = False,
    hub: HubOption = "huggingface",
    trust_remote_code: RemoteCodeOption = False,
) -> None:
    with imports_without_gc():
        from firefly.config import ModelConfig
        from firefly.export.merge import merge
    model = ModelConfig(name_or_path=model_name_or_path, hub=hub, trust_remote_code=trust_remote_code)
    print(merge(model, adapter_name_or_path, save_path, onto=onto, dtype=dtype, force=force))
