"""Let a foreign command train a run: hand over rows and settings, watch it, measure its result.

The command runs in its own process group. If this process is killed, a watcher kills the group;
what still lives of an earlier attempt on this machine is killed before the next one begins.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from lorasweep.data.handed import write_rows
from lorasweep.errors import SpecError, TrainingError
from lorasweep.launch.out_of_memory import free_memory
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.plan import detect
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.spec.trainer import PLACE, PLACES, places_in
from lorasweep.store import files
from lorasweep.store.run_store import RunStore
from lorasweep.train.events import Event

POLL_S, LOOK_S, GRACE_S = 0.1, 5.0, 20.0
"""Seconds between looks at the command, between checks of the claim, from SIGTERM to SIGKILL."""
TAIL, WIDTH, SECRET = 20, 2000, ("TOKEN", "KEY", "SECRET", "PASSWORD")
"""Last lines of a failed command to show, and characters of each; parts of the names of variables
whose values are struck out."""
MARK = "LORASWEEP_ATTEMPT"
"""Environment variable with the attempt's folder, by which its processes are found."""
ASK = """
from importlib.metadata import version
for name in ("accelerate", "peft", "torch", "transformers", "trl"):
    try: print(name, version(name))
    except ImportError: pass
"""


WARMED = {"constant": "constant_with_warmup"}
"""transformers' names of schedules with a warm-up, where that of our name drops it."""


def train(trainer: Any, run: RunSpec, exec_: Exec, stop: StopFlag) -> Iterator[Event]:
    """Train a claimed run by its command, measure the result, and yield the event that ends it.

    `trainer`: a TorchTrainer, for base and data. Yields nothing if another process owns the run.

    Raises:
        SpecError: a file of the trainer has changed.
        TrainingError: the command failed, hung, left no result, or not the one that was asked.
            What it says of the command's texts is without secrets.
        Stopped: `stop` was set; the command has ended.
    """
    try:
        yield from _train(trainer, run, exec_, stop)
    except TrainingError as error:
        lines = without_secrets(str(error)).splitlines()
        raise TrainingError("\n".join(line[:WIDTH] for line in lines)) from None


def _train(trainer: Any, run: RunSpec, exec_: Exec, stop: StopFlag) -> Iterator[Event]:
    from lorasweep.models.load import transformers_folder
    from lorasweep.train import referee

    store = RunStore(exec_.runs_dir)
    n, resume = store.last_attempt(run.id) or 0, ""
    attempt = store.attempt(run.id, n)
    for k in range(1, n):  # the last checkpoint since a failure
        _kill_marked(store.attempt(run.id, k))
        left = referee.checkpoints(store.attempt(run.id, k) / "out")
        failed = (store.end(run.id, k) or {}).get("state") == "failed"
        resume = "" if failed else str(left[0]) if left else resume
    for path, digest in zip(exec_.trainer_files, run.trainer.files, strict=True):
        if not os.path.isfile(path) or files.sha256(Path(path)) != digest:
            raise SpecError(f"{path} has changed since the command was given. Give it again.")
    out, rows = attempt / "out", attempt / "rows"
    if out.exists():  # a retry in this attempt; it is never emptied
        raise TrainingError(f"too little memory to measure what the trainer left in {out}.")
    out.mkdir()
    base = trainer.base(run, exec_)
    write_rows(rows, run, trainer.data(run, exec_, base), base.tokenizer, exec_.data_dir)
    lora, method, t = run.method.name == "lora", run.method, run.trainer
    gpus = detect.devices()  # of several, transformers' Trainer takes a batch each
    gpus = gpus if "gpus" in places_in(*t.command, *(t.lora if lora else t.full)) else gpus[:1]
    modules = [m for s in method.target_layers() * lora for m in run.model.modules(s)[0]]
    values: dict[str, Any] = {
        **{**vars(run), **vars(method), "method": method.name, "clip_norm": run.clip_norm or 0},
        **{"layers": ",".join(modules), "modules": rf".*\b({'|'.join(modules)})"},
        **{"max_length": run.dataset.max_length, "gpus": max(1, len(gpus))},
        "model": str(transformers_folder(run.model, exec_.models_dir, attempt / "base")),
        "script": next(iter(exec_.trainer_files), ""),
        "schedule": WARMED.get(run.schedule, run.schedule) if run.warmup_steps else run.schedule,
        **{"rows": str(rows), "out": str(out), "resume": resume},
    }
    values = {name: values.get(name, 0) for name in PLACES}
    (out / "run.json").write_text(json.dumps({"id": run.id, **values}, indent=1))
    texts = {k: f"{v:.12g}" if isinstance(v, float) else str(v) for k, v in values.items()}
    words = [*t.command, *(t.lora if lora else t.full), *(t.resume if resume else ())]
    words = [PLACE.sub(lambda place: texts[place[1]], word) for word in words]
    store.log(run.id, n, without_secrets(f"command: {json.dumps(words)}"))
    if detect.gpus():  # whose memory the command needs
        base = trainer.release()
        free_memory()
    started = time.monotonic()
    owned = _run(words, gpus, attempt, stop, exec_, lambda: store.last_attempt(run.id) == n)
    step_s = (time.monotonic() - started) / run.steps
    for ours in (rows, attempt / "base"):  # as large as the data, and as a shipped base
        shutil.rmtree(ours, ignore_errors=True)
    if not owned:
        return
    curve, base = referee.reported(out), base or trainer.base(run, exec_)
    weights, data = referee.read_weights(out, run, base), trainer.data(run, exec_, base)
    event = referee.judge(run, base, data, weights, exec_.forward_parts, curve)
    store.record(run.id, *curve)
    versions = without_secrets(versions_of(words[0]))
    more = {"trainer_versions": versions, "step_s": step_s, "resumed": bool(resume)}
    event.ended[run.id][1].update(more)
    yield event


