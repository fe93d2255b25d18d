"""The demo's policies: their tokenizers, their training loss, and that the committed ones have the results in
`made.json`."""

import json
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.common.tasks.arithmetic import Problem, train_problems
from headrace.learner.demo_policy import finetuning, make
from headrace.learner.demo_policy.arithmetic import ARITHMETIC
from headrace.learner.demo_policy.calculator import CALCULATOR
from headrace.learner.demo_policy.conversations import Conversation, answered
from headrace.learner.demo_policy.evaluation import evaluate_policy
from headrace.learner.demo_policy.guessing import GUESSING, SHARES, bisect
from headrace.learner.demo_policy.recipe import Recipe
from headrace.learner.demo_policy.sampling import read_message
from headrace.learner.demo_policy.tokenizer import VOCAB_SIZE, make_tokenizer

DEMO = Path(__file__).parents[2] / "headrace" / "demo"
FOLDERS = {"arithmetic": DEMO / "policy"} | {name: DEMO / f"{name}-policy" for name in ("guessing", "calculator")}
POLICY = FOLDERS["arithmetic"]
PREFIX_TOLERANCE = 1e-3
"""Relative tolerance of a loss in the first 30 steps: other kernels and thread counts sum in another order."""
every_policy = pytest.mark.parametrize("recipe", make.RECIPES.values(), ids=make.RECIPES)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(POLICY)


def made(recipe: Recipe) -> dict[str, Any]:
    """The content of the committed `made.json`."""
    content: dict[str, Any] = json.loads((FOLDERS[recipe.task] / "made.json").read_text())
    return content


def new_tokenizer(recipe: Recipe) -> Any:
    return _new_tokenizer(recipe.task)


@cache
def _new_tokenizer(task: str) -> Any:
    return make_tokenizer(make.RECIPES[task])


@every_policy
def test_the_committed_folder_is_small_and_loads(recipe: Recipe) -> None:
    folder = FOLDERS[recipe.task]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "qwen3"
    assert model.num_parameters() == 656_448
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == VOCAB_SIZE == 512
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>") == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.convert_tokens_to_ids("<|pad|>") == tokenizer.pad_token_id


@every_policy
def test_the_committed_tokenizer_equals_a_newly_made_one(recipe: Recipe) -> None:
    committed = AutoTokenizer.from_pretrained(FOLDERS[recipe.task])
    assert new_tokenizer(recipe).get_vocab() == committed.get_vocab()
    question = next(recipe.conversations(3)).messages[0]["content"]
    assert new_tokenizer(recipe)(question).input_ids == committed(question).input_ids


def test_a_guess_is_a_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS["guessing"])
    for text in ("higher", "lower", *map(str, range(1, 64))):
        assert len(tokenizer(text).input_ids) == 1


def test_a_digit_is_a_token(tokenizer: Any) -> None:
    for text in ("12345", "13 + 15 = 28", "has 20 pens,7 books"):
        digits = [token for token in tokenizer.tokenize(text) if any(character.isdigit() for character in token)]
        assert digits == [character for character in text if character.isdigit()]


def test_encoding_and_decoding_a_text_gives_the_same_text(tokenizer: Any) -> None:
    for problem in islice(train_problems(seed=1, epoch=0), 300):
        for text in (problem.question, problem.demonstration, *problem.slips):
            assert tokenizer.decode(tokenizer(text).input_ids) == text
    strange = "  Zoë’s 漢字\t\r\n\n... ####16 , 'x' "
    assert tokenizer.decode(tokenizer(strange).input_ids) == strange


def test_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "How many?"}]
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat == "<|user|>How many?<|end|><|assistant|>"
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["<|end|>", "<|assistant|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "How many?"
    answered = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "3"}], tokenize=False)
    assert answered == chat + "3<|end|>"


