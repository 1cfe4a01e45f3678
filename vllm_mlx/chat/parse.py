"""What a model writes, as events: its answer, its reasoning, its tool calls.

One state machine for every model family: what differs is in the records of `chat/formats/` and `chat/reasoning.py`.
Text is passed on as soon as it is certain what it is. Any split of the same text gives the same events, up to where
the deltas are cut.
"""

from __future__ import annotations

import hashlib
import re
from types import MappingProxyType

from vllm_mlx.chat.formats import ToolFormat
from vllm_mlx.chat.payloads.actions import Action, Arguments, CallOpen, NotACall, Parsing, Shown, Thought
from vllm_mlx.chat.payloads.channels import ENDS, OPENERS, RECIPIENT_FIRST, read_message
from vllm_mlx.chat.payloads.markers import Markers
from vllm_mlx.chat.payloads.objects import KEYS
from vllm_mlx.chat.payloads.reader import Reader
from vllm_mlx.chat.payloads.tools import ToolSet
from vllm_mlx.chat.reasoning import ReasoningFormat
from vllm_mlx.core.events import Event, ReasoningDelta, TextDelta, ToolCallDelta

_NOTHING_YET = re.compile(r"\s*(<[\w/]*(=[\w.-]*)?)?")
_MAX_NOTHING = 64
_MAX_FAILED = 1_000
"""After so many payloads that were no calls, no more are tried: an output that has as many is none with calls."""
_MAX_CUT_OFF = 16
"""After so many payloads that the end cut off, the rest is text: each of them was read up to the end."""
_NEVER_BEHIND = MappingProxyType(
    {
        "[": r"[^\s{\w.:-]|\s*[\w.:/-]+[^\w.:/(-]",
        "{": rf'[^\s"]|\s*"(?!(?:{"|".join(KEYS)})")[^"\\]{{0,64}}["\\]',
        "<tool_call>": r"\s*<[^f]",
        "<function=": r"[^>\n]{0,128}>\s*(?:[^\s{<]|<[^p/])",
    }
)
"""What no format has behind a bare bracket or a mark: there it begins no call, and is not tried as one."""
_NO_REASONING = ReasoningFormat(name="none")

Running = Parsing[None]


