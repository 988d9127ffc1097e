"""The promise of `firefly plan`, on the small real model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from statistics import median

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sft_full", "sft_lora", "sft_qlora", "dpo_lora"])
def test_a_plan_is_within_15_percent_of_what_six_steps_take(shared: Path, case: str) -> None:
    from plan_accuracy import LIMIT, measure

    arguments = Namespace(model="smollm2-135m-instruct", data_dir=shared / "data", fp32=False)
    errors = [measure(case, 6, arguments)["error"]]
    if abs(errors[0]) > LIMIT:  # where blocks come to lie is chance: one run's peak is a tenth off another's
        errors += [measure(case, 6, arguments)["error"] for _ in range(2)]
    assert abs(median(errors)) <= LIMIT, errors
