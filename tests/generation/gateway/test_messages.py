"""The one form in which messages are compared, and what of a client's messages is understood."""

from typing import Any

import pytest

from headrace.generation.gateway.errors import BadRequest
from headrace.generation.gateway.messages import form_of, is_prefix, to_message


def a_call(arguments: Any, id_: str = "call00001") -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": "add", "arguments": arguments}}


def calling(arguments: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [a_call(arguments)]} | fields


def sent_as(recorded: dict[str, Any], given: dict[str, Any]) -> bool:
    return form_of(to_message(recorded, 0)).is_sent_as(form_of(to_message(given, 0)))


@pytest.mark.parametrize(
    ("recorded", "given"),
    [
        ({"role": "user", "content": " hello\n"}, {"role": "user", "content": "hello"}),
        ({"role": "user", "content": "a\nb"}, {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}),
        ({"role": "system", "content": "a"}, {"role": "developer", "content": "a"}),
        (calling('{"a": 1.0, "b": [2]}'), calling('{"b":[2],"a":1}', content=None)),
        (calling('{"a": 1}'), calling({"a": 1})),
        (calling(""), calling("{}")),
        (calling("{broken"), calling(" {broken")),
        (calling("{}", reasoning_content=" hm "), calling("{}")),
        (calling("{}", reasoning_content=" hm "), calling("{}", reasoning="hm")),
        (calling("{}"), calling("{}", name="solver")),
    ],
)
def test_a_message_in_a_clients_own_form_is_the_same(recorded: dict[str, Any], given: dict[str, Any]) -> None:
    assert sent_as(recorded, given)


@pytest.mark.parametrize(
    ("recorded", "given"),
    [
        ({"role": "user", "content": "hello"}, {"role": "user", "content": "Hello"}),
        ({"role": "user", "content": "hello"}, {"role": "system", "content": "hello"}),
        (calling('{"a": 1}'), calling('{"a": 2}')),
        (calling('{"a": 1}'), calling('{"a": true}')),
        (calling("{}"), calling("{}", tool_calls=[a_call("{}", "call00002")])),
        (calling("{}"), calling("{}", tool_calls=None)),
        (calling("{}", reasoning_content="hm"), calling("{}", reasoning_content="ah")),
        (calling("{}"), calling("{}", reasoning_content="ah")),
        ({"role": "tool", "content": "7", "tool_call_id": "a"}, {"role": "tool", "content": "7", "tool_call_id": "b"}),
    ],
)
def test_another_message_is_not(recorded: dict[str, Any], given: dict[str, Any]) -> None:
    assert not sent_as(recorded, given)


def test_a_prefix_may_be_whole_but_not_longer() -> None:
    forms = [form_of(to_message({"role": "user", "content": text}, 0)) for text in "abc"]
    assert is_prefix(forms[:2], forms) and is_prefix(forms, forms) and not is_prefix(forms, forms[:2])


def test_templates_get_text_and_arguments_as_objects() -> None:
    given = calling('{"a": 1}', content=None, reasoning_content="hm", unknown=1)
    assert to_message(given, 0) == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [a_call({"a": 1})],
    }


def test_arguments_nested_without_end_stay_text() -> None:
    deep = '{"a":' * 100 + "1" + "}" * 100
    assert to_message(calling(deep), 0)["tool_calls"][0]["function"]["arguments"] == deep


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("hello", "messages[3] is a str, expected an object"),
        ({"content": "a"}, "messages[3].role is None"),
        ({"role": "robot", "content": "a"}, "messages[3].role is 'robot'"),
        ({"role": ["user"], "content": "a"}, "messages[3].role is"),
        ({"role": "user", "content": 7}, "content is a int, expected text or a list of parts"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "type 'image_url', expected only text"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "type 'input_audio', expected only text"),
        ({"role": "user", "content": ["a"]}, "type 'str', expected only text"),
        ({"role": "user", "content": "a", "name": 1}, "messages[3].name is a int, expected text"),
        ({"role": "user", "content": "a", "tool_calls": [a_call("{}")]}, "tool_calls: expected a list, in a message"),
        ({"role": "assistant", "tool_calls": "a"}, "tool_calls: expected a list"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "a call that is not understood"),
        ({"role": "assistant", "tool_calls": ["a"]}, "a call that is not understood"),
        ({"role": "assistant", "function_call": {"name": "add"}}, "function_call is not supported"),
    ],
)
def test_what_is_not_understood_is_said(given: Any, expected: str) -> None:
    with pytest.raises(BadRequest) as caught:
        to_message(given, 3)
    assert expected in str(caught.value)
