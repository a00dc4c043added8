"""A small base that reads text, and customers' rows to fine-tune it on."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lorasweep.advise.read import Customer, shape_of
from tests.bpe import llama_like
from tests.world import write_json

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_base(folder, dtype=torch.bfloat16, **changes):
    """Write a Llama with random weights and a tokenizer; returns the folder."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    shape |= {"vocab_size": 400, "tie_word_embeddings": True, **heads, **changes}
    tokenizer = llama_like()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(**shape, **ends)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def model_of(base):
    """The base's ModelSpec, as the adviser reads it."""
    return shape_of(Customer("any", str(base / "config.json"), "sft"), {})


def write_rows(path, count, answer, question="How many? {k}", start=0):
    """Write rows with two columns; `answer` and `question` are templates of the row's number."""
    numbers = range(start, start + count)
    rows = [{"prompt": question.format(k=k), "completion": answer.format(k=k)} for k in numbers]
    return write_json(path, rows)
