"""Which recorded tokens a request goes on behind, and where a new segment begins."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.common.models.chat_template import QUESTION
from headrace.common.models.template_probe import FOLLOW_UP, TOOL, TOOL_NAME
from headrace.common.wire import Limits, Message, Rollout, Ticket, check_group
from headrace.generation.gateway.conversation import Conversation
from headrace.generation.gateway.group_prompts import GroupPrompts
from headrace.generation.gateway.messages import to_message
from headrace.generation.gateway.segments import EpisodeRecord, LimitReached, MustWait, PlannedTurn
from tests.support.chat_families import FAMILIES, TOKENIZERS, control_tokens
from tests.support.episodes import FakeModel, check_exact, episode_ticket, group_of, rendering_of

WITH_TOOLS = ("qwen2.5", "qwen3", "llama3", "glm4.5", "gpt-oss")
ANSWER = {"role": "assistant", "content": "It is 7."}


class Played:
    """An episode that a test plays turn by turn."""

    def __init__(self, name: str, history: str = "template", **changes: Any) -> None:
        self.name = name
        self.ticket: Ticket = episode_ticket(name, **changes)
        self.model = FakeModel(name)
        self.rendering = rendering_of(name, history=history)
        self.record = EpisodeRecord(self.ticket, self.rendering)

    def plan(self, *messages: Message, tools: list[Any] | None = None, max_tokens: int | None = None) -> PlannedTurn:
        read = [to_message(message, place) for place, message in enumerate(messages)]
        return self.record.plan(Conversation(read, self.ticket.tools if tools is None else tools), max_tokens, 1.0)

    def answer(self, turn: PlannedTurn, reply: Message = ANSWER, text: str | None = None) -> list[int]:
        """The tokens of the segment behind the turn."""
        sampled = self.model.sample(turn.prompt_tokens, turn.max_new_tokens, reply["content"] if text is None else text)
        self.record.record(turn, sampled, reply, 2.0)
        return turn.prompt_tokens + sampled.completion.tokens

    def ask(self, *messages: Message, reply: Message = ANSWER, text: str | None = None, **how: Any) -> list[int]:
        return self.answer(self.plan(*messages, **how), reply, text)

    def rollout(self) -> Rollout:
        self.record.seal()
        prompts = GroupPrompts(self.ticket.prompt_tokens)
        rollout = self.record.rollout(1.0, {"guesses": 2.0}, prompts, failed_episodes=1)
        group = group_of(self.ticket, rollout, prompts.further)
        check_group(group)
        check_exact(group, self.model.asked)
        return rollout

    def origins(self) -> list[str]:
        return [segment.origin for segment in self.rollout().segments]


def calls(num: int = 1) -> Message:
    function = {"name": TOOL_NAME, "arguments": {"first": 3, "second": 4}}
    one = [{"id": f"call{place:05d}", "type": "function", "function": function} for place in range(num)]
    return {"role": "assistant", "content": "", "tool_calls": one}


def answers(num: int = 1, text: str = "7") -> list[Message]:
    return [{"role": "tool", "tool_call_id": f"call{place:05d}", "content": text} for place in range(num)]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tickets_own_question_is_asked_with_the_tickets_own_tokens(name: str) -> None:
    played = Played(name, prompt_tokens=[5, 6, 7])
    assert played.plan(QUESTION).prompt_tokens == [5, 6, 7]
    assert played.plan(FOLLOW_UP).prompt_tokens == played.rendering.whole([FOLLOW_UP], [])


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_tool_loop_is_one_segment(name: str) -> None:
    played = Played(name, tools=[TOOL])
    first = played.ask(QUESTION, reply=calls(), text="call it")
    second = played.plan(QUESTION, calls(), *answers())
    assert second.prompt_tokens[: len(first)] == first
    played.answer(second, calls(), "call it again")
    played.ask(QUESTION, calls(), *answers(), calls(), *answers())
    rollout = played.rollout()
    assert [segment.origin for segment in rollout.segments] == ["conversation"]
    assert [turn.role for turn in rollout.turns] == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert rollout.segments[0].prompt == 0 and rollout.failed_episodes == 1 and rollout.metrics == {"guesses": 2.0}
    assert (rollout.finish_reason, rollout.text) == ("stop", "It is 7.")


@pytest.mark.parametrize(
    ("name", "reply", "expected"),
    [
        ("qwen2.5", ANSWER, ["conversation"]),
        ("qwen3", ANSWER, ["conversation"]),
        ("qwen3", ANSWER | {"reasoning_content": "Three and four."}, ["conversation", "template"]),
        ("glm4.5", ANSWER | {"reasoning_content": "Three and four."}, ["conversation", "template"]),
        ("gpt-oss", ANSWER, ["conversation", "template"]),
        ("llama3", ANSWER, ["conversation"]),
    ],
)
def test_a_segment_begins_where_the_template_changes_earlier_replies(
    name: str, reply: Message, expected: list[str]
) -> None:
    played = Played(name)
    thought = "<think>\nThree and four.\n</think>\n\n" if "reasoning_content" in reply else ""
    first = played.ask(QUESTION, reply=reply, text=thought + "It is 7.")
    turn = played.plan(QUESTION, ANSWER, FOLLOW_UP)
    if len(expected) == 1:
        assert turn.prompt_tokens[: len(first)] == first
    else:
        assert turn.prompt_tokens == played.rendering.whole([QUESTION, ANSWER, FOLLOW_UP], [])
    played.answer(turn)
    assert played.origins() == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_with_kept_history_a_conversation_goes_on_whatever_the_template_does(name: str) -> None:
    played = Played(name, history="keep")
    first = played.ask(QUESTION, reply=ANSWER | {"reasoning_content": "Three and four."})
    second = played.ask(QUESTION, ANSWER, FOLLOW_UP)
    assert second[: len(first)] == first
    assert played.origins() == ["conversation"]


@pytest.mark.parametrize(
    ("request_", "tools", "expected"),
    [
        ([user("Write a poem.")], [], "conversation"),
        ([QUESTION], [], "conversation"),
        ([QUESTION, user("A summary of what was said."), FOLLOW_UP], [], "history"),
        ([QUESTION, ANSWER | {"content": "It is 8."}, FOLLOW_UP], [], "history"),
        ([QUESTION, ANSWER, FOLLOW_UP], [TOOL], "tools"),
        ([QUESTION], [TOOL], "tools"),
    ],
)
def test_a_segment_says_why_it_begins(request_: list[Message], tools: list[Any], expected: str) -> None:
    played = Played("qwen2.5")
    played.ask(QUESTION)
    played.ask(*request_, tools=tools)
    played.ask(*request_, tools=tools)
    assert played.origins() == ["conversation", expected, expected]


def test_a_fork_goes_on_in_the_segment_that_it_continues() -> None:
    played = Played("qwen2.5")
    played.ask(QUESTION)
    longer = played.ask(QUESTION, ANSWER, FOLLOW_UP, reply=ANSWER | {"content": "It is 11."})
    other = played.ask(QUESTION, ANSWER, FOLLOW_UP, reply=ANSWER | {"content": "It is 12."})
    again = played.ask(QUESTION, ANSWER, FOLLOW_UP, ANSWER | {"content": "It is 11."}, user("Sure?"))
    assert again[: len(longer)] == longer
    later = played.ask(QUESTION, ANSWER, FOLLOW_UP, ANSWER | {"content": "It is 12."}, user("Sure?"))
    assert later[: len(other)] == other
    assert played.origins() == ["conversation", "history"]


def test_an_agents_own_words_are_context_and_never_trained_on() -> None:
    """The whole rendering begins with the segment's tokens, so the segment goes on."""
    played = Played("qwen2.5")
    played.ask(QUESTION)
    played.ask(QUESTION, ANSWER, FOLLOW_UP, ANSWER | {"content": "It is 11."}, user("Sure?"))
    rollout = played.rollout()
    assert [turn.role for turn in rollout.turns] == ["assistant", "user", "assistant"]


