"""How far a file of prompts is: a bar on a terminal, elsewhere a line now and then, as training shows it."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any

from tqdm import tqdm

from firefly.translation import translate

PAUSE = 10.0
"""Seconds between two lines."""


class RowProgress:
    """Rows answered, tokens a second and the time left, on stderr. Where that is a file on a full disk, it is lost."""

    def __init__(self, rows: int, found: int) -> None:
        self.rows, self.found, self.done = rows, found, found
        self.tokens = 0
        self.began = self.shown = time.monotonic()
        self.bar: tqdm[Any] | None = None

    def __enter__(self) -> RowProgress:
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=self.rows,
                initial=self.found,
                dynamic_ncols=True,
                smoothing=0,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
                file=sys.stderr,
            )
        return self

    def add(self, tokens: int) -> None:
        """A row was answered with so many tokens."""
        self.done, self.tokens = self.done + 1, self.tokens + tokens
        now = time.monotonic()
        pace = f"{self.tokens / max(now - self.began, 1e-9):,.0f} {translate('tokens/s')}"
        with suppress(OSError):
            if self.bar is not None:
                self.bar.set_postfix_str(pace, refresh=False)
                self.bar.update()
            elif now - self.shown > PAUSE:
                self.shown = now
                seconds = (now - self.began) / (self.done - self.found) * (self.rows - self.done)
                left = translate("{time} left", time=tqdm.format_interval(seconds))
                print(f"{translate('rows')} {self.done}/{self.rows}  {pace}  {left}", file=sys.stderr, flush=True)

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            with suppress(OSError):
                self.bar.close()