def test_only_the_assistants_tokens_are_labelled() -> None:
    tokenizer = new_tokenizer(ARITHMETIC)
    short = Problem("+", (13, 5), name="Ada", item="pens")
    long = Problem("+-", (13, 15, 12), name="Ada", item="pens")
    pairs = [(short, short.demonstration), (long, long.slips[0])]
    ids, labels = finetuning.encode(tokenizer, [answered(problem.prompt, answer) for problem, answer in pairs])
    for row, (problem, worked_answer) in enumerate(pairs):
        assert tokenizer.decode(labels[row][labels[row] >= 0]) == worked_answer + "<|end|>"
        chat = f"<|user|>{problem.question}<|end|><|assistant|>{worked_answer}<|end|>"
        assert tokenizer.decode(ids[row]).replace("<|pad|>", "") == chat


def test_every_reply_of_a_conversation_is_labelled() -> None:
    tokenizer = new_tokenizer(GUESSING)
    texts = ["Guess.", "32", "lower", "16", "higher", "24"]
    roles = ["user", "assistant"] * 3
    game = Conversation([{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)])
    ids, labels = finetuning.encode(tokenizer, [game, Conversation(game.messages[:2])])
    assert [tokenizer.decode(row[row >= 0]) for row in labels] == ["32<|end|>16<|end|>24<|end|>", "32<|end|>"]
    assert torch.equal(labels[labels >= 0], ids[labels >= 0])


def test_calls_are_labelled_and_their_results_are_not() -> None:
    tokenizer = new_tokenizer(CALCULATOR)
    conversation = next(one for one in CALCULATOR.conversations(0) if len(one.messages) == 4)
    ids, labels = finetuning.encode(tokenizer, [conversation])
    _, call, result, _ = conversation.messages
    function = json.dumps(call["tool_calls"][0]["function"])
    value = result["content"]
    assert tokenizer.decode(labels[labels >= 0]) == f"<tool_call>{function}</tool_call><|end|>{value}<|end|>"
    whole = tokenizer.decode(ids[0])
    assert whole.startswith(f"<|system|>{json.dumps([conversation.tools[0]['function']])}<|end|><|user|>")
    assert whole.endswith(f"</tool_call><|end|><|tool|>{value}<|end|><|assistant|>{value}<|end|>")


def test_a_call_has_at_most_24_tokens_and_decoding_keeps_its_tags() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS["calculator"])
    call = '<tool_call>{"name": "calculate", "arguments": {"expression": "(99 + 99) * 99"}}</tool_call>'
    tokens = tokenizer(call).input_ids
    assert len(tokens) <= 24
    assert tokenizer.decode(tokens, skip_special_tokens=True) == call


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("12", "12", []),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', "", [("f", {"a": 1})]),
        ('x<tool_call>{"name": "f", "arguments": {}}</tool_call>', "x", [("f", {})]),
        ('<tool_call>{"name": "f"</tool_call>', '<tool_call>{"name": "f"</tool_call>', []),
        ('<tool_call>{"name": "f"}</tool_call>', '<tool_call>{"name": "f"}</tool_call>', []),
        ("<tool_call>3</tool_call>", "<tool_call>3</tool_call>", []),
    ],
)
def test_tool_calls_are_read(text: str, content: str, calls: list[Any]) -> None:
    message = read_message(text)
    functions = [call["function"] for call in message.get("tool_calls", [])]
    assert message["content"] == content
    assert [(function["name"], json.loads(function["arguments"])) for function in functions] == calls


def test_the_loss_is_the_mean_over_the_assistants_tokens_whatever_the_padding() -> None:
    tokenizer = new_tokenizer(ARITHMETIC)
    model = make.make_model(tokenizer, seed=0)
    batch = list(islice(ARITHMETIC.conversations(0), 5))
    total, count = 0.0, 0
    for row in batch:
        ids, labels = finetuning.encode(tokenizer, [row])
        logprobs = model(input_ids=ids).logits.log_softmax(dim=-1)
        for position in range(1, ids.shape[1]):
            if labels[0, position] >= 0:
                total -= logprobs[0, position - 1, ids[0, position]].item()
                count += 1
    loss = finetuning.reply_loss(model, *finetuning.encode(tokenizer, batch))
    assert loss.item() == pytest.approx(total / count)


