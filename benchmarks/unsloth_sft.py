"""Unsloth's side of SFT on a GPU: its model and adapter in TRL's trainer, as its guides have it; prints one JSON line.

Not run yet where this was written: there was no GPU that it would start on.
"""

# Unsloth wants to be imported before what it patches.
import unsloth  # isort: skip

import tempfile
from typing import Any

import torch
from job import Job
from measuring import print_measurement, read_dump, stdout_kept_for_the_result
from row_batches import CountingRows, train_and_measure, whole_row
from side import make_equal, memory_now, parse_side
from trl_sft import make_trainer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Train once as the command line says and print the measurement."""
    job, tuning = parse_side(__doc__)
    memory_after_imports = memory_now(job.device)
    rows = read_dump(job.dump)
    with tempfile.TemporaryDirectory() as output_dir, stdout_kept_for_the_result():
        trainer = make_trainer(job, tuning, rows, make_model(job, tuning.gradient_checkpointing), output_dir)
        make_equal(trainer.model, job)
        collator = CountingRows(trainer.data_collator, whole_row)
        measurement = train_and_measure(
            "unsloth", job, tuning, rows, trainer, collator, memory_after_imports, collate_alone=collator.collator
        )
    print_measurement(measurement)


def make_model(job: Job, checkpointing: bool) -> Any:
    """Load through Unsloth, and let it attach the adapter."""
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        model_name=job.model, max_seq_length=job.max_tokens, dtype=torch.bfloat16, load_in_4bit=job.mode == "qlora"
    )
    return unsloth.FastLanguageModel.get_peft_model(
        model,
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=job.dropout,
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth" if checkpointing else False,
        random_state=job.seed,
    )


if __name__ == "__main__":
    main()
