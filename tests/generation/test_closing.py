"""A program that does not close its generator ends all the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tiny import save_tiny_model

PROGRAM = """
import sys
from firefly import GenerationSettings, Generator, Message, ModelConfig
generator = Generator.load(ModelConfig(name_or_path=sys.argv[1]), template_name="default")
settings = GenerationSettings(max_new_tokens=400, ignore_stop_tokens=True)
pieces = generator.stream([Message.of("user", "red")], settings)
next(pieces)
generator.engine.submit(generator.request((5, 6, 7), settings), lambda delta: None)
sys.exit(7)
"""


@pytest.mark.slow
def test_a_program_ends_with_its_own_exit_code_while_answers_are_being_computed(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "llama")
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 7, done.stderr
