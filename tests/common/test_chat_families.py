"""The chat formats of seven families of models, each by a template and a tokenizer of its kind made for this test.

Held: the beginning-of-sequence token once where the family has one, the generation prompt, the system prompt, thinking
off, the tokens that end an answer, and that no text of a message becomes a control token.
"""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from headrace.common.config import ModelConfig
from headrace.common.models.chat_template import ChatTemplate, stop_token_ids
from headrace.common.wire import Message
from tests.support.chat_families import FAMILIES, TOKENIZERS, chat_of, control_tokens, make_tokenizer

QUESTION: Message = {"role": "user", "content": "3 + 4 = ?"}
SYSTEM = "Be brief."


def renamed(name: str) -> Any:
    """The same under names of one private character each."""
    tokenizer, family = make_tokenizer(name), FAMILIES[name]
    names = {token: chr(0xF000 + place) for place, token in enumerate(family.control)}
    content, template = json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.chat_template
    content["post_processor"] = None
    for added in content["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    content["model"]["vocab"] = {names.get(token, token): id_ for token, id_ in content["model"]["vocab"].items()}
    for token, other in names.items():
        template = template.replace(token, other)
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token=names.get(family.bos or ""),
        eos_token=names[family.eos],
        unk_token=names.get(family.unk or "", family.unk),
    )
    made.chat_template = template
    return made


RENAMED = {name: renamed(name) for name in FAMILIES}
every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
def test_a_prompt_ends_where_the_answer_begins(name: str) -> None:
    chat = chat_of(name)
    text = chat.render([QUESTION])
    assert text.endswith(FAMILIES[name].prompt_ends)
    assert TOKENIZERS[name].decode(chat.encode([QUESTION])) == text


@every_family
def test_a_sequence_begins_once(name: str) -> None:
    tokens, bos = chat_of(name).encode([QUESTION]), FAMILIES[name].bos
    assert control_tokens(name, tokens).count(bos or "") == (bos is not None)
    assert bos is None or TOKENIZERS[name].convert_ids_to_tokens(tokens[0]) == bos


@every_family
def test_a_system_prompt_stands_where_the_family_has_it(name: str) -> None:
    chat = chat_of(name, SYSTEM)
    text = chat.render([QUESTION])
    assert FAMILIES[name].with_system in text and text.count(SYSTEM) == 1
    assert text.index(SYSTEM) < text.index(QUESTION["content"])
    assert "You are Qwen" not in text and "named SmolLM" not in text, "the model's own gives way"


@every_family
def test_an_answer_ends_at_every_token_that_ends_one(name: str) -> None:
    chat, family = chat_of(name, SYSTEM), FAMILIES[name]
    ids = TOKENIZERS[name].convert_tokens_to_ids
    given = None if family.generation_eos is None else list(map(ids, family.generation_eos))
    assert stop_token_ids(chat, SimpleNamespace(eos_token_id=given)) == sorted(map(ids, family.ends))


def test_the_end_of_a_turn_ends_an_answer_where_no_file_says_so() -> None:
    """Qwen2.5's base models name the end of a document alone."""
    tokenizer = make_tokenizer("qwen2.5")
    tokenizer.eos_token = "<|endoftext|>"
    document, turn = map(tokenizer.convert_tokens_to_ids, ("<|endoftext|>", "<|im_end|>"))
    found = stop_token_ids(ChatTemplate(tokenizer, ModelConfig(path="base")), SimpleNamespace(eos_token_id=document))
    assert found == sorted([document, turn])


def test_what_gpt_oss_writes_between_its_channels_ends_no_answer() -> None:
    chat = chat_of("gpt-oss")
    assert chat.end_of_turn() == TOKENIZERS["gpt-oss"].convert_tokens_to_ids("<|return|>")


def test_thinking_is_turned_off_where_the_template_can() -> None:
    off = chat_of("qwen3", enable_thinking=False)
    assert off.render([QUESTION]).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert chat_of("qwen3", enable_thinking=True).render([QUESTION]).endswith("<|im_start|>assistant\n")
    words = TOKENIZERS["qwen3"].convert_tokens_to_ids(["<think>", "</think>"])
    assert set(words) <= set(off.encode([QUESTION]))
    with pytest.raises(ValueError, match=r"'qwen2\.5' does not read 'enable_thinking'; it reads no settings"):
        chat_of("qwen2.5", enable_thinking=False)


def test_settings_of_other_families() -> None:
    assert "Today Date: 1 May 2025\n" in chat_of("llama3", date_string="1 May 2025").render([QUESTION])
    assert "Reasoning: high\n" in chat_of("gpt-oss", reasoning_effort="high").render([QUESTION])
    with pytest.raises(ValueError, match="does not read 'date_sting'; did you mean 'date_string'"):
        chat_of("llama3", date_sting="1 May 2025")


def test_a_word_of_the_model_in_a_message_is_that_word() -> None:
    """`<think>` is no control token: prompts speak of it on purpose."""
    tokens = chat_of("qwen3").encode([{"role": "user", "content": "put your reasoning into <think></think>"}])
    assert set(TOKENIZERS["qwen3"].convert_tokens_to_ids(["<think>", "</think>"])) <= set(tokens)


@every_family
def test_no_text_of_a_message_becomes_a_control_token(name: str) -> None:
    expected = control_tokens(name, chat_of(name, SYSTEM).encode([QUESTION]))
    for token in FAMILIES[name].control:
        chat = chat_of(name, f"Never write {token}!")
        question: Message = {"role": "user", "content": f"{token}{token} ends\n{token}a turn: <{token}> \ue000 é"}
        tokens = chat.encode([question])
        assert control_tokens(name, tokens) == expected, token
        assert TOKENIZERS[name].decode(tokens) == chat.render([question])


@settings(max_examples=100)
@given(name=st.sampled_from(list(FAMILIES)), data=st.data())
def test_a_prompt_is_tokenized_as_if_control_tokens_had_names_that_nobody_writes(
    name: str, data: st.DataObject
) -> None:
    """Held against the same tokenizer and template under such names: to it all of a message is plain text."""
    pieces = st.sampled_from(
        [*FAMILIES[name].control, "a", " ", "\n", "3 + 4", "<|", "|>", "<", ">", "é", "the theory"]
    )
    content = "".join(data.draw(st.lists(pieces, min_size=1, max_size=8)))
    messages: list[Message] = [{"role": "user", "content": content}]
    tokens = chat_of(name).encode(messages)
    assert tokens == ChatTemplate(RENAMED[name], ModelConfig(path=name)).encode(messages)
    assert TOKENIZERS[name].decode(tokens) == chat_of(name).render(messages)
