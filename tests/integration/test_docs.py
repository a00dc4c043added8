"""The pages say what a person gets: every command in them runs, links lead somewhere, the tree is true.

A documented command is tried at `scale=smoke` on the runs of one small sweep. One that names a cluster or a
single model, or changes the grid, is only planned.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess

import pytest

from analysis.report.study import answers
from analysis.report.study import page as study_page
from lorasweep.cli.actions import ACTIONS, as_overrides
from lorasweep.work.answer import KEPT
from tests.conftest import SMOKE
from tests.customers import make_base, write_rows
from tests.world import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = ("AGENTS.md", "slurm/README.md", "DECISIONS.md", "docs/log/README.md")
OTHERS = [ROOT / name for name in (*OTHERS, "examples/lorasweep-example/README.md")]
LINKED = [*PAGES, *OTHERS, *sorted(KEPT.glob("*.md")), *sorted(KEPT.glob("questions/*.md"))]
MAY_REFUSE = {
    "action=extend": "nothing would decide more at smoke",
    "action=cancel": "no cluster is there",
    "action=fetch": "the hub may be out of reach",
    "action=measure": "the file and the weights are not there",
    "customers='customers.csv'": "no server is there",
}
COMMAND = re.compile(r"^(?:python -m )?lorasweep\b(.*)$", re.MULTILINE)
SWEEPS = {path.stem for path in (ROOT / "sweeps").glob("*.yaml")} | {"alpha"}


def in_overrides(args):
    """Verbs as overrides; flags stay in front."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir")
    named, rest = parser.parse_known_args(args)
    mine = ["--config-dir", named.config_dir] if named.config_dir else []
    return [
        *mine,
        *(rest if "--help" in rest or rest[:1] == ["help"] else as_overrides(rest, SWEEPS)),
    ]


def tried(args):
    if not args or {"--help", "action=import", "action=advise", "action=measure"} & set(args):
        return args
    if "action=check_gpu" in args:  # here, not as a job
        return [a for a in args if not a.startswith("cluster")]
    large = ("cluster=", "sweep.", "+sweep.", "model=", "hardware=")
    # runs that an extension added are trained by nobody here, so a watch would not end
    args = [a for a in args if not a.startswith(("scale=", "watch="))]
    acts = any(a.startswith("action=") for a in args)
    if not acts and ("+sweep=lr_ratio" not in args or any(a.startswith(large) for a in args)):
        args = [*args, "action=plan"]
    if "action=plan" not in args:  # runs are there for one sweep only
        args = ["+sweep=lr_ratio" if a.startswith("+sweep=") else a for a in args]
    return [*args, "scale=smoke"]


def halves():
    """Each command of the pages' bash blocks once, as it is tried: (page, *arguments). One
    for each action that takes about a second comes first, then all others."""
    found = {}
    for page in PAGES:
        blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
        for m in (m for block in blocks for m in COMMAND.finditer(block.replace("\\\n", " "))):
            args = tried(in_overrides(shlex.split(m[1], comments=True)))
            found.setdefault((*args,), (page.name, *args))
    long = tuple(f"action={a}" for a in ("fleet", "extend", "verify", "check_gpu"))
    short, every = {}, [*found.values()]
    for page, *args in reversed(every):
        action = next((a for a in args if a.startswith(("action=", "--help"))), "run")
        if not any(a.startswith((*long, "+sweep=study", "mirror=")) for a in args):
            short[action] = (page, *args)
    return [*short.values()], [one for one in every if one not in short.values()]


@pytest.mark.slow
@pytest.mark.xdist_group("smoke")
@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.full)])
def test_every_documented_command_runs(half, command, smoke_copy, tmp_path, monkeypatch):
    pages = "".join((ROOT / "docs" / f"{n}.md").read_text() for n in ("rows", "sweep_files"))
    for name, body in re.findall(r"```yaml\n# (mine/\S+)\n(.*?)```", pages, re.DOTALL):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(body)
    shutil.copy(ROOT / "examples/train.py", tmp_path)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "customers.csv", tmp_path / "docs")
    write_rows(tmp_path / "dental.jsonl", 24, "Yes {k}")
    config = make_base(tmp_path / "my-model") / "config.json"
    rows = "".join(f"So? {k},Yes {k}\n" for k in range(60))
    (tmp_path / "rows.csv").write_text(f"question,answer\n{rows}")
    row = f"name,model,task,data\ndental-notes,{config},sft,dental.jsonl\n"
    (tmp_path / "customers.csv").write_text(row)
    for table in ("runs.parquet", "runs.csv"):
        assert command("export", *SMOKE, f"out={table}").returncode == 0
    monkeypatch.setenv("WANDB_MODE", "offline")
    wanted, failed = halves()[half], []
    assert len(wanted) > 9
    for page, *args in wanted:
        done = command(*args)
        if done.returncode != 0 and not MAY_REFUSE.keys() & set(args):
            said = f"{page}: lorasweep {' '.join(args)}: exit {done.returncode}"
            failed.append(f"{said}\n{done.stderr[-800:]}")
    assert not failed, "\n\n".join(failed)


