"""A hub as compute nodes without a network see it: caches with all that the study's sweeps name,
made here. Models are of the described families with random weights, data sets are a few rows of the
published schemas, and both lie under their real names and pinned revisions. Tokenizers are small
byte-level ones that split text as Llama 3's and Qwen's do. And shipped data sets, each composed once.
"""

import copy
import dataclasses
import json
import os
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lorasweep.models.load import config_of
from tests.world import compose_request, write_json

COMMIT = "0123456789abcdef" * 2 + "01234567"


def offline(folder, monkeypatch):
    """Let this process read the caches in a folder, and no network."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    for module in (datasets.config, constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)


def make(folder, bases, datasets, shard="2MB"):
    """Fill caches with models in files of at most `shard` and small data sets; return the environment."""
    made = {}
    for model in bases:
        family = dataclasses.replace(model, name="", location="", revision="")
        repository = folder / f"hub/models--{model.location.replace('/', '--')}/snapshots"
        repository.mkdir(parents=True, exist_ok=True)
        if family not in made:
            made[family] = folder / f"bases/{len(made)}"
            base = AutoModelForCausalLM.from_config(config_of(model)).bfloat16()
            base.save_pretrained(made[family], max_shard_size=shard)
            (qwen_like if model.qk_norm else llama_like)().save_pretrained(made[family])
        (repository / model.revision).symlink_to(made[family], target_is_directory=True)
    wanted = {(d.location, d.config, d.revision) for d in datasets if d.source == "hub"}
    wanted |= {(d.test_location, "", d.test_revision) for d in datasets if d.test_location}
    for location, configs, revision in sorted(wanted):
        for config in configs.split("+"):
            download(folder, location, config or "default", revision, ROWS[location]())
    return {
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "HF_HUB_OFFLINE": "1",
    }


TULU, THOUGHTS = 1100, 1200
"""Rows of the small Tulu 3, OpenThoughts3 and DeepMath; 1,024 of each are held out."""


def tulu(k):
    texts = (f"So? {k}", "No", f"So? {k}", f"Yes {k}")
    said = [{"role": r, "content": t} for r, t in zip(("user", "assistant") * 2, texts)]
    return {"id": f"{k}", "messages": said, "source": "made"}


def thought(question, k=0):
    said = [("human", f"Why {question}?"), ("gpt", f"<think>So {k}</think> Yes")]
    row = {"difficulty": 7, "source": "made", "domain": "math"}
    return {**row, "conversations": [{"from": who, "value": text} for who, text in said]}


def problem(k):
    said = f"It is late.\nSo $x = \\boxed{{\\frac{{{k}}}{{7}}}}$"
    about = {"level": "Level 1", "type": "made", "subject": "made", "answer": f"{k}"}
    return {"problem": f"How many {k}?", "solution": said, **about}


def deep(k):
    said = {f"r1_solution_{i}": f"Yes {i}" for i in (1, 2, 3)}
    about = {"difficulty": 5.0, "topic": "made"}
    return {"question": f"So {k}?", "final_answer": f"\\sqrt{{{k}}}", **about, **said}


def school(k):
    return {"question": f"So {k}?", "answer": f"It is <<2*3=6>>6.\n#### {k},000"}


def _rows(row, train=0, test=0):
    splits = {"train": train, "test": test}
    return lambda: {split: [row(k) for k in range(n)] for split, n in splits.items() if n}


ROWS = {
    "allenai/tulu-3-sft-mixture": _rows(tulu, TULU),
    "open-thoughts/OpenThoughts3-1.2M": _rows(thought, THOUGHTS),
    "EleutherAI/hendrycks_math": _rows(problem, 24, 20),
    "HuggingFaceH4/MATH-500": _rows(problem, test=20),
    "openai/gsm8k": _rows(school, 24, 20),
    "zwhe99/DeepMath-103K": _rows(deep, THOUGHTS),
}
"""Of each data set, by split; those with more than one configuration have the same in each."""


def download(folder, location, config, revision, splits):
    """Leave what `datasets` leaves of a data set that was downloaded and read."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    owner, _, name = location.partition("/")
    snake = camelcase_to_snakecase(name)
    files = {}
    for split, rows in splits.items():
        files[split] = str(folder / f"{snake}-{config}-{split}.jsonl")
        write_json(Path(files[split]), rows)
    cache = str(folder / "json")
    builder = datasets.load_dataset_builder("json", data_files=files, cache_dir=cache)
    builder.download_and_prepare()
    kept = folder / f"datasets/{owner}___{snake}/{config}/0.0.0/{revision}"
    kept.parent.mkdir(parents=True)
    os.rename(builder.cache_dir, kept)
    for file in kept.glob("json-*"):
        file.rename(file.with_name(file.name.replace("json-", f"{snake}-", 1)))
    info = kept / "dataset_info.json"
    described = {**json.loads(info.read_text()), "config_name": config, "dataset_name": snake}
    info.write_text(json.dumps(described))


OF_DATA = {"facts": "tiny64-facts", "skills": "tiny64-skills", "words": "tiny64-skills"}
OF_DATA |= {"bandit": "tiny64-knows", "bandit_drawn": "tiny64-knows"}


@cache
def composed(name):
    """Return a run on a shipped data set, with a model that has its symbols."""
    model = [f"model={OF_DATA[name]}"] if name in OF_DATA else []
    return compose_request([*model, f"dataset={name}"]).points[0].spec


def shipped(name, /, **changes):
    return dataclasses.replace(composed(name).dataset, **changes)


# ---------------------------------------------------------------- tokenizers that split as theirs do

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
