#!/bin/sh
# The GPU cases on one NVIDIA GPU, in under ten minutes and without a network. Arguments go to gpu.py.
# PYTHON names another Python than that of `make setup`, for instance one that has unsloth or liger-kernel.
set -eu
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch sees no NVIDIA GPU here")'
exec "$PYTHON" benchmarks/gpu.py "$@"
