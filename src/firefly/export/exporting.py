"""`firefly export`: a format is written, read back by the engine that will run it, compared, and kept if it agrees."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gguf import Keys

from firefly.config import ModelConfig
from firefly.console import notice
from firefly.data.encoding import Encoder
from firefly.errors import UsageError
from firefly.export.agreement import Agreement, Limits, read_back
from firefly.export.battery import Battery
from firefly.export.gguf import check_numbers, convert, convert_adapter, quantize
from firefly.export.gguf_file import read_head, set_metadata
from firefly.export.llamacpp import LlamaCpp, is_installed
from firefly.export.merge import base_type, merge
from firefly.export.ollama import write_modelfile
from firefly.export.proof import LIMITS, Stages, check_type, named_if_it_fails, settle
from firefly.export.source import MERGED, Source, open_source
from firefly.export.vllm import Base, open_read_back, write_vllm
from firefly.export.vllm_parsers import begins_with_thought
from firefly.files import unfinished
from firefly.generation.loading import base_name
from firefly.generation.settings import GenerationSettings
from firefly.generation.vllm import EngineChoice
from firefly.models.loading import generation_config, read_config, resolve_model
from firefly.models.saved_adapter import open_adapter
from firefly.models.serving_memory import context_of
from firefly.runs.folders import RESULT
from firefly.runs.manifest import write_json
from firefly.runs.records import read_object

UNQUANTISED = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
ADAPTER_TYPE = "f32"
"""Of an adapter as GGUF; its base is proved in F16."""
EXPORTED = {"Modelfile", "Modelfile.failed", "serve.sh", "serve.sh.failed", "model.gguf", "model.gguf.failed"}
"""One of these stands in a folder that an earlier export has filled."""
LARGEST_CONTEXT = 8192
"""Tokens of context in a Modelfile: Ollama makes its cache for all of them at once."""


def export_gguf(
    model: ModelConfig,
    adapter: str | None,
    save_path: str,
    number_type: str = "q8_0",
    adapter_alone: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Write a model, or base and adapter, as a GGUF file that llama.cpp was seen to answer from as it was trained.

    Args:
        number_type: of `LIMITS`.
        adapter_alone: write the adapter, for llama.cpp's --lora over its base.

    Returns:
        What was found (docs/export.md), also written beside the file.

    Raises:
        UsageError: model, adapter, type or path are at fault, or a package is missing.
        VerificationError: the file is not the trained model; it is kept with ".failed" behind its name.
    """
    check_type(number_type)
    target = file_to_write(Path(save_path).expanduser())
    if adapter_alone and adapter is None:
        raise UsageError(
            "export.no_adapter", "--adapter writes an adapter as GGUF: name it with --adapter_name_or_path."
        )
    stages = Stages()
    with stages.stage("trained model"):
        source = open_source(model, adapter, force)
    return make_gguf(source, target, number_type, adapter_alone, stages)


def export_ollama(
    model: ModelConfig, adapter: str | None, save_path: str, number_type: str = "q8_0", force: bool = False
) -> dict[str, Any]:
    """Write a folder that `ollama create` makes a model of: a verified GGUF file, and a Modelfile that gives the
    trained prompt.

    Raises:
        UsageError: as `export_gguf`; or the model has no chat template.
        VerificationError: the file, or what the Modelfile makes of conversations, is not what was trained.
    """
    check_type(number_type)
    folder = folder_to_fill(Path(save_path).expanduser())
    target = file_to_write(folder / "model.gguf")
    stages = Stages()
    with stages.stage("trained model"):
        source = open_source(model, adapter, force)
    if source.encoder is None:
        raise UsageError(
            "export.no_template",
            "{path} has no chat template, so there is nothing for a Modelfile to say. Export a GGUF file (firefly "
            "export gguf).",
            path=source.model.name_or_path,
        )
    report = make_gguf(source, target, number_type, False, stages)
    stops = [source.tokenizer.convert_ids_to_tokens(token) for token in source.battery.stop_ids]
    context = context_of(read_config(source.model))
    with stages.stage("Modelfile"):
        proved = write_modelfile(
            folder / "Modelfile",
            target.name,
            source.encoder,
            stops,
            chat_settings(source.model),
            None if context is None else min(context, LARGEST_CONTEXT),
        )
    report |= {"format": "ollama", "modelfile": proved.as_json(), "seconds": stages.seconds}
    write_json(folder / "model.gguf.json", report)
    return report


