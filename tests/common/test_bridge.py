"""What stands between a sampled reply and the next: the bridge, for every family's template and tokenizer.

Held: the bridge is what the rendering of the whole conversation has there, token for token; and no text of a message
puts a token into it that ends or begins a turn.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.common.models.bridge import Bridge, render_calls
from headrace.common.models.chat_template import QUESTION, PromptError
from headrace.common.models.control_tokens import tokens_of
from headrace.common.models.template_probe import FOLLOW_UP, TOOL, TemplateProbe, probe_template
from tests.support.chat_families import FAMILIES, TOKENIZERS, chat_of, control_tokens

every_family = pytest.mark.parametrize("name", FAMILIES)
WITH_TOOLS = ("qwen2.5", "qwen3", "llama3", "glm4.5", "gpt-oss")
CALL = {"id": "call00001", "type": "function", "function": {"name": "add_numbers", "arguments": {"first": 3}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
REFUSED = "the model's chat template refuses it: This model only supports single tool-calls at once!"


def bridge_of(name: str, system_prompt: str | None = None) -> Bridge:
    return Bridge(chat_of(name, system_prompt), ids(name, *FAMILIES[name].ends))


def ids(name: str, *tokens: str) -> list[int]:
    found: list[int] = TOKENIZERS[name].convert_tokens_to_ids(list(tokens))
    return found


def conversation_tokens(bridge: Bridge, messages: list[dict[str, Any]]) -> list[int]:
    return tokens_of(bridge.chat.pieces(messages))


def answer(content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "call00001", "name": "add_numbers", "content": content}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2.5", TemplateProbe("kept", "not rendered", "kept")),
        ("qwen3", TemplateProbe("kept", "rewritten", "kept")),
        ("llama3", TemplateProbe("kept", "not rendered", "kept", [f"two tool messages: {REFUSED}"])),
        ("gemma3", TemplateProbe("kept", "not rendered", "not rendered")),
        ("smollm2", TemplateProbe("kept", "not rendered", "not rendered")),
        ("glm4.5", TemplateProbe("kept", "rewritten", "kept")),
        ("gpt-oss", TemplateProbe("rewritten", "rewritten", "kept")),
    ],
)
def test_the_probe_says_what_becomes_of_earlier_replies(name: str, expected: TemplateProbe) -> None:
    assert probe_template(bridge_of(name)) == expected


def test_an_opening_that_history_lacks_makes_the_template_rewrite_replies() -> None:
    """Without thinking Qwen3 opens a reply with an empty reasoning, which earlier replies have no longer."""
    bridge = Bridge(chat_of("qwen3", enable_thinking=False), ids("qwen3", *FAMILIES["qwen3"].ends))
    assert probe_template(bridge).after_user == "rewritten"


@every_family
@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_a_kept_reply_and_its_bridge_are_the_whole_conversation(name: str, system_prompt: str | None) -> None:
    bridge, reply = bridge_of(name, system_prompt), {"role": "assistant", "content": "It is 7."}
    whole = conversation_tokens(bridge, [QUESTION, reply, FOLLOW_UP])
    kept = [conversation_tokens(bridge, [QUESTION]), TOKENIZERS[name].encode("It is 7.", add_special_tokens=False)]
    if name == "glm4.5":
        kept[1] = TOKENIZERS[name].encode("\n<think></think>\nIt is 7.", add_special_tokens=False)
    if name == "gpt-oss":
        channel, message = ids(name, "<|channel|>", "<|message|>")
        final = TOKENIZERS[name].encode("final", add_special_tokens=False)
        kept[1] = [channel, *final, message, *kept[1]]
    sampled = [token for piece in kept for token in piece]
    assert whole[: len(sampled)] == sampled
    cut = bridge.tokens(reply, sampled[-1], [FOLLOW_UP])
    assert sampled + cut == whole, "a reply that was cut at a limit ends with the bridge"
    ended = bridge.tokens(reply, cut[0], [FOLLOW_UP])
    assert [*sampled, cut[0], *ended] == whole, "the sampled end of a reply stands once"


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_tools_answer_is_bridged_whatever_the_call_was(name: str) -> None:
    """The call's arguments do not matter to the bridge; its name and id may."""
    bridge = bridge_of(name)
    whole = render_calls(bridge.chat, [QUESTION, CALLING, answer("7")], [TOOL])
    end = whole[bridge.end_of_reply(whole, "3")].tokens[0]
    found = bridge.tokens(CALLING, end, [answer("7")], [TOOL])
    assert tokens_of(whole)[-len(found) :] == found
    assert "7" in TOKENIZERS[name].decode(found)


def test_messages_that_the_template_refuses_are_a_prompt_error() -> None:
    with pytest.raises(PromptError, match="roles must alternate"):
        bridge_of("gemma3").tokens({"role": "assistant", "content": "7"}, 0, [answer("7")])


def test_arguments_as_text_are_tried_where_objects_are_refused() -> None:
    """DeepSeek's templates append the arguments to a text."""
    tokenizer = TOKENIZERS["qwen2.5"]
    own, tokenizer.chat_template = (
        tokenizer.chat_template,
        (
            "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
            "{% for call in message.tool_calls or [] %}{{ call.function.arguments + '' }}{% endfor %}{{ '<|im_end|>' }}"
            "{% endfor %}"
        ),
    )
    try:
        pieces = render_calls(chat_of("qwen2.5"), [QUESTION, CALLING])
    finally:
        tokenizer.chat_template = own
    assert '{"first": 3}' in "".join(piece.text for piece in pieces)


@settings(max_examples=100)
@given(name=st.sampled_from(WITH_TOOLS), data=st.data())
def test_no_text_of_a_tool_ends_or_begins_a_turn(name: str, data: st.DataObject) -> None:
    pieces = st.sampled_from([*FAMILIES[name].control, "a", "\n", "3 + 4", "<|", "|>", "é", "</tool_response>"])
    text = "".join(data.draw(st.lists(pieces, min_size=1, max_size=8)))
    bridge = bridge_of(name)
    last = ids(name, *FAMILIES[name].ends)[-1]
    harmless = bridge.tokens(CALLING, last, [answer("7")], [TOOL])
    found = bridge.tokens(CALLING, last, [answer(text)], [TOOL])
    assert control_tokens(name, found) == control_tokens(name, harmless)
