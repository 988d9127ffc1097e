"""The parser of a reply that comes in parts: content, reasoning and tool calls as soon as they are certain.

What looks like a call and turns out to be none stays text.
"""

from __future__ import annotations

import re

from firefly.data.tool_calls import Identify
from firefly.generation.replies.calls import BARE_TOKENS, Call, CallReader, Tools
from firefly.generation.replies.markers import CallMarkers, Markers, white_end
from firefly.generation.replies.pieces import CallDropped, ContentDelta, Piece, ReasoningDelta
from firefly.generation.replies.reader import Malformed, Step, shared_end

_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_OPENINGS = ("<|start|>", "<|channel|>", "to=")
_ENDINGS = ("<|end|>", "<|call|>", "<|return|>")
_BORDERS = (*_ENDINGS, "<|start|>")

Text = type[ContentDelta] | type[ReasoningDelta]


class ReplyStream(CallReader):
    """The parser of one reply.

    A call is handed out from when its name is known: its arguments come as they are written. One that is cut off or
    broken later is taken back (`CallDropped`).
    """

    def __init__(
        self, markers: Markers, identify: Identify | None, tools: Tools | None, prompt_tail: str, reply_id: str
    ) -> None:
        super().__init__(tools or (), identify, reply_id)
        self._markers = markers
        self._calls = None if tools is None else markers.calls
        self._offers_calls = tools is not None
        self._prompt_tail = prompt_tail
        self._steps = self._channels() if markers.by_channel else self._reply()
        next(self._steps, None)

    def feed(self, text: str) -> list[Piece]:
        """More text; what is certain now."""
        if text:
            self._text += text
            next(self._steps, None)
        return self._take()

    def finish(self) -> list[Piece]:
        """The reply is over; what was held back."""
        self._ended = True
        next(self._steps, None)
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    # ---- thought, text

    def _reply(self) -> Step[None]:
        thoughts, calls = self._markers.thoughts, self._calls
        if thoughts:
            opened = self._prompt_tail.rstrip().endswith(thoughts.open.strip())
            if opened:
                white = white_end(thoughts.open).removeprefix(white_end(self._prompt_tail))
                self._at = yield from self._white(white, self._at)
            thinks = True
            while thinks:
                # The model may open what its prompt has opened, and a thought may follow an empty one.
                if (start := (yield from self._literal(thoughts.open, self._at))) is not None:
                    self._at, opened = start, True
                thinks = opened and not (yield from self._thought(thoughts.close))
                opened = False
        for lead in self._markers.leads:
            if (start := (yield from self._literal(lead, self._at))) is not None:
                self._at = start
                break
        if calls and (not calls.trigger or calls.trigger in BARE_TOKENS):
            yield from self._bare(calls)
        yield from self._content(calls)

    def _thought(self, close: str) -> Step[bool]:
        """A thought, up to its end; whether it is more than white space."""
        core = close.strip()
        while (place := self._text.find(core, self._at)) < 0:
            if self._ended:
                self._hand_out(len(self._text), ReasoningDelta)
                if self._spoken and self._at < len(self._text):
                    self._pieces.append(ReasoningDelta(self._text[self._at :]))
                self._at = len(self._text)
                break
            self._hand_out(len(self._text) - self._held(core), ReasoningDelta)
            self._forget()
            yield
        else:
            self._hand_out(place, ReasoningDelta)
            white = self._text[self._at : place]
            white = white[: len(white) - shared_end(white, close[: close.index(core)])]
            if self._spoken and white:
                self._pieces.append(ReasoningDelta(white))
            self._at = yield from self._white(white_end(close), place + len(core))
        has_thought, self._spoken = self._spoken, False
        return has_thought

    def _content(self, calls: CallMarkers | None) -> Step[None]:
        trigger = calls.trigger if calls else ""
        trails = [trail.strip() for trail in self._markers.trails if trail.strip()]
        while True:
            place = self._text.find(trigger, self._at) if trigger else -1
            if calls and place >= 0:
                self._hand_out(place, ContentDelta)
                if not (yield from self._section(calls, place)):
                    self._hand_out(place + len(trigger), ContentDelta)
            elif self._ended:
                break
            else:
                self._hand_out(len(self._text) - self._held(trigger, *trails), ContentDelta)
                self._forget()
                yield
        rest = self._text[self._at :]
        for trail in self._markers.trails:
            core = trail.strip()
            kept = rest.rstrip() if core else rest
            if kept.endswith(core):
                kept = kept.removesuffix(core)
                rest = kept[: len(kept) - shared_end(kept, trail[: trail.index(core)] if core else trail)]
                break
        if rest and (rest.strip() or self._spoken or not self._called):
            self._pieces.append(ContentDelta(rest))
        self._at = len(self._text)

    def _hand_out(self, upto: int, kind: Text) -> None:
        """Hand out the text up to a place, but for white space at its end, which may belong to a marker."""
        text = self._text[self._at : upto].rstrip()
        if text:
            self._pieces.append(kind(text))
            self._spoken = True
            self._at += len(text)

    def _forget(self) -> None:
        self._text, self._at = self._text[self._at :], 0

    def _held(self, *markers: str) -> int:
        """How much of the text's end may be the beginning of a marker."""
        text = self._text[self._at :].rstrip()
        white = len(self._text) - self._at - len(text)
        sizes = (size for marker in markers for size in range(len(marker), 0, -1) if text.endswith(marker[:size]))
        return white + max(sizes, default=0)

    # ---- channels

    def _channels(self) -> Step[None]:
        """gpt-oss: messages with a header, which names a channel and, of a call, the function."""
        heard: set[Text] = set()
        while (yield from self._opens_message()):
            while (place := self._text.find("<|message|>", self._at)) < 0 and not self._ended:
                yield
            if place < 0:
                break
            header, body = self._text[self._at : place], place + len("<|message|>")
            recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
            if recipient:
                end = yield from self._called_function(recipient.group(1), body)
                if end is None:
                    break
                self._at = end
            else:
                thinks = channel is not None and channel.group(1) == "analysis"
                kind: Text = ReasoningDelta if thinks else ContentDelta
                self._at = body
                if kind in heard and (yield from self._is_there(body)):
                    self._pieces.append(kind("\n"))
                heard.add(kind)
                yield from self._message(kind)
            for ending in _ENDINGS:
                if (end := (yield from self._literal(ending, self._at))) is not None:
                    self._at = end
                    break
        yield from self._content(None)

    def _opens_message(self) -> Step[bool]:
        for opening in _OPENINGS:
            if (yield from self._literal(opening, self._at)) is not None:
                return True
        return False

    def _message(self, kind: Text) -> Step[None]:
        """The text of a message, up to its end."""
        while True:
            places = [place for ending in _BORDERS if (place := self._text.find(ending, self._at)) >= 0]
            upto = min(places, default=len(self._text) if self._ended else -1)
            ready = upto if upto >= 0 else len(self._text) - self._held(*_BORDERS)
            if ready > self._at:
                self._pieces.append(kind(self._text[self._at : ready]))
                self._at = ready
            if upto >= 0:
                return
            self._forget()
            yield

    def _called_function(self, recipient: str, at: int) -> Step[int | None]:
        call = Call(place=self._at, name=recipient.removeprefix("functions."))
        try:
            if not self._offers_calls:
                raise Malformed
            at = yield from self._skip(at)
            at = yield from self._arguments(at, call)
        except (Malformed, ValueError, RecursionError):
            if call.index is not None:
                self._pieces.append(CallDropped(call.index))
            return None
        self._called, self._spoken = True, False
        return at
