"""The record of an episode that also keeps its messages, for people to read. Pure."""

from typing import Protocol

from headrace.common.wire import Message, Ticket
from headrace.common.wire.trial_report import ReplyReport, SegmentReport
from headrace.generation.engine.completions import SampledTurn
from headrace.generation.environments.episodes import Record
from headrace.generation.gateway.recorded_segment import RecordedSegment
from headrace.generation.gateway.rendering import Rendering
from headrace.generation.gateway.segments import EpisodeRecord, PlannedTurn


class ReportedRecord(Record, Protocol):
    def segment_reports(self) -> list[SegmentReport]: ...


class ShownRecord(EpisodeRecord):
    def __init__(self, ticket: Ticket, rendering: Rendering) -> None:
        super().__init__(ticket, rendering)
        self._messages: dict[RecordedSegment, list[Message]] = {}
        """Of each segment, up to its last reply."""

    def record(self, turn: PlannedTurn, sampled: SampledTurn, reply: Message, now_s: float) -> None:
        super().record(turn, sampled, reply, now_s)
        self._messages[turn.segment] = [*turn.conversation.messages, reply]

    def segment_reports(self) -> list[SegmentReport]:
        """In the order of their first replies."""
        return [_report(segment, messages) for segment, messages in self._messages.items()]


def _report(segment: RecordedSegment, messages: list[Message]) -> SegmentReport:
    turns = segment.turns(0)
    replies = [turn for turn in turns if turn.role == "assistant"]
    return SegmentReport(
        messages=messages,
        replies=[ReplyReport(turn.ended_s - turn.began_s, turn.end - turn.start) for turn in replies],
        origin=segment.origin,
        num_prompt_tokens=len(segment.prompt),
        num_environment_tokens=len(segment.tokens) - segment.num_sampled,
    )