class OutputParser:
    """The output of one choice. `feed` it what the model writes, then `finish`; both return what became certain.

    Args:
        choice: the number that the events carry.
        tools: the request's tools; without them nothing is read as a call.
        tool_format: how the model writes calls; None if it cannot.
        reasoning: how it marks reasoning; None if it does not think.
        prompt_tail: the end of the prompt, behind the last message: if it opens reasoning, the output begins inside.
            None if it is not known: then text is held until a mark shows what it is, or the end shows that it is the
            answer.
        salt: makes the ids of calls differ between requests.
    """

    def __init__(
        self,
        *,
        choice: int = 0,
        tools: ToolSet | None = None,
        tool_format: ToolFormat | None = None,
        reasoning: ReasoningFormat | None = None,
        prompt_tail: str | None = None,
        salt: str = "",
    ) -> None:
        self._choice = choice
        self._tools = tools
        self._format = tool_format if tools is not None else None
        self._reasoning = reasoning or _NO_REASONING
        self._prompt_tail = prompt_tail
        self._salt = salt
        self._reader = Reader()
        self._events: list[Event] = []
        self._num_calls = 0
        self._num_failed = self._num_cut_off = 0
        self._is_thinking = False
        self._space = ""
        """White space at the beginning of a stretch of the answer; dropped if no more than that comes."""
        self._is_blank = True
        """Whether the present stretch of the answer, or of reasoning, has no text yet."""
        self._find_marks()
        self._running = self._run()

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next is reasoning, as far as is known."""
        return self._is_thinking

    @property
    def begins_thinking(self) -> bool:
        """Whether the prompt is known to have opened reasoning."""
        return self._prompt_tail is not None and self._reasoning.leaves_open(self._prompt_tail)

    def feed(self, text: str) -> list[Event]:
        """More of the output."""
        if text:
            self._reader.feed(text)
            next(self._running, None)
        return self._take_events()

    def finish(self) -> list[Event]:
        """The output is complete."""
        self._reader.end()
        for _ in self._running:
            pass
        return self._take_events()

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    # ---- the states ----

    def _run(self) -> Running:
        yield from self._begin()
        while True:
            marks = self._thinking_marks if self._is_thinking else self._answer_marks
            piece, mark = self._reader.advance(marks)
            if mark or not self._is_cut_off(piece):
                self._text(piece)
            if mark:
                self._reader.mark_before(mark)
                yield from self._at_mark(mark)
            elif self._reader.is_over:
                return
            else:
                yield None
            self._reader.mark()

    def _begin(self) -> Running:
        """Find out whether the output begins inside reasoning."""
        form = self._reasoning
        if form.has_channels or (self._format and RECIPIENT_FIRST in self._format.openers):
            if mark := (yield from self._reader.accept(RECIPIENT_FIRST)):
                self._reader.mark_before(mark)
                yield from self._call(mark)
        elif form.opens and self._prompt_tail is not None:
            self._is_thinking = self.begins_thinking
        elif form.opens and form.may_begin_open:
            yield from self._begin_unknown()

    def _begin_unknown(self) -> Running:
        form = self._reasoning
        marks = Markers((*form.opens, *form.closes, *form.ended_by))
        pieces = []
        while True:
            piece, mark = self._reader.advance(marks)
            pieces.append(piece)
            if mark or self._reader.is_over:
                break
            yield None
        if mark in form.closes or mark in form.ended_by:
            self._is_thinking = True
            self._text(_without_label("".join(pieces), form.labels))
            self._reader.mark_before(mark)
            yield from self._at_mark(mark)
        else:
            self._reader.restore()

    def _at_mark(self, mark: str) -> Running:
        form = self._reasoning
        if self._is_thinking and (mark in form.closes or mark in form.ended_by):
            self._turn(is_thinking=False)
            if mark in form.ended_by:
                self._reader.give_back(mark)
        elif mark in form.opens and (self._is_blank or (form.opens_anywhere and not self._is_thinking)):
            self._turn(is_thinking=True)
            if form.labels:
                yield from self._reader.accept(*form.labels)
        elif self._opens_call(mark):
            yield from self._call(mark)
        elif mark in form.dropped or self._is_dropped(mark) or (self._is_blank and mark in form.closes):
            self._turn(is_thinking=self._is_thinking)
        else:
            self._text(mark)

    def _call(self, mark: str) -> Running:
        """Read what a mark may have begun; where that fails, the mark is text and reading goes on behind it."""
        is_settled = False
        try:
            for action in self._payload(mark):
                if action is None:
                    yield None
                    continue
                self._act(action)
                self._reader.mark()
                is_settled = True
        except NotACall:
            self._num_cut_off += self._reader.is_over
            self._num_failed += not is_settled
            self._reader.restore()
            if not is_settled:
                self._not_a_call(mark)
            if self._num_failed == _MAX_FAILED:
                self._tools = self._format = None
                self._find_marks()
        else:
            self._reader.give_back_space()
            self._turn(is_thinking=self._is_thinking)

    def _not_a_call(self, mark: str) -> None:
        self._reader.take(len(mark))
        text, at = self._reader.window()
        is_nothing = self._reader.is_over and len(text) - at < _MAX_NOTHING and _NOTHING_YET.fullmatch(text, at)
        if is_nothing and len(mark) > 1:
            self._reader.take_to(len(text))
        else:
            self._text(mark)

    def _payload(self, mark: str) -> Parsing[None]:
        if self._reasoning.has_channels and mark in (*OPENERS, RECIPIENT_FIRST):
            return read_message(self._reader, mark, tools=self._tools)
        if self._format is None or self._tools is None:
            raise NotACall("no tools")
        return self._format.parse(self._reader, mark, self._tools)

    def _is_cut_off(self, piece: str) -> bool:
        """Whether the output ends, right behind a call, in the middle of what stands between or behind calls."""
        rest = piece.strip()
        if not rest or not self._reader.is_over or not self._num_calls or not self._is_blank or self._format is None:
            return False
        around = [mark or "" for syntax in self._format.calls for mark in (syntax.between, syntax.closing)]
        return any(mark.strip().startswith(rest) for mark in (*self._format.openers, *around))

    # ---- what marks count where ----

    def _find_marks(self) -> None:
        self._answer_marks = Markers(self._marks_in_answer(), never_before=_NEVER_BEHIND)
        self._thinking_marks = Markers(self._marks_in_thinking(), never_before=_NEVER_BEHIND)

    def _marks_in_answer(self) -> list[str]:
        form = self._reasoning
        marks = [*form.opens, *form.closes, *form.dropped]
        if form.has_channels:
            marks += [*OPENERS, *ENDS]
        if self._format:
            marks += [opener for opener in self._format.openers if opener != RECIPIENT_FIRST]
            marks += self._format.dropped
        return marks

    def _marks_in_thinking(self) -> list[str]:
        form = self._reasoning
        calls = self._format.openers if self._format and self._format.is_marked else ()
        return [*form.opens, *form.closes, *form.ended_by, *calls]

    def _opens_call(self, mark: str) -> bool:
        if self._reasoning.has_channels and mark in OPENERS:
            return True
        return self._format is not None and mark in self._format.openers and self._num_cut_off < _MAX_CUT_OFF

    def _is_dropped(self, mark: str) -> bool:
        form = self._reasoning
        is_opener = self._format is not None and mark in self._format.openers
        return mark not in form.opens and mark not in form.closes and not is_opener

    # ---- events ----

    def _act(self, action: Action) -> None:
        match action:
            case CallOpen():
                call_id = action.id or self._call_id()
                self._events.append(ToolCallDelta(self._choice, self._num_calls, call_id, _whole(action.name)))
                self._num_calls += 1
            case Arguments(text=""):
                pass
            case Arguments():
                self._events.append(ToolCallDelta(self._choice, self._num_calls - 1, arguments=_whole(action.text)))
            case Thought():
                self._events.append(ReasoningDelta(self._choice, action.text))
            case Shown():
                self._show(action.text)

    def _text(self, text: str) -> None:
        if not text:
            return
        if self._is_thinking:
            self._is_blank = self._is_blank and text.isspace()
            self._events.append(ReasoningDelta(self._choice, text))
        else:
            self._show(text)

    def _show(self, text: str) -> None:
        if self._is_blank and text.isspace():
            self._space += text
            return
        self._events.append(TextDelta(self._choice, self._space + text))
        self._space = ""
        self._is_blank = False

    def _turn(self, *, is_thinking: bool) -> None:
        """A new stretch of the answer or of reasoning begins."""
        self._is_thinking = is_thinking
        self._is_blank = True
        self._space = ""

    def _call_id(self) -> str:
        name = f"{self._salt}:{self._choice}:{self._num_calls}".encode()
        digest = hashlib.blake2s(name).hexdigest()
        return digest[:9] if self._format and self._format.has_short_ids else f"call_{digest[:24]}"


def _without_label(text: str, labels: tuple[str, ...]) -> str:
    return next((text.removeprefix(label) for label in labels if text.startswith(label)), text)


def _whole(text: str) -> str:
    """The text with U+FFFD for halves of characters, which values can have that were written as escapes."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
