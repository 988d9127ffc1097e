"""`firefly train`: from a configuration to a trained model, in one straight line."""

from __future__ import annotations

from pathlib import Path

from firefly.before_after import compare_with_before, measure_before
from firefly.config import Config
from firefly.console import stderr_console
from firefly.loop import begin, fit
from firefly.run import open_run
from firefly.runs.manifest import recorded_end
from firefly.runs.memory import keep_freed_memory
from firefly.runs.plots import drawn_at_end
from firefly.runs.webhook import told_of_end
from firefly.saving import save_result
from firefly.setup.banner import show_before_training
from firefly.setup.build import build_model
from firefly.setup.records import write_records, write_results
from firefly.threads import threads_of_checkpoint
from firefly.translation import translate


def train(config: Config) -> Path:
    """Train as configured; return the directory that holds the result.

    Raises:
        UsageError: the configuration, the data or the checkpoint to continue from is at fault, and nothing was trained;
            or a loss was not a number, or the disk did not take the result: checkpoints are there.
        Interrupted: a signal stopped the run between two steps, and left a checkpoint.
    """
    told = told_of_end(config.webhook, Path(config.output_dir).expanduser())
    # folder, lock, precision, tokenizer, template, data; then the ranks join
    with told, open_run(config) as run, threads_of_checkpoint(run.stored_threads):
        model, facts = build_model(run)  # weights → adapter → kernels → tuned microbatches → backend
        show_before_training(run, model, facts)
        write_records(run, model, facts)
        keep_freed_memory(run.device)
        with recorded_end(run.folder), drawn_at_end(run.folder):
            training = begin(run, model)
            measure_before(training)
            outcome = fit(training)
            save_result(run.folder, model, run.tokenizer, outcome.best)
            write_results(run, facts, outcome.results)
        compare_with_before(training, outcome)  # the run is finished, whatever becomes of this
        stderr_console().print(translate("done: the result is in {path}", path=run.folder), soft_wrap=True)
        return run.folder
