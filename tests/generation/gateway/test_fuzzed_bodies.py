"""Whatever a client sends, the gateway answers it, with a reply or with what is wrong with the request."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.common.models.template_probe import TOOL, TOOL_NAME
from headrace.generation.gateway.request import CONSTRAINING, CONSTRAINTS_BY_VALUE, IGNORED, NOT_SUPPORTED, READ
from tests.support.gateways import Client, FakeSampler, SharedGateways

texts = st.text(max_size=20) | st.sampled_from(
    ["user", "assistant", "tool", "system", "<|im_end|>", "\u0000", "call00000"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
functions = st.fixed_dictionaries({}, optional={"name": texts | st.just(TOOL_NAME), "arguments": texts | values})
calls = st.fixed_dictionaries({}, optional={"id": texts, "type": texts, "function": functions | values})
parts = st.fixed_dictionaries({}, optional={"type": st.just("text") | texts, "text": texts | values})
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "developer"]) | values},
    optional={
        "content": texts | st.lists(parts, max_size=3) | values,
        "tool_calls": st.lists(calls | values, max_size=3) | values,
        "tool_call_id": texts | values,
        "name": texts | values,
        "reasoning_content": texts | values,
    },
)
NAMES = sorted({*READ, *IGNORED, *CONSTRAINING, *CONSTRAINTS_BY_VALUE, *NOT_SUPPORTED} - {"messages", "tools"})
wild = st.builds(
    lambda given, more: more | given,
    st.fixed_dictionaries(
        {}, optional={"messages": st.lists(messages, max_size=5) | values, "tools": st.just([TOOL]) | values}
    ),
    st.dictionaries(st.sampled_from(NAMES) | texts, values, max_size=3),
)

valid_calls = st.builds(
    lambda id_, arguments: {"id": id_, "type": "function", "function": {"name": TOOL_NAME, "arguments": arguments}},
    texts,
    texts | st.just('{"first": 3}'),
)
valid_messages = st.fixed_dictionaries(
    {"role": st.just("user"), "content": texts | st.none() | st.just([{"type": "text", "text": "a"}])}
) | st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": texts},
    optional={"tool_calls": st.lists(valid_calls, max_size=2), "reasoning_content": texts},
)
valid = st.builds(
    lambda given, more: more | given,
    st.fixed_dictionaries(
        {"messages": st.lists(valid_messages, min_size=1, max_size=5)}, optional={"tools": st.just([TOOL])}
    ),
    st.dictionaries(st.sampled_from(sorted(IGNORED)), values, max_size=2),
)
bodies = valid | wild


@pytest.fixture(scope="module")
def shared() -> Iterator[SharedGateways]:
    gateways = SharedGateways()
    yield gateways
    gateways.close()


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    sent=st.lists(bodies | values, min_size=1, max_size=4),
    name=st.sampled_from(["qwen3", "llama3", "gpt-oss"]),
    constrained=st.sampled_from(["refuse", "ignore"]),
)
def test_every_body_gets_a_reply_or_is_told_what_is_wrong(
    shared: SharedGateways, sent: list[Any], name: str, constrained: str
) -> None:
    async def run(client: Client, sampler: FakeSampler) -> None:
        for body in sent:
            response = await client.http.post("/chat/completions", json=body)
            assert 200 <= response.status_code < 300 or 400 <= response.status_code < 500, response.text

    shared.play(run, name=name, constrained=constrained)