def _run(
    words: list[str], gpus: Sequence[str], attempt: Path, stop: StopFlag, exec_: Exec, owns: Any
) -> bool:
    """Run the command to its end; return whether this process still owns the run."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | {MARK: str(attempt)}
    ours = str(Path(__file__).resolve().parents[2])
    if path := env.pop("PYTHONPATH", "").removeprefix(ours).lstrip(os.pathsep):
        env["PYTHONPATH"] = path  # without our code
    env |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    log = attempt / "trainer.log"
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        try:
            process = subprocess.Popen(words, env=env, start_new_session=True, **pipes)
        except OSError as error:
            why = f"{words[0]!r} cannot be started ({error.strerror})"
            raise TrainingError(f"{why}. Begin trainer.command with a program.") from None
    # if this process dies, its end of the pipe closes
    kill = ["sh", "-c", 'read x; kill -9 "-$0"', str(process.pid)]
    watcher = subprocess.Popen(kill, stdin=subprocess.PIPE, start_new_session=True)
    started, looks, why = time.monotonic(), 1, ""
    try:
        while process.poll() is None and not why:
            time.sleep(POLL_S)
            past = time.monotonic() - started
            if stop.set:
                raise Stopped
            if past > 3600 * exec_.trainer_max_h:
                why = "did not end within trainer.max_h"
            elif past > looks * LOOK_S:
                looks += 1
                if not owns():
                    return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        _kill_marked(attempt)
        for ended in (process, watcher):
            ended.kill()
            ended.wait()
    if (code := process.returncode) or why:
        why = why or f"ended with {f'signal {-code}' if code < 0 else f'exit status {code}'}"
        last = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])
        raise TrainingError(f"the trainer {why}. The end of {log}:\n{last}")
    return owns()


def _kill_marked(attempt: Path) -> None:
    """Kill the processes of an attempt on this machine, also those that left its group."""
    for place in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"{MARK}={attempt}".encode() in place.read_bytes().split(b"\0"):
                os.kill(int(place.parent.name), signal.SIGKILL)


def without_secrets(text: str) -> str:
    """Return a text without the values of variables whose names have a part of SECRET."""
    named = {v for k, v in os.environ.items() if any(part in k.upper() for part in SECRET)}
    parts = {
        part for v in named for part in (v, json.dumps(v)[1:-1], repr(v)[1:-1], *v.splitlines())
    }
    for value in sorted(parts - {"true", "false", "True", "False"}, key=len, reverse=True):
        text = text.replace(value, "***") if len(value) > 3 else text
    return text.encode(errors="backslashreplace").decode()  # a name of a file may be any bytes


@cache
def versions_of(program: str) -> str:
    """Return the versions of the libraries of a program's Python; '' if it is no Python program."""
    path = shutil.which(program) or os.devnull
    with suppress(OSError, subprocess.SubprocessError):  # it may be executable, not readable
        with open(path, "rb") as file:
            first = file.read(400).decode(errors="replace").split("\n")[0]
        python = first[2:].split() if first.startswith("#!") else [path]
        asked = [*python, "-c", ASK] if "python" in " ".join(python) else ["true"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=120)
        return ", ".join(done.stdout.splitlines())
    return ""
