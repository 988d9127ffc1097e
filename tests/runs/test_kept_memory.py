"""What a process keeps between steps."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from firefly.runs.memory import KERNEL_CACHES, cap_onednn_cache

GROWTH = """
import ctypes, sys, torch
from firefly.runs.memory import cap_onednn_cache

cap_onednn_cache(int(sys.argv[1]))
torch.set_num_threads(1)
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
Info = type("Info", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names.split()]})
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
weight, taken = torch.ones(48, 32), []
for tokens in range(16, 216):
    torch.ops.mkldnn._linear_pointwise(torch.ones(tokens, 32), weight, None, "none", [], "")
    taken.append(mallinfo().uordblks)
print(taken[-1] - taken[50])
"""
"""Bytes that a process has more after 200 shapes of one product than after 50."""


def test_the_code_of_products_long_past_is_dropped() -> None:
    def growth(kept: int) -> int:
        own = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}
        done = subprocess.run([sys.executable, "-c", GROWTH, str(kept)], capture_output=True, text=True, env=own)
        if "mallinfo2" in done.stderr or "_linear_pointwise" in done.stderr:
            pytest.skip("needs glibc 2.33 and oneDNN")
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert growth(32) < growth(1024) / 4


def test_what_the_user_has_said_of_the_caches_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KERNEL_CACHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(KERNEL_CACHES[0], "7")
    cap_onednn_cache(99)
    assert [os.environ[name] for name in KERNEL_CACHES] == ["7", "99"]
