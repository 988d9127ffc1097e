"""Names that other libraries keep to themselves and we use: each is there, and an upper bound holds its library."""

from __future__ import annotations

import importlib
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

NAMES = {
    # peft: which layer names it takes for experts (models/adapters.py)
    "peft.utils.transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN": {"mixtral": "mixtral"},
    "peft.utils.transformers_weight_conversion._MOE_FUSED_TARGETS": {"qwen2_moe": ...},
    "peft.utils.transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING": {"qwen2_moe": ...},
    # what it wraps modules with (models/kernels, models/unread.py, models/adapter_placement.py)
    "peft.utils.other.ModulesToSaveWrapper._forward_wrapped": None,
    "peft.utils.other.get_pattern_key": None,
    "peft.tuners.tuners_utils.check_target_module_exists": None,
    "peft.tuners.trainable_tokens.TrainableTokensLayer._get_embed_scale": None,
    "peft.tuners.lora.layer.ParamWrapper": None,
    # transformers
    "transformers.integrations.bitsandbytes.Bnb4bitQuantize.convert": None,
    "transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING": {"bitsandbytes_4bit": ...},
    "transformers.trainer_optimizer.is_optimizer_factory": None,
    # its continuous batching, step by step (generation/batched.py)
    "transformers.generation.continuous_batching.requests.RequestState": None,
    "transformers.generation.continuous_batching.continuous_api.ContinuousBatchingManager._create_batch_processor": None,  # noqa: E501
    "transformers.generation.continuous_batching.continuous_api.ContinuousBatchProcessor._generation_step": None,
    "transformers.generation.continuous_batching.continuous_api.ContinuousBatchProcessor.prepare_next_batch": None,
    "transformers.generation.continuous_batching.continuous_api.ContinuousBatchProcessor.update_batch": None,
    "transformers.generation.continuous_batching.model_runner.ModelRunner._sample": None,
}

USED_WITHIN = {
    # a function of theirs → what it has to look at or take
    "transformers.modeling_layers.GradientCheckpointingLayer.__init_subclass__": "_gradient_checkpointing_func",
    "transformers.PreTrainedModel.from_pretrained": "state_dict",
    "transformers.TrainingArguments.n_gpu": "_n_gpu",
    "transformers.PreTrainedModel.set_attn_implementation": "_attn_implementation",
    "transformers.GenerationConfig.from_pretrained": "_from_model_config",
    "transformers.utils.hub.cached_files": "_raise_exceptions_for_missing_entries",
    "transformers.generation.continuous_batching.model_runner.ModelRunner._forward_process_and_sample": (
        "self._sample("
    ),
    "transformers.generation.continuous_batching.input_outputs.ContinuousBatchingIOs.prepare_batch_tensors": (
        "self.requests_in_batch"
    ),
    "accelerate.Accelerator._prepare_fsdp2": "data_ptr",
    "accelerate.Accelerator.clip_grad_norm_": "_models",
    "accelerate.utils.fsdp2_prepare_model": "cpu_ram_efficient_loading",
    "accelerate.state.AcceleratorState.is_fsdp2": "fsdp_plugin",
}


def found(path: str) -> Any:
    """The thing at a dotted path that begins with a module's."""
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            if part in getattr(thing, "__dataclass_fields__", {}):
                return None
            assert hasattr(thing, part), f"{path}: {thing} has no {part}"
            thing = inspect.getattr_static(thing, part) if inspect.isclass(thing) else getattr(thing, part)
        return thing
    raise AssertionError(f"no module of {path}")


@pytest.mark.parametrize("path", NAMES)
def test_a_private_name_is_there(path: str) -> None:
    thing, expected = found(path), NAMES[path]
    for key, value in (expected or {}).items():
        assert key in thing, f"{path} has no {key}"
        assert value is ... or thing[key] == value


@pytest.mark.parametrize("path", USED_WITHIN)
def test_a_private_name_is_used_as_we_take_it_to_be(path: str) -> None:
    thing = found(path)
    thing = getattr(thing, "fget", None) or getattr(thing, "__func__", thing)
    assert USED_WITHIN[path] in inspect.getsource(inspect.unwrap(thing)), f"{path} knows no {USED_WITHIN[path]}"


def test_libraries_whose_private_names_we_use_have_an_upper_bound() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = {re.split(r"[<>=\[]", line)[0]: line for line in project["dependencies"]}
    for library in {path.partition(".")[0] for path in {**NAMES, **USED_WITHIN}}:
        assert "<" in bounds[library], f"pyproject.toml: {bounds[library]}"
