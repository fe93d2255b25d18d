"""The demo policy's tokenizer: byte-level BPE, trained on the arithmetic task's texts.

Guarantees: one token per digit; decoding an encoded text gives the same text; exactly `VOCAB_SIZE` tokens, which is the
number of the model's embedding rows. It is trained on a fixed sample of problems, so that it is always the same.
"""

import itertools
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from headrace.common.tasks.arithmetic import train_problems

VOCAB_SIZE = 512
PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
NUM_PROBLEMS = 5000

PIECE = r"\d| ?[A-Za-z]+|[^\dA-Za-z]+"
"""Tokens stay within one match: a digit, a word with its leading space, or a run of other characters."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learned.train_from_iterator(_texts(), trainer)
    num_missing = VOCAB_SIZE - learned.get_vocab_size()
    learned.add_special_tokens([AddedToken(f"<|unused_{index}|>", special=True) for index in range(num_missing)])
    return PreTrainedTokenizerFast(
        tokenizer_object=learned,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _texts() -> Iterator[str]:
    for problem in itertools.islice(train_problems(seed=0, epoch=0), NUM_PROBLEMS):
        yield problem.question
        yield problem.demonstration
