"""Every message that a user reads comes from one catalogue, in English and in Chinese."""

from __future__ import annotations

import os

from firefly.messages.catalogue import CATALOGUE

LANGUAGES = ("en", "zh")


def language() -> str:
    """The language of messages: FIREFLY_LANG, else Chinese for a Chinese locale, else English."""
    chosen = os.environ.get("FIREFLY_LANG", "").lower()
    if not chosen:
        chosen = next((os.environ[name] for name in ("LC_ALL", "LC_MESSAGES", "LANG") if os.environ.get(name)), "")
    return "zh" if chosen.lower().startswith("zh") else "en"


def render(code: str, **values: object) -> str:
    """Return the message `code` in the user's language with its values filled in.

    Values are inserted as they are (never interpreted as a format), so braces in user data stay braces.
    """
    english, chinese = CATALOGUE[code]
    return (chinese if language() == "zh" else english).format(**values)
