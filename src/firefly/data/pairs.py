"""Preference pairs to tokens: both answers behind one prompt; a prompt that is too long is cut where it hurts least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from firefly.data.encoding import Encoder
from firefly.data.formats import MalformedRecord
from firefly.data.schema import Message, PreferencePair, Rendered, TokenPair
from firefly.data.templates import TemplateFailure


@dataclass(frozen=True)
class PairEncoder:
    """Pairs through the encoder, and their prompts cut to a limit."""

    encoder: Encoder

    def render(self, pair: PreferencePair) -> list[Rendered]:
        """The two texts of a pair.

        Raises:
            TemplateFailure: the template refuses it.
            MalformedRecord: a side has no reply to train.
        """
        sides = [self.encoder.render(side) for side in (pair.chosen, pair.rejected)]
        if any(len(texts) != 1 for texts in sides):
            raise MalformedRecord("nothing in it is trained (no reply, or none that is selected)")
        return [texts[0] for texts in sides]

    def cut_prompt(self, pair: PreferencePair, limit: int) -> TokenPair | None:
        """The pair with a prompt of at most `limit` tokens, or None where none is left.

        What a model is served stays whole: BOS, system prompt and tools stand; the oldest turns go first, as a chat
        that grew too long would lose them, and of the last question the beginning.
        """
        system = [message for message in pair.chosen.messages[:-1] if message.role == "system"]
        turns = [message for message in pair.chosen.messages[:-1] if message.role != "system"]
        cut = None
        for start in [n for n, message in enumerate(turns) if message.role == "user"]:
            cut = self._encode(pair, [*system, *turns[start:]]) or cut
            if cut is not None and cut.prompt <= limit:
                return cut
        if cut is None or turns[-1].role != "user":
            return None
        text = turns[-1].text
        while cut is not None and cut.prompt > limit:
            # Characters per token of the whole prompt, so that a step never takes too much at once.
            text = text[max(1, (cut.prompt - limit) * len(text) // cut.prompt) :]
            if not text.strip():
                return None
            cut = self._encode(pair, [*system, turns[-1].with_text(text)])
        return cut

    def _encode(self, pair: PreferencePair, prompt: Sequence[Message]) -> TokenPair | None:
        """The pair's answers behind another prompt; None where the template refuses that."""
        chosen, rejected = (
            replace(side, messages=(*prompt, side.messages[-1])) for side in (pair.chosen, pair.rejected)
        )
        try:
            sides = self.encoder.encode_rendered(self.render(PreferencePair(chosen, rejected)))
        except TemplateFailure:
            return None
        return TokenPair.of(sides[0], sides[1], pair.margin)

    def cut_tokens(self, pair: TokenPair, limit: int) -> TokenPair:
        """A pair that came as token ids, its prompt cut to the first token (it may be BOS) and the last ones."""
        kept = np.r_[0:1, pair.prompt - limit + 1 : len(pair.input_ids)]
        return TokenPair(pair.input_ids[kept], pair.labels[kept], limit, pair.chosen)
