"""One rollout as text for a terminal: the conversation, what came of it, what would be recorded. Pure."""

from collections.abc import Iterator, Sequence

from rich.text import Text

from headrace.common.process.redaction import printable
from headrace.common.wire import Message
from headrace.common.wire.trial_report import ReplyReport, RolloutReport, SegmentReport
from headrace.launcher.terminal.group_text import ENDS, ORIGINS, message_text
from headrace.launcher.terminal.render import number

INDENT = "\n   "
ROLE_COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow"}


def rollout_text(place: int, report: RolloutReport) -> Text:
    text = Text.assemble((f"{place}. {report.ticket}", "bold"))
    shown: list[list[Message]] = []
    for segment in report.segments:
        if shown:
            text.append(f"{INDENT}──── segment {len(shown) + 1}: {ORIGINS[segment.origin]} ────", "yellow")
        _append_messages(text, segment, _num_shown(segment.messages, shown))
        shown.append(segment.messages)
    if report.reward is None:
        text.append(f"{INDENT}failed: ", "bold red").append(printable(report.problem))
    else:
        text.append(f"{INDENT}reward {number(report.reward, 3)}", "bold")
        text.append("".join(f", {printable(name)} {value:.4g}" for name, value in report.metrics.items()))
        text.append(f", {end}" if (end := ENDS[report.finish_reason]) else "")
    return text.append(f"{INDENT}{', '.join(_facts(report))}", "dim") if report.replies else text


def _append_messages(text: Text, segment: SegmentReport, num_shown: int) -> None:
    replies = _replies_by_place(segment)
    if num_shown:
        text.append(f"{INDENT}({count(num_shown, 'message')} as above)", "dim")
    for place, message in enumerate(segment.messages[num_shown:], start=num_shown):
        role = message["role"]
        text.append(f"{INDENT}{role}", f"bold {ROLE_COLOURS[role]}").append(_about(replies.get(place)), "dim")
        if reasoning := message.get("reasoning_content"):
            text.append(INDENT + _indented(reasoning), "dim italic")
        text.append(INDENT + (_indented(message_text(message)) or "(empty)"))


def _replies_by_place(segment: SegmentReport) -> dict[int, ReplyReport]:
    """By the index of their messages."""
    places = [place for place, message in enumerate(segment.messages) if message["role"] == "assistant"]
    last = places[len(places) - len(segment.replies) :]
    return dict(zip(last, segment.replies, strict=False))


def _num_shown(messages: Sequence[Message], shown: Sequence[Sequence[Message]]) -> int:
    """How many of the messages stand at the beginning of a conversation that was printed already."""
    longest = 0
    for others in shown:
        pairs = zip(messages, others, strict=False)
        longest = max(longest, next((i for i, (one, other) in enumerate(pairs) if one != other), len(others)))
    return min(longest, len(messages))


def _about(reply: ReplyReport | None) -> str:
    if reply is None:
        return ""
    tokens = "" if reply.num_tokens is None else f"{reply.num_tokens} tokens, "
    return f"  {tokens}{reply.seconds:.2f} s"


def _facts(report: RolloutReport) -> Iterator[str]:
    yield count(len(report.replies), "turn")
    if all(reply.num_tokens is not None for reply in report.replies):
        yield count(len(report.segments), "segment")
        yield f"{sum(reply.num_tokens or 0 for reply in report.replies)} sampled tokens"
        yield f"{sum(segment.num_environment_tokens for segment in report.segments)} of the environment"
        yield f"{sum(segment.num_prompt_tokens for segment in report.segments)} of prompts"
    model_s = sum(reply.seconds for reply in report.replies)
    yield f"{model_s:.2f} s in the model"
    yield f"{max(0.0, report.seconds - model_s):.2f} s in the environment"


def _indented(text: str) -> str:
    return printable(text).strip("\n").replace("\n", INDENT)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
