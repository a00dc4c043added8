"""Names from other installed packages: found, recorded, refused if two have them or they are broken."""

import sys
from dataclasses import replace

import pytest
import torch

from lorasweep import plugins
from lorasweep.data.splits import check_available, load
from lorasweep.errors import SpecError, StoreError
from lorasweep.methods.registry import method_class, spec_from
from lorasweep.store.exported import load_runs
from lorasweep.store.run_store import RunStore
from lorasweep.tracking.provenance import packages_of
from lorasweep.work.run import train
from tests.conftest import FakeTrainer
from tests.training import pack_of, small_world
from tests.world import ROOT, compose_request, write_splits

EXAMPLE = ROOT / "examples/lorasweep-example"
FILES = {
    "lsw_other/__init__.py": "raise ImportError('listed, never imported')",
    "lsw_other/conf/sweep/lr_ratio.yaml": "question: stolen",
    "lsw_other/conf/sweep/torn.yaml": "question: [",
    "lsw_other/conf/model/unnamed.yaml": "name: other",
    "lsw_other/conf/dataset/example_rules.yaml": "name: example_rules",
    "lsw_other/conf/dataset/mine.yaml": "name: mine",
    "lsw_other/conf/dataset/of_nothing.yaml": "defaults: [dialect_smoke, _self_]\nname: of_nothing\nlocation: none",
    "lsw_torn.py": "def (",
    "lsw_exits.py": "raise SystemExit(3)",
}
ENTRIES = {
    "conf": "lsw_other.conf",
    "method.lora": "json:dumps",
    "method.lora_orthogonal": "json:dumps",
    "method.absent": "lsw_nowhere:Class",
    "method.torn": "lsw_torn:Class",
    "method.exits": "lsw_exits:Class",
    "method.wrong": "json:JSONDecoder",
    "method.renamed": "lorasweep.methods.lora:LoRA",
    "method.exec": "json:dumps",
    "generator.none": "json:dumps",
}
ONE = ("model=tiny64", "dataset=dialect_smoke", "method.rank=4", "lr=5e-3", "steps=3")
RULES = ("model=example_tiny", "dataset=example_rules", "method=lora_orthogonal", *ONE[2:])


def add(folder, name, entries, version):
    """Write what pip writes of a package's name, version and entry points."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{key} = {value}" for key, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[lorasweep]", *lines]))


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install the example, or `other`: a package that is broken in many ways, with names of others."""

    def install(name="example", version="0.1.0"):
        site = tmp_path / f"site-{name}-{version}"
        if name == "example":
            site.mkdir()
            (site / "lorasweep_example").symlink_to(EXAMPLE / "lorasweep_example")
            method = "lorasweep_example.orthogonal:OrthogonalLoRA"
            entries = {"conf": "lorasweep_example.conf", "method.lora_orthogonal": method}
        for path, text in FILES.items() if name == "other" else ():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(text)
        add(site, f"lsw-{name}", entries if name == "example" else ENTRIES, version)
        monkeypatch.syspath_prepend(site)
        forget()

    def forget():
        plugins.entries.cache_clear()
        plugins.offers.cache_clear()

    yield install
    for module in [m for m in sys.modules if m.startswith(("lsw_", "lorasweep_example"))]:
        del sys.modules[module]
    monkeypatch.undo()
    forget()


def test_what_a_package_adds_is_listed_hashed_trained_and_named_in_the_table(
    install, command, tmp_path
):
    assert "orthogonal_init" not in command().stdout
    install()
    assert "Does an orthogonal start change LoRA's best" in command().stdout
    listed = command("--help").stdout
    assert all(name in listed for name in ("example_tiny", "example_rules", "lora_orthogonal"))
    assert "lorasweep_example.orthogonal" not in sys.modules
    specs = [compose_request([*RULES, f"method.gain={gain}"]).points[0].spec for gain in (1, 2)]
    specs += [compose_request([*RULES[:2], "method=lora", *ONE[2:]]).points[0].spec]
    assert len({s.id for s in specs}) == 3 and all(spec_from(s.plain()) == s for s in specs)
    assert {packages_of(s) for s in specs} == {"lsw-example 0.1.0"}
    assert packages_of(compose_request(ONE).points[0].spec) == ""
    request = compose_request(
        ["+sweep=orthogonal_init", "scale=smoke", f"exec.runs_dir={tmp_path}/r"]
    )
    store, trainer = RunStore(request.exec.runs_dir), FakeTrainer(lambda s: 2.0)
    points, status, _ = train(request, store, trainer)
    assert status == 0 and len(trainer.trained) == len(points) == 6
    table = load_runs(store.root)
    assert set(table["packages"]) == {"lsw-example 0.1.0"}
    foreign = table["method"] == "lora_orthogonal"
    assert set(table["method_fields"][foreign]) == {"gain=1.0"} and foreign.sum() == 3
    assert table["method_fields"][~foreign].isna().all()


def test_another_version_answers_from_finished_runs_and_adds_none(install, tmp_path):
    sweep = ("+sweep=orthogonal_init", "scale=smoke", f"exec.runs_dir={tmp_path}/r")
    trainer = FakeTrainer(lambda s: 2.0)
    for version, more in (("0.1.0", ()), ("0.2.0", ()), ("0.2.0", ("sweep.axes.seed=[0,1]",))):
        install(version=version) if not more else None
        request = compose_request([*sweep, *more])
        store = RunStore(request.exec.runs_dir)
        if more:
            with pytest.raises(
                StoreError, match=r"lsw-example 0\.1\.0, and lsw-example 0\.2\.0 is"
            ):
                train(request, store, trainer)
        else:
            assert train(request, store, trainer)[1] == 0
        assert len(trainer.trained) == 6


