"""Liger's own kernels under Triton's interpreter, which needs no GPU: `liger_cases.py`, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_ligers_kernels_give_the_results_of_the_models_own_modules() -> None:
    missing = [name for name in ("triton", "liger_kernel") if importlib.util.find_spec(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} not installed"
        if os.environ.get("FIREFLY_CI") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    # Triton reads the variable when it is imported, so that it is set for one process and no other test sees it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    cases = Path(__file__).with_name("liger_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)]
    done = subprocess.run(command, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    assert "skipped" not in done.stdout
