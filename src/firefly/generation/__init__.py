"""From messages to answers."""

from firefly.generation.generator import Answer, GenerationFailed, Generator
from firefly.generation.settings import GenerationSettings

__all__ = ["Answer", "GenerationFailed", "GenerationSettings", "Generator"]