def chat_settings(model: ModelConfig) -> dict[str, float | None]:
    """How answers are drawn: as the model's generation_config.json says, or as `firefly chat` does by itself."""
    found = generation_config(model)
    said = {} if found is None else found.to_diff_dict()
    if not said.get("do_sample"):
        default = GenerationSettings()
        return {"temperature": default.temperature, "top_p": default.top_p}
    return {name: said.get(name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}


def export_vllm(
    model: ModelConfig,
    adapter: str | None,
    save_path: str,
    engine: EngineChoice,
    unmerged: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Write a folder that vLLM serves as the model was trained, with the command in its serve.sh.

    Args:
        engine: the vLLM that reads it back; without an interpreter or address the export is not verified.
        unmerged: serve the adapter over its base, which stays where it is; else it is merged into the folder.

    Raises:
        UsageError: model, adapter or folder are at fault, or vLLM does not serve this adapter.
        VerificationError: vLLM does not answer as the trained model does; serve.sh is then named serve.sh.failed.
    """
    stages, merged = Stages(), adapter is not None and not unmerged
    folder = Path(save_path).expanduser()
    if not merged:
        folder_to_fill(folder)
    with stages.stage("trained model"):
        source = open_source(model, adapter, force)
    base, adapters = None, {}
    if merged:
        with stages.stage("merge"):
            merge(source.model, adapter or "", folder, force=force)
    else:
        place = Path(resolve_model(source.model))
        base = Base(
            str(place.resolve()), read_object(place / "config.json"), read_object(place / "generation_config.json")
        )
        adapters = {Path(adapter).name: open_adapter(adapter)} if adapter else {}
    written = write_vllm(
        folder,
        base_name(source.model) if not merged else folder.resolve().name,
        source.tokenizer,
        source.encoder,
        base=base,
        adapters=adapters,
        thinks=begins_with_thought(source.encoder.template, source.tokenizer, source.first_tokens)
        if source.encoder
        else None,
        trust_remote_code=source.model.trust_remote_code,
    )
    limits, found = LIMITS[UNQUANTISED[base_type(source.model)]], None
    if engine.is_vllm:
        with (
            named_if_it_fails(written.script, written.script),
            stages.stage("read back"),
            open_read_back(written, engine) as reader,
        ):
            found = read_back(reader, source.battery, source.expected, limits)
    report = {
        "format": "vllm",
        "type": UNQUANTISED[base_type(source.model)],
        "command": written.command,
        "tool_parser": written.tool_parser,
        "reasoning_parser": written.reasoning_parser,
    }
    return settle(written.script, written.script, folder / "export_report.json", report, found, limits, stages)


def make_gguf(source: Source, target: Path, number_type: str, adapter_alone: bool, stages: Stages) -> dict[str, Any]:
    """Write and prove a GGUF file.

    What is made on the way lies in a folder beside the file, and of that an unfinished merge stays for the next try. An
    earlier file stays until a good one replaces it.
    """
    limits, scratch = LIMITS[number_type], target.with_name(f".{target.name}.export")
    scratch.mkdir(exist_ok=True)
    written = scratch / target.name
    report: dict[str, Any] = {"format": "gguf", "type": number_type}
    try:
        with named_if_it_fails(written, target):
            if adapter_alone:
                limits, base = LIMITS["f16"], scratch / "base.gguf"
                report["type"] = ADAPTER_TYPE
                with stages.stage("convert"):
                    place = Path(resolve_model(source.model))
                    convert(place, base, "f16")
                    convert_adapter(Path(source.adapter or ""), place, written)
                found = _read_gguf(source, base, written, limits, stages, report)
            else:
                report |= _write_gguf(source, written, number_type, scratch, stages)
                found = _read_gguf(source, written, None, limits, stages, report)
        report = settle(target, written, target.with_name(target.name + ".json"), report, found, limits, stages)
    finally:
        if not unfinished(scratch / MERGED / RESULT).exists():
            shutil.rmtree(scratch)
    return report


def _write_gguf(source: Source, written: Path, number_type: str, scratch: Path, stages: Stages) -> dict[str, Any]:
    """Merge, convert, quantise; every number that another type was made of is read back from the disk."""
    with stages.stage("merge"):
        folder = source.folder(scratch)
    stored, name = UNQUANTISED[base_type(ModelConfig(name_or_path=str(folder)))], written.stem
    if number_type in (stored, "f32"):
        with stages.stage("convert"):
            convert(folder, written, number_type, name)
        settle_template(written, source)
        return {}
    whole = scratch / "whole.gguf"
    with stages.stage("convert"):
        convert(folder, whole, stored, name)
    settle_template(whole, source)
    with stages.stage("quantise"):
        types = quantize(whole, written, number_type)
    with stages.stage("numbers"):
        check_numbers(whole, written)
    whole.unlink()
    if types.fallbacks:
        notice(
            "export.fallbacks",
            "{count} tensors have rows that are no multiple of 256 and are in another type than {type} gives them: "
            "{types}.",
            count=len(types.fallbacks),
            type=number_type.upper(),
            types=", ".join(sorted({f"{wanted} → {got}" for wanted, got in types.fallbacks.values()})),
        )
    return {"tensor_types": types.counts, "fallbacks": len(types.fallbacks)}


def settle_template(file: Path, source: Source) -> None:
    """Let the file's template write what it wrote in training whatever llama.cpp tells it.

    llama.cpp gives every template today's `date_string`, which one that asks for none to be there would print, and
    says true or false of `enable_thinking`, where a template may have a third answer for a request that says nothing.
    """
    key = Keys.Tokenizer.CHAT_TEMPLATE
    written = read_head(file).get(key)
    if source.encoder is None or not written:
        return
    template, names = source.encoder.template, []
    if "date_string" in template.text and "strftime_now" not in template.text:
        names.append("date_string")
    if "enable_thinking" in template.text and not any(
        same_prompts(source.battery, replace(source.encoder, template=with_thinking))
        for with_thinking in (
            replace(template, variables=template.variables | {"enable_thinking": value}) for value in (False, True)
        )
    ):
        names.append("enable_thinking")
    opening = "".join(f"{{%- set {name} = nothing_was_said -%}}" for name in names)
    if opening:
        set_metadata(file, {key: opening + written})


def same_prompts(battery: Battery, encoder: Encoder) -> bool:
    """Whether another template gives the battery's prompts."""
    return all(encoder.encode_prompt(row.messages[:-1], row.tools) == list(row.prompt) for row in battery.rows)


def _read_gguf(
    source: Source, file: Path, lora: Path | None, limits: Limits, stages: Stages, report: dict[str, Any]
) -> Agreement | None:
    """What llama.cpp makes of it; None where it is not installed. The report gets the options of llama-server that the
    trained prompt takes."""
    if not is_installed():
        return None
    with stages.stage("read back"):
        longest = max(len(row.ids) for row in source.battery.rows)
        with LlamaCpp.open(file, lora, longest, torch.get_num_threads()) as engine:
            found = read_back(engine, source.battery, source.expected, limits)
            report["options"] = list(engine.options)
    return found


def file_to_write(path: Path) -> Path:
    """The file to write; one that is no GGUF file is left alone.

    Raises:
        UsageError: it is a folder or another kind of file.
    """
    taken = path.is_dir()
    if path.is_file():
        with path.open("rb") as file:
            taken = file.read(4) != b"GGUF"
    if taken or not path.name:
        raise UsageError(
            "export.save_path",
            "save_path = {path} is a folder or a file of another kind. Name a file to write, such as model.gguf.",
            path=path,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def folder_to_fill(path: Path) -> Path:
    """The folder to write into: a new one, an empty one, or that of an earlier export.

    Raises:
        UsageError: it holds something else.
    """
    held = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if path.is_file() or (held and not held & EXPORTED):
        raise UsageError(
            "export.save_folder",
            "save_path = {path} is a file, or a folder that holds something else than an export. Choose another "
            "folder.",
            path=path,
        )
    path.mkdir(parents=True, exist_ok=True)
    return path
