"""What `from firefly import …` gives, and that the wheel has all of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import firefly
from tiny import save_tiny_model, write_rows

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("docs/api.md", "docs/zh/api.md")


@pytest.mark.parametrize("name", firefly.__all__)
def test_each_name_of_the_api_is_there_and_documented_in_both_languages(name: str) -> None:
    assert getattr(firefly, name).__name__ == name
    for page in PAGES:
        rows = [row.partition(" | ")[0] for row in (ROOT / page).read_text("utf-8").splitlines() if row[:2] == "| "]
        assert any(re.search(rf"`{name}\b", row) for row in rows), page


def test_a_name_that_is_none_of_the_api_is_no_attribute() -> None:
    assert set(firefly.__all__) == set(firefly._HOMES)
    with pytest.raises(AttributeError, match="trian"):
        firefly.trian  # noqa: B018


def test_the_package_alone_imports_nothing_heavy() -> None:
    code = "import sys, firefly; sys.exit(', '.join({'torch', 'transformers', 'numpy', 'typer'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""


@pytest.mark.parametrize("page", PAGES)
def test_the_documented_program_is_the_example(page: str) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
    assert code is not None
    assert code[1] == (ROOT / "examples/api.py").read_text("utf-8")


@pytest.mark.slow
def test_the_wheel_alone_trains_merges_and_answers(tmp_path: Path) -> None:
    """In an environment that has the dependencies of this one, but of Firefly only what the wheel brings."""
    pytest.importorskip("setuptools", minversion="77", reason="the wheel is built with setuptools 77 or newer")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    tracked = subprocess.run(["git", "ls-files", "-z", "src"], cwd=ROOT, capture_output=True, text=True)
    files = tracked.stdout.rstrip("\0").split("\0") if tracked.returncode == 0 else []
    if not files:
        pytest.skip("what belongs into the wheel is what git tracks, and this is no working tree")
    source = tmp_path / "source"
    for name in (*files, "pyproject.toml", "README.md", "LICENSE"):  # building leaves files beside its sources
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    assert {name.removeprefix("src/") for name in files} <= inside

    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)
    (packages,) = (venv / "lib").glob("python*/site-packages")
    dependencies = [path for path in sys.path if path.endswith("-packages")]
    (packages / "dependencies.pth").write_text("\n".join(dependencies), encoding="utf-8")

    save_tiny_model(tmp_path / "model", "llama_tied")
    write_rows(tmp_path / "rows.jsonl", 6)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(*command: str | Path) -> str:
        clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=elsewhere, env=clean, capture_output=True, text=True, errors="replace")
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(python, "-c", "import firefly; print(firefly.__file__)").startswith(str(packages))
    assert "merge" in run(venv / "bin" / "firefly", "--help")
    assert "smollm2" in run(venv / "bin" / "firefly", "templates", "list")
    inputs = (tmp_path / "model", tmp_path / "rows.jsonl")
    keys = ("--model_name_or_path", inputs[0], "--train_file", inputs[1], "--template_name", "default")
    for command in ("check", "plan"):
        assert json.loads(run(venv / "bin" / "firefly", command, *keys, "--json"))
    assert "6 examples" in run(python, ROOT / "examples" / "api.py", *inputs, "result")
    assert (elsewhere / "result" / "merged" / "merge_report.json").is_file()
