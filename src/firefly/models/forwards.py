"""Our own forwards in a transformers model: the same outputs, less kept for backward, no logits in training."""

from __future__ import annotations

from typing import Any

from firefly.models.adapters import transformers_model
from firefly.models.heads import install_target_head
from firefly.models.kernels.gated_mlp import install_gated_mlps
from firefly.models.kernels.rms_norm import install_rms_norms
from firefly.models.kernels.rotary import install_rotary
from firefly.models.scores import install_score_head, scores


def install_training_forwards(model: Any) -> str:
    """Install what fits of them, adapters being attached already; return how the head is computed (see `heads`)."""
    install_gated_mlps(model)
    install_rms_norms(model)
    install_rotary(transformers_model(model))
    inner = transformers_model(model)
    return install_score_head(inner) if scores(inner) else install_target_head(inner)