@every_policy
def test_the_first_steps_of_training_give_the_recorded_losses(recipe: Recipe, tmp_path: Path) -> None:
    committed, random_state = made(recipe), torch.random.get_rng_state()
    num_steps = {"arithmetic": 30, "guessing": 10, "calculator": 10}[recipe.task]
    told: list[tuple[int, float]] = []
    prefix = make.make_policy(
        recipe,
        tmp_path,
        seed=committed["seed"],
        steps=num_steps,
        on_progress=lambda step, loss: told.append((step, loss)),
    )
    assert [step for step, _ in told] == list(range(1, num_steps + 1))
    assert prefix.early_losses == {
        step: pytest.approx(committed["early_losses"][str(step)], rel=PREFIX_TOLERANCE)
        for step in make.EARLY_STEPS
        if step <= num_steps
    }
    assert prefix.evaluation is None
    assert torch.equal(torch.random.get_rng_state(), random_state)
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_more_steps_than_the_recipe_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="steps is 100000, expected 1 to"):
        make.make_policy(ARITHMETIC, tmp_path, seed=0, steps=100_000)


@every_policy
def test_the_committed_policy_has_the_results_in_made_json(recipe: Recipe) -> None:
    """The tolerances are three and a half standard errors of the problems with 4 samples each."""
    committed, num_prompts = made(recipe), {"arithmetic": 256, "guessing": 96, "calculator": 64}[recipe.task]
    wider = (256 / num_prompts) ** 0.5
    assert committed["num_steps"] == recipe.num_steps
    assert committed["settings"] == recipe.settings
    claimed = committed["evaluation"]
    assert claimed["num_prompts"] >= 1024
    measured = evaluate_policy(FOLDERS[recipe.task], recipe.task, num_prompts, samples=4, seed=1)
    assert measured.pass_at_1 == pytest.approx(claimed["pass_at_1"], abs=0.08 * wider)
    assert measured.greedy_accuracy == pytest.approx(claimed["greedy_accuracy"], abs=0.11 * wider)
    assert measured.mixed_share == pytest.approx(claimed["mixed_share"], abs=0.11 * wider)


def test_the_committed_policies_have_something_to_learn() -> None:
    claimed = made(ARITHMETIC)["evaluation"]
    assert 0.25 < claimed["pass_at_1"] < 0.37
    assert claimed["greedy_accuracy"] > 0.5
    assert claimed["mixed_share"] > 0.5
    claimed = made(GUESSING)["evaluation"]
    assert 0.1 < claimed["pass_at_1"] < 0.2
    assert claimed["greedy_accuracy"] < 0.2  # it counts up
    assert claimed["mixed_share"] > 0.4
    claimed = made(CALCULATOR)["evaluation"]
    assert 0.1 < claimed["pass_at_1"] < 0.25
    assert claimed["mixed_share"] > 0.4


def test_few_of_the_games_that_the_guessing_policy_has_seen_are_played_well() -> None:
    assert sum(SHARES.values()) == pytest.approx(1.0)
    assert SHARES[bisect] < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [make.RECIPES["arithmetic"]], ids=["arithmetic"])
def test_training_again_gives_an_equally_good_policy(recipe: Recipe, tmp_path: Path) -> None:
    """The rounding of another machine leads to another policy, as another seed does. The others are trained by the same
    code, and take minutes more."""
    claimed = made(recipe)["evaluation"]
    again = make.make_policy(recipe, tmp_path, seed=made(recipe)["seed"]).evaluation
    assert again is not None
    assert again.pass_at_1 == pytest.approx(claimed["pass_at_1"], abs=0.05)
    assert again.greedy_accuracy == pytest.approx(claimed["greedy_accuracy"], abs=0.1)
    assert again.mixed_share == pytest.approx(claimed["mixed_share"], abs=0.08)
