"""Rows of customers: types, defaults, and every way in which a row can be wrong."""

import dataclasses
import json
import re

import pytest
import torch

from lorasweep.advise import read
from lorasweep.advise.advice import answers
from lorasweep.advise.read import Customer, RowError, customer_of, read_customers, shape_of
from lorasweep.errors import ModelError, SpecError
from tests.customers import known, make_base

ROW = {"name": "acme", "model": "qwen3-8b", "task": "sft"}


def test_the_first_three_columns_are_enough_and_cells_are_text():
    c = customer_of({**ROW, "task": " SFT ", "examples": "50,000", "lr": "+2e-4", "epochs": ""})
    assert (c.task, c.examples, c.lr, c.epochs) == ("sft", 50_000, 2e-4, None)
    assert customer_of({**ROW, "tokens_per_example": "1,234.5"}).tokens_per_example == 1234.5
    assert (c.max_regret, c.adapters_served) == (2.0, 1)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"model": ""}, "column model: missing"),
        ({"task": "dpo"}, "column task='dpo'. Allowed: sft, rl"),
        ({"examples": "many"}, "column examples='many': expected a whole number of at least 1 (rows"),
        ({"examples": "1.5"}, "column examples=1.5: expected a whole number"),
        ({"examples": "x", "gpus": "-1", "lr": "y"}, "column gpus=-1"),  # all at once
        ({"examples": "inf"}, "column examples"),
        ({"lr": "nan"}, "column lr"),
        ({"gpus": "100000"}, "at most 512"),
        ({"gpus": True}, "column gpus=True: expected a whole number"),
        ({"layers": "atention"}, "column layers: "),
        ({"tied": "maybe"}, "expected true or false"),
        ({"examples": "=B2*2"}, "column examples: '=B2*2' is a formula"),
        ({"name": "@SUM(A1)"}, "column name: '@SUM(A1)' is a formula"),
        ({"name": "+cmd|' /C calc'!A0"}, "is a formula"),
        ({"examples": "50.000"}, "column examples: '50.000' means"),
        ({"tokens_per_example": "1.234,567"}, "column tokens_per_example='1.234,567'"),
        ({"where": "row 1"}, "column 'where' not found"),
        ({"exmaples": "3"}, "Did you mean 'examples'?"),
        ({"episodes": "100"}, "only with task=rl"),
        ({"tokens_per_example": "40000000"}, "not the total"),
        ({"tokens_per_example": "900", "max_length": "512"}, "tokens_per_example and max_length"),
        ({"examples": "1000", "epochs": "1", "batch_size": "10", "steps": "500"}, "500 x 10 = 5,000, but examples x epochs = 1,000"),
    ],
)  # fmt: skip
def test_a_wrong_cell_is_named_with_its_column(columns, says):
    with pytest.raises(RowError) as found:
        customer_of({**ROW, **columns})
    assert says in str(found.value)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


HEAD = "name,model,task\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        *((text, "no customers in it. Expected a header") for text in ("\n", HEAD, HEAD + ",,\n")),
        ("name,model,task,exampels\na,b,sft,3\n", "Did you mean 'examples'"),
        ("name,model\na,b\n", "no column task"),
        ("name,model,task,task\na,b,sft,sft\n", "column task twice"),
        (HEAD + '"a,b,sft\n', "row 2"),
    ],
)
def test_an_empty_table_and_a_wrong_header_are_refused(tmp_path, text, says):
    with pytest.raises(SpecError, match=re.escape(says)):
        read_customers(write(tmp_path / "c.csv", text))


def test_tables_as_spreadsheets_write_them(tmp_path):
    text = "name;model;task;examples\r\nacme;qwen3-8b;sft;10\r\n\r\n;;;\r\nb;c;rl;2\r\n"
    for n, above in enumerate(("", ";;;\r\n")):
        rows = read_customers(write(tmp_path / "c.csv", f"\ufeff{above}{text}"))
        assert [r.where for r in rows] == [f"row {2 + n}", f"row {5 + n}"]
        assert rows[0] == Customer("acme", "qwen3-8b", "sft", 10, where=f"row {2 + n}")


def test_numbers_that_countries_read_differently_are_refused(tmp_path):
    text = "name;model;task;examples;price_per_gpu_h\n"
    text += "a;qwen3-8b;sft;50.000;2\nb;qwen3-8b;sft;50000;2,950\nc;qwen3-8b;sft;50000;0.125\n"
    one, two, three = read_customers(write(tmp_path / "c.csv", text))
    (short,) = read_customers(write(tmp_path / "d.csv", "task;examples;name;model\nsft;50.000\n"))
    assert short.where == "row 2" and "'50.000' means" in short.error
    assert "column examples: '50.000' means different numbers" in one.error
    assert "column price_per_gpu_h: '2,950' means different numbers" in two.error
    assert three.price_per_gpu_h == 0.125


def test_yaml_holds_a_list_and_an_entry_that_is_none_is_an_error_of_its_own(tmp_path):
    rows = read_customers(write(tmp_path / "c.yaml", "- {name: a, model: b, task: sft}\n- 3\n"))
    assert rows[0].name == "a" and rows[1].where == "entry 2" and rows[1].problems
    for text, says in (("a: 3\n", "expected a list"), ("- {", "not valid YAML")):
        with pytest.raises(SpecError, match=says):
            read_customers(write(tmp_path / "d.yaml", text))
    with pytest.raises(SpecError, match="No such file"):
        read_customers(tmp_path / "f.csv")


