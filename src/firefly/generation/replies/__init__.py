"""What a model wrote → what it thought, said and called, in the format of its own chat template.

`ReplyFormat.of` learns the format (`markers`); one parser (`stream`) serves whole and streamed replies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from firefly.data.templates import ChatTemplate
from firefly.data.tool_calls import Identify
from firefly.generation.replies.calls import Tools
from firefly.generation.replies.markers import Markers, learn_markers, probe_replies, shown_reply, written_reply
from firefly.generation.replies.pieces import CallDelta, CallDropped, ContentDelta, Piece, ReasoningDelta, Reply
from firefly.generation.replies.stream import ReplyStream

__all__ = [
    "CallDelta",
    "CallDropped",
    "ContentDelta",
    "Piece",
    "ReasoningDelta",
    "Reply",
    "ReplyFormat",
    "ReplyStream",
    "Tools",
]


@dataclass(frozen=True)
class ReplyFormat:
    """How a template's model writes replies.

    Attributes:
        identify: makes the identifiers of calls that have none in the text, where the template is particular.
    """

    markers: Markers
    identify: Identify | None = None

    @classmethod
    def of(cls, template: ChatTemplate) -> ReplyFormat:
        """Learn it by rendering; takes some 50 ms, so keep it as long as the template."""
        style = template.call_style
        learnt = cls(learn_markers(template), style.identify if style else None)
        if learnt.markers.calls is None or learnt._reads_back(template):
            return learnt
        return replace(learnt, markers=replace(learnt.markers, calls=None))

    def _reads_back(self, template: ChatTemplate) -> bool:
        """Whether the template's own calls are read as they were written."""
        for reply in probe_replies():
            written = written_reply(template, reply) or shown_reply(template, reply)
            if written is not None and reply.tool_calls and not reply.text:
                read = self.parse(written.text, prompt_tail=written.prompt)
                if [call["function"] for call in read.tool_calls] != [call["function"] for call in reply.tool_calls]:
                    return False
        return True

    @property
    def has_calls(self) -> bool:
        """Whether calls are found. They are not where a template writes none, or in a way that is not known."""
        return self.markers.calls is not None or self.markers.by_channel

    def parse(self, text: str, tools: Tools | None = (), prompt_tail: str | None = None, reply_id: str = "") -> Reply:
        """Take a whole reply apart.

        Args:
            text: as decoded, special tokens spelled out, without the stop token.
            tools: what may be called: types of arguments whose text shows none, and names, where no marker announces a
                call. Empty: not known. None: nothing may be called, and what looks like a call stays text.
            prompt_tail: the end of the prompt, which may have opened a thought; None: the template's own.
            reply_id: goes into the identifiers of calls that have none in the text, so that they are not those of
                another reply.
        """
        stream = self.stream(tools, prompt_tail, reply_id)
        return Reply.of([*stream.feed(text), *stream.finish()])

    def stream(self, tools: Tools | None = (), prompt_tail: str | None = None, reply_id: str = "") -> ReplyStream:
        """A parser for a reply that comes in parts; its arguments are those of `parse`."""
        tail = self.markers.prompt_tail if prompt_tail is None else prompt_tail
        return ReplyStream(self.markers, self.identify, tools, tail, reply_id)
