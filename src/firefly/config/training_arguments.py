"""What becomes of each field of transformers' `TrainingArguments`: none is dropped in silence.

A field is one of

- honoured: it does here what transformers documents; the test that proves it is named (below tests/),
- translated: Firefly reads it itself, or does what it asks for in a way of its own,
- refused: it would change what a step or its loss means, or asks for what is not done here (exit 2),
- without effect: it changes nothing here; a notice says that a value other than the default is ignored.

Fields that a later transformers has and this table lacks are passed to `TrainingArguments`, with a notice.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from firefly.translation import Phrase


@dataclass(frozen=True)
class Treatment:
    """How one field is treated.

    Attributes:
        how: one of the four.
        by: the test that proves it; what reads it; the message where it is refused; why it changes nothing.
        harmless: values that ask for nothing, besides null and TrainingArguments' default.
    """

    how: Literal["honoured", "translated", "refused", "without effect"]
    by: str | Phrase
    harmless: tuple[Any, ...] = ()


def honoured(test: str, names: str) -> dict[str, Treatment]:
    by = test if "::" in test else f"test_training_arguments.py::{test}"
    return dict.fromkeys(names.split(), Treatment("honoured", by))


def translated(by: str, names: str) -> dict[str, Treatment]:
    return dict.fromkeys(names.split(), Treatment("translated", by))


def refused(name: str, text: str, *harmless: Any) -> dict[str, Treatment]:
    return {name: Treatment("refused", Phrase(text), harmless)}


def without_effect(why: str, names: str, *harmless: Any) -> dict[str, Treatment]:
    return dict.fromkeys(names.split(), Treatment("without effect", why, harmless))


TRAINING_DEFAULTS: dict[str, Any] = {"logging_steps": 10, "report_to": "tensorboard", "optim": "adamw_torch_fused"}
"""Firefly's own choices; the user's file overrides them."""

TRAINING_LIMITS: dict[str, dict[str, float]] = {
    **{name: {"ge": 0} for name in ("learning_rate", "weight_decay", "max_grad_norm", "num_train_epochs")},
    **{name: {"ge": 0} for name in ("warmup_steps", "data_seed", "dataloader_num_workers")},
    "seed": {"ge": 0, "lt": 2**32},  # what numpy's generator takes
    "per_device_eval_batch_size": {"ge": 1},
}
"""What values must be at least (ge) and below (lt), where transformers and torch would refuse them with a traceback."""

FIELDS: dict[str, Treatment] = {
    **translated(
        "Firefly's own key", "output_dir gradient_accumulation_steps gradient_checkpointing resume_from_checkpoint"
    ),
    **translated("Firefly's own key: times the next one, the examples of a step", "per_device_train_batch_size"),
    **translated("Firefly's own key (models.precision)", "bf16 fp16"),
    **translated("gradient_checkpointing, its other name", "activation_checkpointing"),
    **translated(
        "layers are compiled one by one (models.compilation)", "torch_compile torch_compile_backend torch_compile_mode"
    ),
    **translated("a signal always leaves a checkpoint (runs.interruption)", "enable_jit_checkpoint"),
    **translated("early stopping always goes on counting where it was", "restore_callback_states_from_checkpoint"),
    **translated("distributed.backends", "fsdp fsdp_config deepspeed"),
    **translated("the environment of the launcher says it; the key is dropped", "local_rank"),
    **honoured("test_a_run_has_as_many_steps_as_epochs_or_max_steps_say", "num_train_epochs max_steps"),
    **honoured(
        "test_the_rate_of_every_step_is_that_of_transformers_schedule",
        "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps",
    ),
    **honoured("test_an_optimizer_is_the_one_of_its_library", "optim optim_args"),
    **honoured("test_adamw_is_torchs_with_these_settings", "weight_decay adam_beta1 adam_beta2 adam_epsilon"),
    **honoured("test_low_rank_optimizers_get_the_modules_that_are_named", "optim_target_modules"),
    **honoured("test_gradients_are_clipped_and_their_norm_is_logged", "max_grad_norm"),
    **honoured("test_tf32_is_switched", "tf32"),
    **honoured("test_the_saved_model_says_whether_it_caches", "use_cache"),
    **honoured("test_logs_come_when_they_are_asked_for", "logging_strategy logging_steps logging_first_step"),
    **honoured("test_tokens_are_logged_when_they_are_asked_for", "include_num_input_tokens_seen"),
    **honoured("test_a_bar_is_shown_on_a_terminal_unless_it_is_switched_off", "disable_tqdm"),
    **honoured("test_tensorboard_holds_what_was_logged", "report_to"),
    **honoured("test_wandb_is_given_what_it_asks_a_trainer_for", "run_name"),
    **honoured(
        "test_trackio_is_given_its_project_and_spaces",
        "project trackio_space_id trackio_bucket_id trackio_static_space_id hub_private_repo",
    ),
    **honoured("test_evaluations_come_when_they_are_asked_for", "eval_strategy eval_steps eval_delay eval_on_start"),
    **honoured("test_a_checkpoint_of_the_model_alone_has_no_optimizer", "save_only_model"),
    **honoured("test_checkpoints_come_when_they_are_asked_for", "save_strategy save_steps"),
    **honoured("test_the_best_checkpoint_and_the_last_ones_are_kept", "save_total_limit"),
    **honoured(
        "test_the_best_model_is_the_result_by_either_direction",
        "load_best_model_at_end metric_for_best_model greater_is_better",
    ),
    **honoured("test_a_resumed_run_begins_its_epoch_anew_if_told_to", "ignore_data_skip"),
    **honoured("test_full_determinism_is_switched_on", "full_determinism"),
    **honoured("test_train.py::test_the_same_seed_gives_the_same_run_and_another_seed_another", "seed"),
    **honoured("test_train.py::test_data_seed_moves_the_order_alone", "data_seed"),
    **honoured("test_gpu.py::test_a_machine_with_a_gpu_trains_on_its_cpu_if_told_to", "use_cpu"),
    **honoured("test_the_last_incomplete_step_can_be_left_out", "dataloader_drop_last"),
    **honoured(
        "test_the_data_loader_is_given_its_settings",
        "dataloader_num_workers dataloader_persistent_workers dataloader_prefetch_factor",
    ),
    **honoured("test_gpu.py::test_what_goes_to_the_gpu_is_pinned_unless_it_is_switched_off", "dataloader_pin_memory"),
    **honoured(
        "test_ranks_exchange_gradients_with_the_settings_of_ddp",
        "ddp_bucket_cap_mb ddp_broadcast_buffers ddp_backend ddp_timeout",
    ),
    **honoured("test_debug_names_the_module_whose_numbers_overflow", "debug"),
    **without_effect("a step's loss is always the mean over the targets of all ranks", "average_tokens_across_devices"),
    **without_effect("an evaluation computes in the types of training", "bf16_full_eval fp16_full_eval"),
    **without_effect(
        "layers are recomputed in a way of their own",
        "activation_checkpointing_kwargs gradient_checkpointing_kwargs",
        {},
    ),
    **without_effect("it goes with use_liger_kernel, which is refused", "liger_kernel_config", {}),
    **without_effect("memory is freed when a step needs it", "torch_empty_cache_steps"),
    **without_effect("the first rank speaks for all; see log_level", "log_on_each_node"),
    **without_effect("a step that is not finite never counts; see on_nonfinite_loss", "logging_nan_inf_filter", False),
    **without_effect("libraries are quiet while a run trains", "log_level log_level_replica"),
    **without_effect("an evaluation fills microbatches up to tokens_per_microbatch", "per_device_eval_batch_size"),
    **without_effect(
        "an evaluation keeps sums, never logits",
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "include_for_metrics batch_eval_metrics",
    ),
    **without_effect(
        "nothing is uploaded (push_to_hub is refused)",
        "hub_token hub_model_id hub_strategy hub_always_push hub_revision",
    ),
    **without_effect("workers are forked: examples are mapped, never sent", "dataloader_multiprocessing_context"),
    **without_effect("steps come in the planned order", "dataloader_in_order"),
    **without_effect("rows become examples before the loop sees them", "remove_unused_columns", False),
    **without_effect("rows become examples before the loop sees them", "label_names", []),
    **without_effect("rows become examples before the loop sees them", "length_column_name"),
    **without_effect("all parameters that train get gradients in every step", "ddp_find_unused_parameters", False),
    **without_effect("every log has memory_bytes, and the results have the peak", "skip_memory_metrics"),
    **without_effect("firefly train trains", "do_train", True),
    **without_effect("eval_strategy decides", "do_eval", True),
    **without_effect("a run trains and evaluates", "do_predict"),
    **refused("label_smoothing_factor", "{key} = {value} is not supported; remove it.", 0),
    **refused(
        "use_liger_kernel",
        "{key} = {value}: where liger-kernel is installed, its kernels are used on GPUs anyway. Remove the key.",
    ),
    **refused(
        "neftune_noise_alpha",
        "{key} = {value} is not supported: its noise is scaled by the length of a batch, so that a row's "
        "would depend on what it is packed with. Remove it.",
        0,
    ),
    **refused(
        "auto_find_batch_size",
        "{key} = {value} would change how many examples make a step. Remove it: tokens_per_microbatch limits "
        "memory without changing the step.",
    ),
    **refused(
        "save_on_each_node",
        "{key} = {value} is not supported: the first rank saves for all. Remove it, and let output_dir lie on"
        " a disk that all nodes share.",
    ),
    **refused("push_to_hub", "{key} = {value} is not supported; upload output_dir after training."),
    **refused(
        "accelerator_config",
        "{key} = {value} is not supported: Firefly plans steps and their shares of the ranks itself. Remove it.",
        {},
    ),
    **refused(
        "parallelism_config",
        "{key} = {value} is not supported: ranks share the examples of a step (fsdp and deepspeed also the "
        "weights). Remove it.",
        {},
    ),
    **refused(
        "train_sampling_strategy",
        '{key} = {value} is not supported: steps follow the seeded order ("shuffle": false keeps the '
        "file's). Remove it.",
    ),
    **refused(
        "ddp_static_graph",
        "{key} = {value} is not supported: ranks exchange gradients after the last microbatch of a step "
        "alone, which torch takes for another graph. Remove it.",
        False,
    ),
}


@cache
def training_fields() -> dict[str, dataclasses.Field[Any]]:
    """Fields of the installed transformers' TrainingArguments that a run file may set."""
    from transformers import TrainingArguments

    return {spec.name: spec for spec in dataclasses.fields(TrainingArguments) if spec.init}


def training_default(name: str) -> Any:
    """The value of a field that nobody sets."""
    spec = training_fields()[name]
    default = spec.default_factory() if spec.default_factory is not dataclasses.MISSING else spec.default
    return TRAINING_DEFAULTS.get(name, default)


def asks_for_something(name: str, value: Any) -> bool:
    """Whether a value of a field is more than its default, or than what is done anyway."""
    if value is None or value in FIELDS[name].harmless:
        return False
    return name not in training_fields() or value != training_default(name)