def test_commands_that_the_table_recommends_are_understood(command, tmp_path):
    settings = (ROOT / "analysis/report/study/settings.yaml").read_text()
    (tmp_path / "rows.csv").write_text(
        "question,answer\n" + "".join(f"So? {k},Yes {k}\n" for k in range(60))
    )
    base, known = str(make_base(tmp_path / "my-model")), "llama-3.1-8b"
    found = [c.split()[1:] for c in re.findall(r"`(lorasweep [^` ]+ [^`]+)`", settings)]
    for action, *words in found:
        said = " ".join(words).replace("MODEL", known if action == "rate" else base)
        typed = said.replace("ROWS", str(tmp_path / "rows.csv")).split()
        more = {"rate": [action], "run": ["action=plan"]}.get(action, [action, "action=plan"])
        done = command(*more, *typed)
        assert done.returncode == 0, (action, typed, done.stderr)
    assert len(found) > 7


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_commands_of_the_front_page_mean_the_same_in_every_shell(shell, tmp_path):
    """No word of them is a pattern, a variable or a subscript, so no quotes are needed."""
    if not shutil.which(shell) and not os.environ.get("LORASWEEP_NO_SKIP"):
        pytest.skip(f"{shell} is not installed")
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    found = [m[0].split(" #")[0] for block in blocks for m in COMMAND.finditer(block)]
    settings = (ROOT / "analysis/report/study/settings.yaml").read_text()
    found += re.findall(r"`(lorasweep [^`]+)`", settings)
    script = "lorasweep() { printf '%s\\n' \"$@\"; }\n" + "\n".join(found)
    said = subprocess.run([shell, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert said.stderr == "" and len(found) > 15
    assert said.stdout.split("\n")[:-1] == [w for c in found for w in c.split()[1:]]


def test_the_page_for_programs_names_every_action_and_keys_that_are_there():
    text = (ROOT / "AGENTS.md").read_text()
    rows = re.findall(r"^\| (`[^|]*`) \| ([^|]*) \|.*\|.*\|$", text, re.M)
    said = {
        verb: set(re.findall(r"`(\w+)`", value)) - ACTIONS.keys()
        for verbs, value in rows
        for verb in re.findall(r"`(\w+)`", verbs)
    }
    assert said.keys() == ACTIONS.keys()
    golden = json.loads((ROOT / "tests/golden/json_keys.json").read_text())
    for verb in said.keys() & golden.keys():
        there = {key.removeprefix("[].").split(".")[0].removesuffix("[]") for key in golden[verb]}
        assert said[verb] <= there, verb
    assert re.findall(r"^\| (\d+) \|", text, re.M) == ["0", "1", "2", "130", "141"]


@pytest.mark.parametrize("page", LINKED, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_tree_names_every_room():
    text = (ROOT / "docs" / "tree.md").read_text()
    tree = re.search(r"## Folders\n+```text\n(.*?)```", text, re.DOTALL)[1]
    stack, named = [], set()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        entries = re.match(r"\s*((?:[\w.]+(?:/|\.py)(?:\s+|$))+)", line)[1].split()
        for entry in entries:
            path = "/".join([*stack[:depth], entry.rstrip("/")])
            assert (ROOT / path).exists(), path
            named.add(path)
        stack[depth:] = [entries[0].rstrip("/")]
    for package in ("lorasweep", "analysis"):
        for init in (ROOT / package).rglob("__init__.py"):
            assert str(init.parent.relative_to(ROOT)) in named
    for path in re.findall(r"`((?:analysis|lorasweep)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_front_page_shows_what_a_search_has_not_decided():
    """Without the last two lines of the answer a choice looks settled that is not."""
    front, page = (
        re.search(r"```text\n(Use .*?)```", (ROOT / name).read_text(), re.DOTALL)[1].splitlines()
        for name in ("README.md", "docs/search.md")
    )
    whole = [line for line in page if any(line.startswith(begin) for begin in front)]
    assert len(whole) == len(front) and len(front) > 3
    assert front[-2].endswith("not decided at 5%") and front[-1].startswith("open:")


def test_front_pages_are_short_and_all_pages_of_results_are_of_the_kept_results():
    today = study_page.pages(answers.read_answers([KEPT]), KEPT / "README.md", kept=True)
    del today[study_page.TABLE]  # see test_freshness
    assert {name: (KEPT / name).read_text() for name in today} == today
    there = {f"questions/{p.name}" for p in (KEPT / "questions").iterdir()}
    assert there == {name for name in today if name.startswith("questions/")}
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130 and study_page.readme(text, KEPT) == text
    plain = re.sub(r"<sub>.*?</sub>", "", text)  # without where the numbers were measured
    assert len(plain.split()) <= 1300
    assert not re.search("supported|refuted|undecided|exploratory", plain, re.IGNORECASE)
    cells = [c for page in (plain, today["README.md"]) for c in re.findall(r"[^|\n]+(?= \|)", page)]
    assert len(cells) > 100 and max(map(len, cells)) <= 100
    pages = {*PAGES, *ROOT.glob("*.md"), ROOT / "slurm/README.md"}
    assert sum(len(page.read_text().split()) for page in pages) <= 20_000
    listed = re.findall(r"\]\((\w+\.md)\)", today["questions/README.md"])
    assert there - {"questions/README.md"} <= {f"questions/{name}" for name in listed}