def test_another_version_resumes_no_run(install, tmp_path, monkeypatch):
    install()
    request = compose_request([*RULES, f"exec.runs_dir={tmp_path}/r"])
    store, (point,) = RunStore(request.exec.runs_dir), request.points
    store.prepare()
    store.write_env(point.id, store.claim(point.spec), {"offered_by": "lsw-example 0.0.9"})
    monkeypatch.setattr(RunStore, "saved_step", lambda self, rid: 1)
    with pytest.raises(StoreError, match=r"lsw-example 0\.0\.9, and lsw-example 0\.1\.0 is"):
        train(request, store, FakeTrainer(lambda s: 2.0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("method=torn", "method 'torn' of lsw-other 2.0 cannot be used: SyntaxError"),
        (
            "method=absent",
            "lsw-other 2.0 cannot be used: ModuleNotFoundError: No module named 'lsw_n",
        ),
        ("method=exits", "SystemExit: 3. Correct it, or pip uninstall lsw-other."),
        ("method=wrong", "'wrong' of lsw-other 2.0 cannot be used: it is not a method"),
        ("method=renamed", "it is not a method with this name"),
        (
            "method=lora_orthogonal",
            "is in lsw-other 2.0 and in lsw-example 0.1.0. Keep one: pip un",
        ),
        ("method=lora", "method 'lora' is in lsw-other 2.0 and in lorasweep"),
        ("method=fullft dataset=example_rules", "pip uninstall lsw-other or pip uninstall lsw-e"),
        (
            "method=fullft dataset=mine",
            "dataset 'mine' is in lsw-other 2.0 and in lorasweep (or your",
        ),
        ("method=fullft dataset=of_nothing", "generator 'none' of lsw-other 2.0 cannot be used"),
        ("method=fullft model=unnamed", "model 'unnamed' of lsw-other 2.0"),
        ("method=ful", "'ful' not found. Did you mean 'fullft'?"),
        ("+sweep=torn", "sweep 'torn' of lsw-other 2.0 cannot be used: ParserError"),
        ("+sweep=lr_ratio", "sweep 'lr_ratio' is in lsw-other 2.0 and in lorasweep"),
    ],
)
def test_a_broken_or_doubled_name_is_refused_when_it_is_named(
    install, command, tmp_path, arguments, words
):
    install()
    install("other", "2.0")
    (tmp_path / "mine/dataset").mkdir(parents=True)
    (tmp_path / "mine/dataset/mine.yaml").write_text("name: mine")
    single = () if "+sweep" in arguments else ONE[:2] + ONE[3:]
    done = command("--config-dir", tmp_path / "mine", *single, *arguments.split())
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert not (tmp_path / "runs").exists() or not [*(tmp_path / "runs").glob("*/result.json")]
    assert "Traceback" not in done.stderr


def test_a_broken_package_stops_nothing_that_does_not_name_it(install, command):
    install("other", "2.0")
    for page in ((), ("--help",), ("+sweep=layers", "--cfg", "job")):
        assert command(*page).returncode == 0
    fullft = (*ONE[:2], *ONE[3:], "method=fullft", "action=plan", "exec.workers=1")
    done = command(*fullft)
    assert done.returncode == 0 and "1 runs" in done.stdout, done.stderr
    assert not {"lsw_other", "lsw_torn", "lsw_exits"} & sys.modules.keys()


def test_a_package_brings_rows_beside_its_yaml_and_a_generator(install, tmp_path, monkeypatch):
    """The generator is dialect's under another name: the same rows."""
    site = tmp_path / "site"
    add(site, "lsw-rows", {"conf": "lsw_rows.conf", "generator.lsw": "lsw_rows:MINE"}, "1.5")
    folder = site / "lsw_rows/conf/dataset"
    write_splits(folder / "lsw_text", [{"prompt": f"{k}?", "completion": f"{k}"} for k in range(9)])
    text = "source: jsonl\nlocation: lsw_text\nn_test: 4\nn_test_curve: 0"
    drawn = "defaults: [dialect_smoke, _self_]\nlocation: lsw"
    for name, values in (("lsw_text", text), ("lsw_drawn", drawn)):
        (folder / f"{name}.yaml").write_text(f"{values}\nname: {name}")
    code = (
        "from lorasweep.data.synthetic.generators import GENERATORS\nMINE = GENERATORS['dialect']"
    )
    (site / "lsw_rows/__init__.py").write_text(code)
    monkeypatch.syspath_prepend(site)
    install()
    requests = [compose_request([*ONE, f"dataset={name}"]) for name in ("lsw_text", "lsw_drawn")]
    for request in requests:
        spec = request.points[0].spec
        assert packages_of(spec) == "lsw-rows 1.5"
        check_available(spec.dataset, request.exec.data_dir)
    drawn = requests[1].points[0].spec.dataset
    same = replace(drawn, location="dialect")
    assert load(drawn, []).sha256 == load(same, []).sha256 is not None


def test_the_examples_method_starts_with_orthogonal_rows_of_their_length_in_a_pack(install):
    install()
    cls, (spec, base, _) = method_class("lora_orthogonal"), small_world()
    methods = [cls(rank=4, gain=gain, layers="attention") for gain in (1.0, 2.0)]
    trainables = pack_of(methods, base.model, spec.model)
    for name, tensor in trainables.parameters().items():
        if trainables.part_of(name)[0].endswith(".A"):
            gram = tensor.detach().double() @ tensor.detach().double().mT
            wanted = torch.stack([torch.eye(4).double() / 3, torch.eye(4).double() * 4 / 3])
            assert torch.allclose(gram, wanted, atol=1e-12)
        else:
            assert not tensor.any()
    with pytest.raises(SpecError, match=r"method\.gain=0\.0: expected above 0"):
        replace(methods[0], gain=0).check(spec.model)
