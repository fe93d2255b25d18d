"""The tokenizers of the demo's policies: byte-level BPE, trained on the texts of a task.

Guarantees: decoding an encoded text gives the same text; exactly `VOCAB_SIZE` tokens, which is the number of the
model's embedding rows. The same texts give the same tokenizer.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from headrace.learner.demo_policy.recipe import Recipe

VOCAB_SIZE = 512
PAD, END = "<|pad|>", "<|end|>"
ASSISTANT = "<|assistant|>"
ROLES = ("<|system|>", "<|user|>", ASSISTANT, "<|tool|>")


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(recipe.token_boundaries), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(recipe.added_tokens),
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learned.train_from_iterator(recipe.texts(), trainer)
    learned.add_tokens([AddedToken(text, normalized=False) for text in recipe.added_tokens])
    num_missing = VOCAB_SIZE - learned.get_vocab_size()
    learned.add_special_tokens([AddedToken(f"<|unused_{index}|>", special=True) for index in range(num_missing)])
    return PreTrainedTokenizerFast(
        tokenizer_object=learned,
        pad_token=PAD,
        eos_token=END,
        chat_template=recipe.chat_template,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
