"""One group as text for a terminal: its prompt, and each completion or conversation. Pure."""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from rich.text import Text

from headrace.common.process.redaction import printable
from headrace.launcher.terminal.render import Answer, number

GAPS = ((0.01, ""), (0.05, "on grey19"), (0.2, "black on yellow"), (1.0, "black on dark_orange"), (9e9, "white on red"))
"""(largest |learner - engine| log-probability of a token, its colour)."""
ORIGINS = {
    "conversation": "new conversation",
    "history": "history rewritten by the agent",
    "template": "earlier text dropped by the template",
    "tools": "other tools offered",
}
"""Why a segment begins."""
ENDS = {
    "stop": "",
    "length": "cut off",
    "max_turns": "ended by the limit of turns",
    "max_tokens": "ended by the limit of sampled tokens",
    "max_segments": "ended by the limit of segments",
    "context": "ended by the limit of context",
}
"""Why a rollout ended."""
INDENT = "\n   "


def group_text(group: Answer) -> Text:
    """Prompt and rollouts; a token is the darker the more learner and engine disagree about it."""
    text = Text(f"ticket {group['id']}, {group['kind']}, {group['state']} at step {group['step']}")
    text.append(f", asked for at step {group['issued_step']}, answered by {printable(group['replica'])}")
    if group["staleness"] is not None:
        text.append(f", {group['staleness']} steps stale")
    for message in group["messages"]:
        text.append(f"\n{printable(str(message.get('role', '?')))}: ", "bold").append(printable(message_text(message)))
    for place, rollout in enumerate(group["rollouts"], start=1):
        text.append(f"\n{place}. reward {number(rollout['reward'])}", "bold")
        text.append("".join(f", {fact}" for fact in _facts(rollout)))
        if rollout["turns"]:
            text.append_text(_conversation(group, rollout))
        else:
            text.append(INDENT).append_text(_tokens(rollout, 0, len(rollout["tokens"])))
    if group["num_omitted"]:
        text.append(f"\n{group['num_omitted']} more rollouts were left out", "dim")
    return text


def message_text(message: dict[str, Any]) -> str:
    """Its content, and its tool calls as `name(arguments)`."""
    content = message.get("content") or ""
    calls = [call.get("function") for call in message.get("tool_calls") or () if isinstance(call, dict)]
    said = [f"{call.get('name')}({_as_text(call.get('arguments'))})" for call in calls if isinstance(call, dict)]
    return "\n".join(filter(None, [_as_text(content), *said]))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _facts(rollout: Answer) -> Iterator[str]:
    yield from (f"{printable(name)} {value:.4g}" for name, value in rollout["metrics"].items())
    if rollout["advantage"] is not None:
        yield f"advantage {rollout['advantage']:+.2f}"
    yield f"weight versions {spans(rollout['weight_versions'])}"
    yield f"{len(rollout['tokens'])} tokens"
    if turns := rollout["turns"]:
        seconds = [0.0, 0.0]
        for turn in turns:
            seconds[turn["role"] == "assistant"] += turn["ended_at"] - turn["began_at"]
        yield f"{seconds[1]:.2f} s in the model"
        yield f"{seconds[0]:.2f} s in the environment"
    if rollout["failed_episodes"]:
        yield f"failed episodes before it: {rollout['failed_episodes']}"
    if end := ENDS.get(rollout["finish_reason"], rollout["finish_reason"]):
        yield end


def _conversation(group: Answer, rollout: Answer) -> Text:
    text = Text()
    segments = [None, *(turn["segment"] for turn in rollout["turns"])]
    for (before, segment), turn in zip(pairwise(segments), rollout["turns"], strict=True):
        if segment != before:
            text.append_text(_opening(group, rollout["segments"][segment], before is not None))
        seconds, versions = turn["ended_at"] - turn["began_at"], rollout["weight_versions"][turn["start"] : turn["end"]]
        about = f"{len(versions)} tokens, weight versions {spans(versions)}, " if versions else ""
        text.append(f"{INDENT}{turn['role']}", "bold").append(f" ({about}{seconds:.2f} s):", "dim").append(INDENT)
        said = Text(_indented(turn["text"].strip("\n")), "dim")
        text.append_text(_tokens(rollout, turn["start"], turn["end"]) if versions else said)
    if rollout["num_omitted_turns"]:
        text.append(f"{INDENT}{rollout['num_omitted_turns']} more turns were left out", "dim")
    return text


def _opening(group: Answer, segment: Answer, is_ruled: bool) -> Text:
    text = Text()
    if is_ruled:
        text.append(f"{INDENT}──── {ORIGINS.get(segment['origin'], segment['origin'])} ────", "yellow")
    if segment["prompt"]:
        text.append(f"{INDENT}prompt:", "bold")
        text.append(INDENT + _indented(group["prompts"][segment["prompt"] - 1].strip("\n")), "dim")
    return text


def _tokens(rollout: Answer, start: int, end: int) -> Text:
    text = Text()
    behaviour = rollout["behaviour_logprobs"][start:end]
    proximal = (rollout["proximal_logprobs"] or rollout["behaviour_logprobs"])[start:end]
    for token, learner, engine in zip(rollout["tokens"][start:end], proximal, behaviour, strict=False):
        gap = abs(learner - engine)
        text.append(_indented(token), next((style for most, style in GAPS if gap <= most), ""))
    return text


def _indented(text: str) -> str:
    return printable(text).replace("\n", INDENT)


def spans(versions: Sequence[int]) -> str:
    """The spans of equal versions, such as `12 (5 tokens), 13 (8)`."""
    counted = [(version, versions.count(version)) for version in dict.fromkeys(versions)]
    if len(counted) == 1:
        return str(counted[0][0])
    return ", ".join(f"{version} ({count}{' tokens' if i == 0 else ''})" for i, (version, count) in enumerate(counted))
