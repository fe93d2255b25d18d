"""What an evaluation says of its rewards, by hand; and how its tickets are sampled."""

import itertools

import pytest

from headrace.common.config import RunConfig
from headrace.common.wire import MIN_TEMPERATURE, decode_ticket, encode
from headrace.learner.intake.held_out import Evaluation, pass_at
from headrace.learner.intake.ticket_source import TicketSource
from headrace.learner.store.structs import Cursor
from tests.learner.test_intake import Counting, make_config, plain_chat
from tests.support.factories import make_group, make_ticket


def test_pass_at_k_by_hand() -> None:
    """Two of four passed: a pair misses both with chance 1/6. One of four: with chance 3/6."""
    found = pass_at([[1.0, 1.0, 0.0, 0.0], [0.5, 0.9, 2.0, 0.0]])
    assert found == {
        "pass_at_1": pytest.approx((2 / 4 + 1 / 4) / 2),
        "pass_at_2": pytest.approx(1 - (1 / 6 + 3 / 6) / 2),
        "pass_at_4": 1.0,
    }


def test_pass_at_k_is_the_mean_over_all_choices_of_k() -> None:
    prompts = [[1.0, 0.0, 0.0, 1.0, 0.0], [0.0] * 5, [1.0, 1.0, 1.0, 1.0, 0.0]]
    found = pass_at(prompts)
    assert list(found) == ["pass_at_1", "pass_at_2", "pass_at_4"]
    for k in (1, 2, 4):
        chosen = [any(one) for prompt in prompts for one in itertools.combinations(prompt, k)]
        assert found[f"pass_at_{k}"] == pytest.approx(sum(chosen) / len(chosen))


def test_a_result_is_of_the_version_that_was_asked_for() -> None:
    tickets = [make_ticket(f"eval-9-{place}", kind="eval") for place in range(3)]
    evaluation = Evaluation.of(4, 9, tickets)
    for ticket, rewards in zip(tickets[:2], ((1.0, 0.5), (0.0, 0.25)), strict=True):
        evaluation.collect(make_group(ticket.id, rewards, version=9), {9: 4})
    assert not evaluation.is_done
    evaluation.mark_dead("eval-9-2", "ValueError")
    assert evaluation.is_done
    assert evaluation.result() == {
        "step": 4,
        "weight_version": 9,
        "held_out": 0.4375,
        "pass_at_1": 0.25,
        "pass_at_2": 0.5,
        "first_token_step_mean": 4.0,
        "num_versions": 1,
        "num_completions": 4,
        "num_dead": 1,
    }


def test_an_evaluation_whose_tickets_all_died_says_of_what() -> None:
    evaluation = Evaluation.of(0, 9, [make_ticket("eval-9-0", kind="eval")])
    evaluation.mark_dead("eval-9-0", "completion 1 of 2: ValueError: no such answer")
    with pytest.raises(
        ValueError, match="all 1 evaluation tickets of step 0 are dead, the latest: completion 1 of 2: V"
    ):
        evaluation.result()


@pytest.mark.parametrize(("given", "expected"), [(None, 1.0), (0.6, 0.6), (0, MIN_TEMPERATURE)])
def test_evaluations_are_sampled_at_their_own_temperature(given: float | None, expected: float) -> None:
    settings = make_config().model_dump()
    settings["evaluation"]["temperature"] = given
    source = TicketSource(RunConfig.model_validate(settings), Counting(), plain_chat(), [1], Cursor(0, 0))
    tickets = source.evaluation_tickets(3, 4)
    assert {ticket.sampling.temperature for ticket in tickets} == {expected} and len(tickets) == 3
    assert decode_ticket(encode(tickets[0])) == tickets[0], "the wire carries it"
    (train,) = source.next_tickets(1, 3, 4)
    assert train.sampling.temperature == 1.0
