"""The shapes of the models in train_args/, so that they can be planned for before anything is downloaded.

Each folder of shapes/ has the values of a published config.json and nothing else: no tokenizer, no weights.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

FOLDER = Path(__file__).parent / "shapes"

KNOWN = {
    "qwen/qwen1.5-14b": "qwen1.5-14b",
    "qwen/qwen1.5-14b-chat": "qwen1.5-14b",
    "qwen/qwen3-1.7b": "qwen3-1.7b",
    "qwen/qwen3-1.7b-base": "qwen3-1.7b-base",
    "qwen/qwen3-8b": "qwen3-8b",
    "qwen/qwen3-8b-base": "qwen3-8b-base",
    "huggingfacetb/smollm2-135m-instruct": "smollm2-135m-instruct",
    "smollm2-135m-instruct": "smollm2-135m-instruct",
}
"""Folders by the names that models have on hubs, in small letters."""


def known_shape(name: str) -> Path | None:
    """The folder with a model's config.json, by its name on a hub or a path that ends in it, such as the tutorial's
    /your/model/path/to//Qwen/Qwen1.5-14B."""
    parts = PurePosixPath(name.replace("\\", "/").lower()).parts
    found = KNOWN.get("/".join(parts[-2:]))
    return None if found is None else FOLDER / found
