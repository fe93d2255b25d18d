"""Checks every group that the harness sees: committed once, valid, and each rollout is what one finished episode saw.

The task's metrics say what an episode saw (guessing_with_agents.py). A rollout that came of another episode, of a
failed one, or of parts of two would have other tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from chaos.accounting import Violation
from chaos.episodes.guessing_with_agents import digest
from headrace.common.wire import Group, Rollout, WireError, decode_group


@dataclass
class GroupCounts:
    """Of the groups that were seen."""

    groups: int = 0
    rollouts: int = 0
    turns: int = 0
    with_agent: int = 0
    after_failed_episodes: int = 0
    """Rollouts whose episode had failed before, and was begun again."""


@dataclass
class GroupChecks:
    """`tokenizer`: the policy's; None if the groups are not of `GuessingWithAgents`."""

    tokenizer: Tokenizer | None = None
    counts: GroupCounts = field(default_factory=GroupCounts)
    violations: list[Violation] = field(default_factory=list)
    _entries: dict[str, str] = field(default_factory=dict)
    """Ticket -> id of its group's entry."""
    _episodes: dict[float, str] = field(default_factory=dict)
    """Episode -> ticket."""

    @classmethod
    def of_episodes(cls, policy: Path) -> "GroupChecks":
        return cls(Tokenizer.from_file(str(policy / "tokenizer.json")))

    def take(self, entry_id: str, ticket: str, payload: bytes) -> None:
        """An entry of a stream of groups, for the first time."""
        earlier = self._entries.setdefault(ticket, entry_id)
        if earlier != entry_id:
            self._report(ticket, f"committed twice: as {earlier} and as {entry_id}")
            return
        try:
            group = decode_group(payload)
        except WireError as error:
            self._report(ticket, f"its group is invalid: {error}")
            return
        self.counts.groups += 1
        for place, rollout in enumerate(group.rollouts if self.tokenizer is not None else ()):
            self._take_rollout(group, place, rollout)

    def _take_rollout(self, group: Group, place: int, rollout: Rollout) -> None:
        counts, texts = self.counts, self._texts(rollout, group.ticket.sampling.stop_token_ids)
        counts.rollouts += 1
        counts.turns += len(texts)
        counts.with_agent += rollout.metrics.get("is_agent") == 1
        counts.after_failed_episodes += rollout.failed_episodes > 0
        seen = {name: rollout.metrics.get(name) for name in ("replies", "digest")}
        if seen != {"replies": len(texts), "digest": digest(texts)}:
            self._report(
                group.ticket.id,
                f"rollout {place} has the {len(texts)} replies {texts}, its episode saw {seen['replies']} "
                f"with the digest {seen['digest']}",
            )
        earlier = self._episodes.setdefault(rollout.metrics.get("episode", -1.0), f"{group.ticket.id} {place}")
        if earlier != f"{group.ticket.id} {place}":
            self._report(group.ticket.id, f"rollout {place} is of the episode of rollout {earlier}")

    def _texts(self, rollout: Rollout, stops: Sequence[int]) -> list[str]:
        """Of the sampled turns, in the order of time, without the stop token at the end."""
        assert self.tokenizer is not None
        turns = sorted((turn for turn in rollout.turns if turn.role == "assistant"), key=lambda turn: turn.began_s)
        tokens = [rollout.segments[turn.segment].tokens[turn.start : turn.end].tolist() for turn in turns]
        said = [one[: -1 if one[-1] in stops else None] for one in tokens]
        return [self.tokenizer.decode(one, skip_special_tokens=False) for one in said]

    def _report(self, ticket: str, text: str) -> None:
        self.violations.append(Violation(ticket, text))