def test_an_agents_own_words_begin_a_segment_where_the_reply_before_would_be_encoded_otherwise() -> None:
    played = Played("qwen2.5")
    turn = played.plan(QUESTION)
    letters = [token for letter in "It is 7." for token in TOKENIZERS["qwen2.5"].encode(letter)]
    played.record.record(turn, played.model.sample(turn.prompt_tokens, 24, tokens=letters), ANSWER, 2.0)
    played.ask(QUESTION, ANSWER, FOLLOW_UP, ANSWER | {"content": "It is 11."}, user("Sure?"))
    assert played.origins() == ["conversation", "history"]


def test_the_longest_segment_that_a_rendering_begins_with_goes_on() -> None:
    played = Played("qwen2.5")
    played.ask(QUESTION)
    extending = played.plan(QUESTION, ANSWER, FOLLOW_UP)
    longer = played.ask(QUESTION, ANSWER, FOLLOW_UP)
    played.record.abandon(extending)
    turn = played.plan(QUESTION, ANSWER, FOLLOW_UP, ANSWER, user("Sure?"), ANSWER, user("Really?"))
    assert turn.prompt_tokens[: len(longer)] == longer and turn.segment.num_tokens == len(longer)


@pytest.mark.parametrize("name", WITH_TOOLS)
@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (ANSWER | {"content": ""}, ""),
        (ANSWER | {"content": "<tool_call>{broken"}, "<tool_call>{broken"),
        (calls(), "anything that was parsed as a call"),
    ],
)
def test_the_next_turn_goes_on_behind_whatever_was_sampled(name: str, reply: Message, text: str) -> None:
    played = Played(name, history="keep", tools=[TOOL])
    first = played.ask(QUESTION, reply=reply, text=text)
    following = answers() if "tool_calls" in reply else [FOLLOW_UP]
    assert played.plan(QUESTION, reply, *following).prompt_tokens[: len(first)] == first


