"""Whatever an agent asks, and in whatever order: each sampled token is recorded once, behind exactly what it was
sampled behind, and no limit is passed."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.common.models.chat_template import QUESTION
from headrace.common.models.template_probe import TOOL
from headrace.common.wire import Limits, check_group
from headrace.generation.gateway.group_prompts import GroupPrompts
from headrace.generation.gateway.segments import EpisodeOver
from tests.support.agents import RandomAgent
from tests.support.chat_families import FAMILIES
from tests.support.episodes import LIMITS, FakeModel, check_exact, episode_ticket, group_of, rendering_of

RENDERINGS = {
    (name, history): rendering_of(name, history=history) for name in FAMILIES for history in ("template", "keep")
}
limits = st.builds(
    Limits,
    max_turns=st.integers(1, 12),
    max_tokens=st.integers(1, 120),
    max_context_tokens=st.integers(80, 500),
    max_segments=st.integers(1, 8),
)


@settings(max_examples=250)
@given(
    name=st.sampled_from(sorted(FAMILIES)),
    history=st.sampled_from(["template", "keep"]),
    tools=st.sampled_from([[], [TOOL]]),
    limits=st.just(LIMITS) | limits,
    is_open=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_each_sampled_token_is_recorded_once_behind_its_context(
    name: str, history: str, tools: list[dict[str, object]], limits: Limits, is_open: bool, seed: int
) -> None:
    ticket = episode_ticket(name, tools=tools, limits=limits, messages=[QUESTION] if is_open else [])
    model = FakeModel(name, seed)
    agent = RandomAgent(ticket, RENDERINGS[name, history], model, seed)
    for _ in range(30):
        agent.act()
    agent.record.seal()
    num_late = agent.num_under_way
    asked = list(model.asked)
    for _ in range(num_late):
        with pytest.raises(EpisodeOver):
            agent.answer(0)
    assert agent.record.num_turns == len(asked)
    if not asked:
        return
    prompts = GroupPrompts(ticket.prompt_tokens)
    rollout = agent.record.rollout(1.0, {}, prompts)
    group = group_of(ticket, rollout, prompts.further)
    check_group(group)
    check_exact(group, asked)
    spans = [span for segment in rollout.segments for span in segment.version_spans]
    assert all(first.version != second.version or second.start == 0 for first, second in pairwise(spans))
