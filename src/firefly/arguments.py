"""What becomes of each field of transformers' `TrainingArguments`: none is dropped in silence.

A field is one of

- honoured: it does here what transformers documents; the test that proves it is named (below tests/),
- translated: Firefly reads it itself, or does what it asks for in a way of its own,
- refused: it would change what a step or its loss means, or asks for what is not done here (exit 2),
- without effect: it changes nothing here; a value other than the default is said to be ignored.

Fields that a later transformers has and this table lacks are handed to `TrainingArguments`, which is said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from firefly.translation import Phrase


@dataclass(frozen=True)
class Treatment:
    """How one field is treated.

    Attributes:
        how: one of the four.
        by: the test that proves it; what reads it; why it changes nothing.
        harmless: values that ask for nothing, besides null and TrainingArguments' default.
    """

    how: Literal["honoured", "translated", "refused", "without effect"]
    by: str
    harmless: tuple[Any, ...] = ()


def honoured(test: str) -> Treatment:
    return Treatment("honoured", test if "::" in test else f"test_training_arguments.py::{test}")


def translated(by: str) -> Treatment:
    return Treatment("translated", by)


def refused(*harmless: Any) -> Treatment:
    return Treatment("refused", "see REFUSALS", harmless)


def without_effect(why: str, *harmless: Any) -> Treatment:
    return Treatment("without effect", why, harmless)


UNREAD = "rows become examples before the loop sees them"
NO_LOGITS = "an evaluation keeps sums, never logits"
NO_UPLOAD = "nothing is uploaded (push_to_hub is refused)"

REFUSALS: Mapping[str, Phrase] = {
    "label_smoothing_factor": Phrase("{key} = {value} is not supported; remove it."),
    "use_liger_kernel": Phrase(
        "{key} = {value}: where liger-kernel is installed, its kernels are used on GPUs anyway. Remove the key."
    ),
    "neftune_noise_alpha": Phrase(
        "{key} = {value} is not supported: its noise is scaled by the length of a batch, so that a row's "
        "would depend on what it is packed with. Remove it."
    ),
    "auto_find_batch_size": Phrase(
        "{key} = {value} would change how many examples make a step. Remove it: tokens_per_microbatch limits "
        "memory without changing the step."
    ),
    "save_on_each_node": Phrase(
        "{key} = {value} is not supported: the first rank saves for all. Remove it, and let output_dir lie on "
        "a disk that all nodes share."
    ),
    "push_to_hub": Phrase("{key} = {value} is not supported; upload output_dir after training."),
    "accelerator_config": Phrase(
        "{key} = {value} is not supported: Firefly plans steps and their shares of the ranks itself. Remove it."
    ),
    "parallelism_config": Phrase(
        "{key} = {value} is not supported: ranks share the examples of a step (fsdp and deepspeed also the "
        "weights). Remove it."
    ),
    "train_sampling_strategy": Phrase(
        '{key} = {value} is not supported: steps follow the seeded order ("shuffle": false keeps the '
        "file's). Remove it."
    ),
    "ddp_static_graph": Phrase(
        "{key} = {value} is not supported: ranks exchange gradients after the last microbatch of a step "
        "alone, which torch takes for another graph. Remove it."
    ),
}
"""Why a field is refused."""

# fmt: off
FIELDS: Mapping[str, Treatment] = {
    "output_dir": translated("Firefly's own key"),
    "per_device_train_batch_size": translated("Firefly's own key: times the next one, the examples of a step"),
    "gradient_accumulation_steps": translated("Firefly's own key"),
    "num_train_epochs": honoured("test_a_run_has_as_many_steps_as_epochs_or_max_steps_say"),
    "max_steps": honoured("test_a_run_has_as_many_steps_as_epochs_or_max_steps_say"),
    "learning_rate": honoured("test_the_rate_of_every_step_is_that_of_transformers_schedule"),
    "lr_scheduler_type": honoured("test_the_rate_of_every_step_is_that_of_transformers_schedule"),
    "lr_scheduler_kwargs": honoured("test_the_rate_of_every_step_is_that_of_transformers_schedule"),
    "warmup_steps": honoured("test_the_rate_of_every_step_is_that_of_transformers_schedule"),
    "optim": honoured("test_an_optimizer_is_the_one_of_its_library"),
    "optim_args": honoured("test_an_optimizer_is_the_one_of_its_library"),
    "weight_decay": honoured("test_adamw_is_torchs_with_these_settings"),
    "adam_beta1": honoured("test_adamw_is_torchs_with_these_settings"),
    "adam_beta2": honoured("test_adamw_is_torchs_with_these_settings"),
    "adam_epsilon": honoured("test_adamw_is_torchs_with_these_settings"),
    "optim_target_modules": honoured("test_low_rank_optimizers_get_the_modules_that_are_named"),
    "average_tokens_across_devices": without_effect("a step's loss is always the mean over the targets of all ranks"),
    "max_grad_norm": honoured("test_gradients_are_clipped_and_their_norm_is_logged"),
    "label_smoothing_factor": refused(0),
    "bf16": translated("Firefly's own key (models.precision)"),
    "fp16": translated("Firefly's own key (models.precision)"),
    "bf16_full_eval": without_effect("an evaluation computes in the types of training"),
    "fp16_full_eval": without_effect("an evaluation computes in the types of training"),
    "tf32": honoured("test_tf32_is_switched"),
    "activation_checkpointing": translated("gradient_checkpointing, its other name"),
    "activation_checkpointing_kwargs": without_effect("layers are recomputed in a way of their own", {}),
    "gradient_checkpointing": translated("Firefly's own key"),
    "gradient_checkpointing_kwargs": without_effect("layers are recomputed in a way of their own", {}),
    "torch_compile": translated("layers are compiled one by one (models.compilation)"),
    "torch_compile_backend": translated("layers are compiled one by one (models.compilation)"),
    "torch_compile_mode": translated("layers are compiled one by one (models.compilation)"),
    "use_liger_kernel": refused(),
    "liger_kernel_config": without_effect("it goes with use_liger_kernel, which is refused", {}),
    "use_cache": honoured("test_the_saved_model_says_whether_it_caches"),
    "neftune_noise_alpha": refused(0),
    "torch_empty_cache_steps": without_effect("memory is freed when a step needs it"),
    "auto_find_batch_size": refused(),
    "logging_strategy": honoured("test_logs_come_when_they_are_asked_for"),
    "logging_steps": honoured("test_logs_come_when_they_are_asked_for"),
    "logging_first_step": honoured("test_logs_come_when_they_are_asked_for"),
    "log_on_each_node": without_effect("the first rank speaks for all; see log_level"),
    "logging_nan_inf_filter": without_effect("a step that is not finite never counts; see on_nonfinite_loss", False),
    "include_num_input_tokens_seen": honoured("test_tokens_are_logged_when_they_are_asked_for"),
    "log_level": without_effect("libraries are quiet while a run trains"),
    "log_level_replica": without_effect("libraries are quiet while a run trains"),
    "disable_tqdm": honoured("test_a_bar_is_shown_on_a_terminal_unless_it_is_switched_off"),
    "report_to": honoured("test_tensorboard_holds_what_was_logged"),
    "run_name": honoured("test_wandb_is_given_what_it_asks_a_trainer_for"),
    "project": honoured("test_trackio_is_given_its_project_and_spaces"),
    "trackio_space_id": honoured("test_trackio_is_given_its_project_and_spaces"),
    "trackio_bucket_id": honoured("test_trackio_is_given_its_project_and_spaces"),
    "trackio_static_space_id": honoured("test_trackio_is_given_its_project_and_spaces"),
    "eval_strategy": honoured("test_evaluations_come_when_they_are_asked_for"),
    "eval_steps": honoured("test_evaluations_come_when_they_are_asked_for"),
    "eval_delay": honoured("test_evaluations_come_when_they_are_asked_for"),
    "per_device_eval_batch_size": without_effect("an evaluation fills microbatches up to tokens_per_microbatch"),
    "prediction_loss_only": without_effect(NO_LOGITS),
    "eval_on_start": honoured("test_evaluations_come_when_they_are_asked_for"),
    "eval_do_concat_batches": without_effect(NO_LOGITS),
    "eval_use_gather_object": without_effect(NO_LOGITS),
    "eval_accumulation_steps": without_effect(NO_LOGITS),
    "include_for_metrics": without_effect(NO_LOGITS),
    "batch_eval_metrics": without_effect(NO_LOGITS),
    "save_only_model": honoured("test_a_checkpoint_of_the_model_alone_has_no_optimizer"),
    "save_strategy": honoured("test_checkpoints_come_when_they_are_asked_for"),
    "save_steps": honoured("test_checkpoints_come_when_they_are_asked_for"),
    "save_on_each_node": refused(),
    "save_total_limit": honoured("test_the_best_checkpoint_and_the_last_ones_are_kept"),
    "enable_jit_checkpoint": translated("a signal always leaves a checkpoint (runs.interruption)"),
    "push_to_hub": refused(),
    "hub_token": without_effect(NO_UPLOAD),
    "hub_private_repo": honoured("test_trackio_is_given_its_project_and_spaces"),
    "hub_model_id": without_effect(NO_UPLOAD),
    "hub_strategy": without_effect(NO_UPLOAD),
    "hub_always_push": without_effect(NO_UPLOAD),
    "hub_revision": without_effect(NO_UPLOAD),
    "load_best_model_at_end": honoured("test_the_best_model_is_the_result_by_either_direction"),
    "metric_for_best_model": honoured("test_the_best_model_is_the_result_by_either_direction"),
    "greater_is_better": honoured("test_the_best_model_is_the_result_by_either_direction"),
    "ignore_data_skip": honoured("test_a_resumed_run_begins_its_epoch_anew_if_told_to"),
    "restore_callback_states_from_checkpoint": translated("early stopping always goes on counting where it was"),
    "full_determinism": honoured("test_full_determinism_is_switched_on"),
    "seed": honoured("test_train.py::test_the_same_seed_gives_the_same_run_and_another_seed_another"),
    "data_seed": honoured("test_train.py::test_data_seed_moves_the_order_alone"),
    "use_cpu": honoured("test_gpu.py::test_a_machine_with_a_card_trains_on_its_cpu_if_told_to"),
    "accelerator_config": refused({}),
    "parallelism_config": refused({}),
    "dataloader_drop_last": honoured("test_the_last_incomplete_step_can_be_left_out"),
    "dataloader_num_workers": honoured("test_the_data_loader_is_given_its_settings"),
    "dataloader_pin_memory": honoured("test_gpu.py::test_what_goes_to_the_card_is_pinned_unless_it_is_switched_off"),
    "dataloader_persistent_workers": honoured("test_the_data_loader_is_given_its_settings"),
    "dataloader_prefetch_factor": honoured("test_the_data_loader_is_given_its_settings"),
    "dataloader_multiprocessing_context": without_effect("workers are forked: examples are mapped, never sent"),
    "dataloader_in_order": without_effect("steps come in the planned order"),
    "remove_unused_columns": without_effect(UNREAD, False),
    "label_names": without_effect(UNREAD, []),
    "train_sampling_strategy": refused(),
    "length_column_name": without_effect(UNREAD),
    "ddp_find_unused_parameters": without_effect("all parameters that train get gradients in every step", False),
    "ddp_bucket_cap_mb": honoured("test_ranks_exchange_gradients_with_the_settings_of_ddp"),
    "ddp_broadcast_buffers": honoured("test_ranks_exchange_gradients_with_the_settings_of_ddp"),
    "ddp_static_graph": refused(False),
    "ddp_backend": honoured("test_ranks_exchange_gradients_with_the_settings_of_ddp"),
    "ddp_timeout": honoured("test_ranks_exchange_gradients_with_the_settings_of_ddp"),
    "fsdp": translated("objectives.engines"),
    "fsdp_config": translated("objectives.engines"),
    "deepspeed": translated("objectives.engines"),
    "debug": honoured("test_debug_names_the_module_whose_numbers_overflow"),
    "skip_memory_metrics": without_effect("every log has memory_bytes, and the results have the peak"),
    "do_train": without_effect("firefly train trains", True),
    "do_eval": without_effect("eval_strategy decides", True),
    "do_predict": without_effect("a run trains and evaluates"),
    "resume_from_checkpoint": translated("Firefly's own key"),
    "local_rank": translated("the environment of the launcher says it; the key is dropped"),
}
# fmt: on


def asks_for_something(name: str, value: Any) -> bool:
    """Whether a value of a field is more than its default, or than what is done anyway."""
    if value is None or value in FIELDS[name].harmless:
        return False
    from transformers import TrainingArguments

    fields = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    if name not in fields:
        return True
    field = fields[name]
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return value != default