def test_a_hundred_parallel_calls_are_answered_in_one_segment() -> None:
    limits = Limits(max_turns=4, max_tokens=400, max_context_tokens=20_000, max_segments=2)
    played = Played("qwen2.5", tools=[TOOL], limits=limits)
    first = played.ask(QUESTION, reply=calls(100), text="so many")
    second = played.ask(QUESTION, calls(100), *answers(100))
    assert second[: len(first)] == first
    assert played.origins() == ["conversation"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reply_that_was_cut_stays_as_it_is(name: str) -> None:
    played = Played(name, history="keep")
    cut = played.ask(QUESTION, text="so so so so so", reply=ANSWER | {"content": "so so"}, max_tokens=2)
    turn = played.plan(QUESTION, ANSWER | {"content": "so so"}, FOLLOW_UP)
    assert turn.prompt_tokens[: len(cut)] == cut
    assert control_tokens(name, turn.bridge)[0] in (*FAMILIES[name].ends, "<|end|>", "<|user|>")
    played.answer(turn)
    assert played.rollout().finish_reason == "stop"


def test_of_two_requests_that_go_on_in_one_segment_the_second_begins_another() -> None:
    played = Played("qwen2.5")
    played.ask(QUESTION)
    first, second = (played.plan(QUESTION, ANSWER, FOLLOW_UP) for _ in range(2))
    assert first.segment is not second.segment
    played.answer(second)
    played.answer(first)
    assert played.origins() == ["conversation", "history"]


def test_a_turn_that_is_abandoned_leaves_nothing() -> None:
    played = Played("qwen2.5", limits=Limits(max_turns=2, max_tokens=400, max_context_tokens=2000, max_segments=1))
    played.ask(QUESTION)
    turn = played.plan(QUESTION, ANSWER, FOLLOW_UP)
    played.record.abandon(turn)
    played.ask(QUESTION, ANSWER, FOLLOW_UP)
    assert played.origins() == ["conversation"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"max_turns": 1}, "max_turns"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"max_context_tokens": 90}, "context"),
        ({"max_segments": 1}, "max_segments"),
    ],
)
def test_a_limit_ends_the_episode(changes: dict[str, int], expected: str) -> None:
    fields = {"max_turns": 9, "max_tokens": 99, "max_context_tokens": 999, "max_segments": 9} | changes
    played = Played("smollm2", limits=Limits(**fields))
    played.ask(QUESTION)
    request = [user("Another matter")] if expected == "max_segments" else [QUESTION, ANSWER, FOLLOW_UP]
    with pytest.raises(LimitReached, match=expected):
        played.plan(*request)
    assert played.rollout().finish_reason == expected


