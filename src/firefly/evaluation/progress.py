"""How far an evaluation is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TextIO

from tqdm import tqdm

from firefly.translation import translate

PAUSE = 10.0
"""Seconds between two lines, where there is no terminal for a bar."""


@dataclass(frozen=True)
class Progress:
    """Of one model, which lines begin with the name of."""

    name: str
    stream: TextIO

    @contextmanager
    def count(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Within the block, what is called with each number of them that are done."""
        shown, done, began = time.monotonic(), 0, time.monotonic()
        bar = None
        if self.stream.isatty():
            bar = tqdm(total=total, desc=f"{self.name}, {label}", file=self.stream, dynamic_ncols=True, leave=False)

        def tick(count: int) -> None:
            nonlocal shown, done
            done += count
            with suppress(OSError):  # a full disk under a log
                if bar is not None:
                    bar.update(count)
                elif time.monotonic() - shown > PAUSE:
                    shown = time.monotonic()
                    left = tqdm.format_interval((shown - began) / done * (total - done))
                    line = f"{self.name}, {label} {done}/{total}  {translate('{time} left', time=left)}"
                    print(line, file=self.stream, flush=True)

        try:
            yield tick
        finally:
            if bar is not None:
                with suppress(OSError):
                    bar.close()
