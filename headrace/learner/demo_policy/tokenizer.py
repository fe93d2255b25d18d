"""The tokenizers of the demo's policies: byte-level BPE, trained on the texts of a task.

Guarantees: decoding an encoded text gives the same text; exactly `VOCAB_SIZE` tokens, which is the number of the
model's embedding rows. The same texts give the same tokenizer.
"""

from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 512
PAD, END = "<|pad|>", "<|end|>"
ASSISTANT = "<|assistant|>"
ROLES = ("<|system|>", "<|user|>", ASSISTANT, "<|tool|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer(texts: Iterator[str], token_boundaries: str, chat_template: str) -> PreTrainedTokenizerFast:
    """`token_boundaries` is a regular expression; a token stays within one match."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(token_boundaries), behavior="isolated"),
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
    learned.train_from_iterator(texts, trainer)
    num_missing = VOCAB_SIZE - learned.get_vocab_size()
    learned.add_special_tokens([AddedToken(f"<|unused_{index}|>", special=True) for index in range(num_missing)])
    return PreTrainedTokenizerFast(
        tokenizer_object=learned,
        pad_token=PAD,
        eos_token=END,
        chat_template=chat_template,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
