"""Seven families of models: for each a chat template and a tokenizer of its kind, made for the tests."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from headrace.common.config import ModelConfig
from headrace.common.models.chat_template import ChatTemplate

TEMPLATES = Path(__file__).parents[1] / "common" / "chat_templates"
TEXT = ["<|im end|> <| |> im_end start_of_turn the theory of a <i> tag: 3 + 4 = 7, user and assistant say so. "] * 20


class Family(NamedTuple):
    control: tuple[str, ...]
    eos: str
    generation_eos: tuple[str, ...] | None
    """Of generation_config.json, if the family has one."""
    prompt_ends: str
    """With what the prompt ends, and the answer begins."""
    with_system: str
    """Somewhere in a prompt with a system prompt."""
    ends: tuple[str, ...]
    bos: str | None = None
    words: tuple[str, ...] = ()
    """Tokens of the model's that are no control tokens."""
    is_byte_level: bool = True
    unk: str | None = None


LLAMA_ENDS, CALL = ("<|eot_id|>", "<|eom_id|>"), "<|call|>"
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FAMILIES = {
    "qwen2.5": Family(
        CHATML,
        "<|im_end|>",
        ("<|im_end|>", "<|endoftext|>"),
        "= ?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "qwen3": Family(
        CHATML,
        "<|im_end|>",
        ("<|im_end|>", "<|endoftext|>"),
        "= ?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        ("<|im_end|>", "<|endoftext|>"),
        words=("<think>", "</think>"),
    ),
    "llama3": Family(
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|eom_id|>",
        ),
        "<|eot_id|>",
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        "= ?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|><|start_header_id|>user",
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
    ),
    "gemma3": Family(
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        ("<eos>", "<end_of_turn>"),
        "= ?<end_of_turn>\n<start_of_turn>model\n",
        "<bos><start_of_turn>user\nBe brief.\n\n3 + 4 = ?<end_of_turn>\n",
        ("<eos>", "<end_of_turn>"),
        bos="<bos>",
        is_byte_level=False,
        unk="<unk>",
    ),
    "smollm2": Family(
        CHATML,
        "<|im_end|>",
        None,
        "= ?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        ("<|im_end|>",),
        unk="<|endoftext|>",
    ),
    "glm4.5": Family(
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        "<|endoftext|>",
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
        "= ?<|assistant|>",
        "[gMASK]<sop><|system|>\nBe brief.<|user|>\n",
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
        words=("<think>", "</think>"),
    ),
    "gpt-oss": Family(
        (
            "<|startoftext|>",
            "<|endoftext|>",
            "<|return|>",
            "<|start|>",
            "<|end|>",
            "<|message|>",
            "<|channel|>",
            "<|call|>",
        ),
        "<|return|>",
        ("<|return|>", "<|endoftext|>", "<|call|>"),
        "= ?<|end|><|start|>assistant",
        "Current date: 2024-07-26\n\nReasoning: medium",
        ("<|return|>", "<|endoftext|>", "<|call|>"),
    ),
}


def byte_level() -> tuple[Tokenizer, list[str]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre_tokenizers.ByteLevel.alphabet()


def sentence_piece() -> tuple[Tokenizer, list[str]]:
    """As Gemma's: spaces become a character, and what has no token is spelled in bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer, []


def make_tokenizer(name: str) -> Any:
    family = FAMILIES[name]
    tokenizer, alphabet = byte_level() if family.is_byte_level else sentence_piece()
    control = list(family.control) if family.is_byte_level else [*family.control, "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if not family.is_byte_level:
        content = json.loads(tokenizer.to_str())
        vocabulary = content["model"]["vocab"]
        vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
        tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in family.words])
    if family.bos is not None:  # which a template must not double
        bos = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=[bos])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos,
        unk_token=family.unk,
        additional_special_tokens=list(family.control),
    )
    made.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return made


TOKENIZERS = {name: make_tokenizer(name) for name in FAMILIES}


def chat_of(name: str, system_prompt: str | None = None, **chat_settings: Any) -> ChatTemplate:
    return ChatTemplate(TOKENIZERS[name], ModelConfig(path=name, chat_template_settings=chat_settings), system_prompt)


def control_tokens(name: str, tokens: list[int]) -> list[str]:
    found = [TOKENIZERS[name].convert_ids_to_tokens(token) for token in tokens]
    return [token for token in found if token in FAMILIES[name].control]