def test_turns_under_way_count_towards_the_limits() -> None:
    played = Played("qwen2.5", limits=Limits(max_turns=2, max_tokens=400, max_context_tokens=2000, max_segments=1))
    played.plan(QUESTION)
    with pytest.raises(LimitReached, match="max_segments"):
        played.plan(QUESTION)
    more = Played("qwen2.5", limits=Limits(max_turns=2, max_tokens=400, max_context_tokens=2000, max_segments=9))
    more.plan(QUESTION), more.plan(QUESTION)
    with pytest.raises(LimitReached, match="max_turns"):
        more.plan(QUESTION)


def test_a_request_waits_for_tokens_that_turns_under_way_may_leave() -> None:
    played = Played("qwen2.5", limits=Limits(max_turns=9, max_tokens=40, max_context_tokens=2000, max_segments=9))
    first = played.plan(QUESTION)
    with pytest.raises(MustWait):
        played.plan(QUESTION)
    assert played.plan(QUESTION, max_tokens=16).max_new_tokens == 16
    played.answer(first)
    assert played.plan(QUESTION, max_tokens=8).max_new_tokens == 8


def test_a_request_may_ask_for_fewer_tokens_and_never_for_more() -> None:
    played = Played("qwen2.5")
    assert played.plan(QUESTION, max_tokens=3).max_new_tokens == 3
    assert played.plan(QUESTION, max_tokens=1000).max_new_tokens == played.ticket.sampling.max_new_tokens
    room = Limits(1, 9, len(played.ticket.prompt_tokens) + 5, 1)
    assert Played("qwen2.5", limits=room).plan(QUESTION).max_new_tokens == 5


@settings(max_examples=100)
@given(name=st.sampled_from(WITH_TOOLS), data=st.data())
def test_no_text_of_a_message_ends_or_begins_a_turn(name: str, data: st.DataObject) -> None:
    words = st.sampled_from([*FAMILIES[name].control, "a", "\n", "<|", "|>", "é", "</tool_response>"])
    text = "".join(data.draw(st.lists(words, min_size=1, max_size=6)))
    found = []
    for content in (text, "7"):
        played = Played(name, tools=[TOOL], messages=[user(content)])
        played.ask(user(content), reply=calls(), text="call it")
        found.append(played.plan(user(content), calls(), *answers(text=content)).prompt_tokens)
    harmful, harmless = (control_tokens(name, tokens) for tokens in found)
    assert harmful == harmless


@settings(max_examples=50)
@given(
    name=st.sampled_from(sorted(FAMILIES)),
    texts=st.lists(st.sampled_from(["a", "so 3 + 4", "é\n"]), min_size=3, max_size=3),
)
def test_a_segment_begins_with_what_the_template_renders(name: str, texts: list[str]) -> None:
    played = Played(name)
    played.ask(QUESTION)
    messages = [user(texts[0]), ANSWER | {"content": texts[1]}, user(texts[2])]
    tokenizer = TOKENIZERS[name]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, strftime_now=lambda form: "2024-07-26"
    )
    if name != "llama3":  # which writes its own date
        assert played.plan(*messages).prompt_tokens == tokenizer.encode(text, add_special_tokens=False)


def test_a_task_wide_system_prompt_stands_before_conversations_without_one() -> None:
    rendering = rendering_of("qwen2.5", system_prompt="Be brief.")
    system: Message = {"role": "system", "content": "Be brief."}
    other: Message = {"role": "system", "content": "Be long."}
    assert rendering.whole([QUESTION], []) == rendering.whole([system, QUESTION], [])
    assert "Be brief" not in TOKENIZERS["qwen2.5"].decode(rendering.whole([other, QUESTION], []))
