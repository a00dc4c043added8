"""Small byte-level tokenizers, made here, that split text as Llama 3's and Qwen's do."""

import copy
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "User: Is it late? Yes, it is late.\n\nAssistant: Yes, it is.\n\nUser: So?\n\nAssistant: No!\n\n",
    "User: How many? 12 and 345.\n\nAssistant: 357 in all.\n\nSystem: Say yes or no.\n\n",
] * 4
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The published pattern of both families; they differ in how many digits stay together."""


@cache
def llama_like():
    """BOS in front of a text, up to three digits a token."""
    return _trained("1,3", bos="<|begin_of_text|>", eos="<|end_of_text|>")


@cache
def qwen_like():
    """No BOS, one digit a token."""
    return _trained("1", bos=None, eos="<|endoftext|>")


def with_chat(template, tokenizer=qwen_like):
    """Return a tokenizer with a chat template, as instruct models have one."""
    found = copy.deepcopy(tokenizer())
    found.chat_template = template
    return found


def _trained(digits, bos, eos):
    split = pre_tokenizers.Split(Regex(SPLIT % digits), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = [t for t in (bos, eos) if t], level.alphabet()
    sizes = {"vocab_size": 400, "special_tokens": special, "initial_alphabet": alphabet}
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(**sizes, show_progress=False))
    if bos:
        first = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=first
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