def test_a_wrong_row_does_not_affect_others(tmp_path):
    rows = ("a,qwen3-8b,sft,1000,", "b,qwen9,sft,1000,", "c,qwen3-8b,sft,1000,h1000")
    rows += ("d,qwen3-8b,sft,1000,,,3", "a,qwen3-8b,sft,1000,", "e,qwen3-8b,rl,1000,a100")
    text = "\n".join(["name,model,task,examples,hardware", *rows])
    found = answers(read_customers(write(tmp_path / "c.csv", text)), known())
    errors = {k: a.error for k, a in enumerate(found) if isinstance(a, RowError)}
    assert [*errors] == [1, 2, 3, 4] and "hidden_size" in errors[1] and "config.json" in errors[1]
    says = ("row 3: column model: model 'qwen9'", "row 4: column hardware: hardware 'h1000'")
    says += ("row 5: 7 cells under 5 columns", "row 6: column name: an earlier row has 'a'")
    assert all(errors[k].startswith(text) for k, text in enumerate(says, 1))
    no_paths = (("~no/model", "model"), ("x" * 300, "model"), ("~no/rows.jsonl", "data"))
    odd = [(c, {**ROW, "name": f"{k}", c: g}) for k, (g, c) in enumerate(no_paths)]
    *wrong, right = answers(read.check_rows([*odd, ("last", ROW)]), known())
    assert [a.error.split(": ")[1] for a in wrong] == [f"column {where}" for where, _ in odd]
    assert right.name == "acme"


SHAPE = {"hidden_size": 1024, "n_layers": 28, "n_heads": 16, "n_kv_heads": 8, "head_size": 128}
SHAPE |= {"mlp_size": 3072, "vocab_size": 151936, "tied": True}


def shape(**columns):
    return shape_of(customer_of({**ROW, **columns}), known().models)


def test_a_model_is_known_by_its_name_and_by_the_hubs_or_by_columns():
    assert shape(model="Qwen/Qwen3-8B") == shape(model="qwen3-8B") == shape(model="qwen3-8b")
    model = shape(model="qwen3-0.6b", **SHAPE)
    assert model.n_params == pytest.approx(596e6, rel=0.01)  # 0.6B, as its card says
    for columns, says in (
        ({"n_layers": 28}, "column n_layers: 28, but qwen3-8b has 36"),
        ({**SHAPE, "model": "x", "mlp_size": None}, "fill the columns mlp_size"),
        ({**SHAPE, "model": "x", "n_kv_heads": 5}, "multiple of n_kv_heads=5"),
    ):
        with pytest.raises(RowError, match=says):
            shape(**columns)


def test_a_config_json_gives_the_shape_of_experts_too(tmp_path):
    path = tmp_path / "config.json"
    config = {
        "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "moe_intermediate_size": 768, "vocab_size": 151936, "num_experts": 128,
        "num_experts_per_tok": 8,
    }  # fmt: skip
    path.write_text(json.dumps(config))
    mine, shipped = shape(model=str(path)), shape(model="qwen3-30b-a3b")
    assert mine == shape(model=str(path.parent))
    assert (mine.n_params, mine.n_active_params) == (shipped.n_params, shipped.n_active_params)
    for text, says in (("{}", "model_type"), ("[1]", "model_type"), ("no JSON", "cannot be read")):
        path.write_text(text)
        with pytest.raises(RowError, match=says):
            shape(model=str(path))
    with pytest.raises(RowError, match="No such file"):
        shape(model=str(tmp_path / "gone.json"))


def test_a_gguf_file_and_a_name_on_the_hub_are_described_as_for_sweeps(tmp_path, monkeypatch):
    asked = []

    def describe_model(given):
        asked.append(given)
        if given == "o/x":
            raise ModelError(f"cannot get {given}.")
        folder = str(tmp_path) if given.endswith(".gguf") else ""
        return dataclasses.replace(shape(model="tiny64"), location="a.gguf", name=given), folder

    read._described.cache_clear()
    monkeypatch.setattr("lorasweep.models.describe.describe_model", describe_model)
    assert shape(model=str(tmp_path / "a.gguf")).location == str(tmp_path / "a.gguf")
    assert shape(model="owner/name@main").name == "owner/name@main"
    for _ in range(3):  # a name that cannot be reached takes half a minute
        with pytest.raises(RowError, match=r"cannot get o/x\. Or fill the columns hidden_size"):
            shape(model="o/x")
    assert asked.count("o/x") == 1


@pytest.mark.parametrize(
    "stated, stored, found",
    [
        ({"dtype": "bfloat16"}, None, "bf16"),
        ({"torch_dtype": "float16"}, None, "fp32"),  # bf16 does not hold its values
        ({"dtype": None}, torch.float32, "fp32"),
        ({}, None, "bf16"),  # the weights are elsewhere: as most are published
    ],
)
def test_the_type_of_weights_is_read_from_the_models_folder(tmp_path, stated, stored, found):
    path = make_base(tmp_path, stored or torch.float32) / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "dtype"}
    path.write_text(json.dumps({**config, **stated}))
    if stored is None:
        (tmp_path / "model.safetensors").unlink()
    assert shape_of(Customer("any", str(tmp_path), "sft"), {}).weights_dtype == found
