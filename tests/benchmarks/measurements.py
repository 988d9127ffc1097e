"""What a side prints, for tests that need one."""

from __future__ import annotations

import copy
from typing import Any


def result(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "rows": 8,
        "tokens": 100,
        "target_tokens": 60,
        "rows_per_second": 2.0,
        "tokens_per_second": 25.0,
        "peak_memory_bytes": 500,
        "memory_after_imports_bytes": 200,
        "losses": [2.0, 1.8, 1.6, 1.4],
        "settings": {"precision": "float32", "rows_of_a_step_are_consecutive": True},
        "checks": {"gradient_norms": [3.0, 2.0], "input_tokens_agree": True, "target_tokens_agree": True},
        "versions": {"torch": "2"},
        "steady_seconds": 100.0,
    }
    return copy.deepcopy(base) | changes
