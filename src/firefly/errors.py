"""The ways a command can end other than well."""

from __future__ import annotations

from collections.abc import Mapping

from firefly.translation import Phrase


class FireflyError(Exception):
    """An error that the user can act on: printed as one message, without a traceback.

    Attributes:
        code: names the fault for programs, whatever the language and the wording.
        phrase: the message; `str(error)` is its text.
    """

    exit_code = 2

    def __init__(self, code: str, text: str, /, **values: object) -> None:
        super().__init__(code, text)
        self.code = code
        self.phrase = Phrase(text, **values)

    @property
    def values(self) -> Mapping[str, object]:
        """What the message names."""
        return self.phrase.values

    def __str__(self) -> str:
        return str(self.phrase)


class UsageError(FireflyError):
    """The input (configuration, data, paths) is at fault. Exit code 2."""

    exit_code = 2


class VerificationError(FireflyError):
    """A check, a verification or an export found problems. Exit code 3."""

    exit_code = 3
