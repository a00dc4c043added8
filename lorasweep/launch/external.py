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
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.data.handed import write_rows
from lorasweep.errors import TrainingError
from lorasweep.launch.process import StopFlag, Stopped
from lorasweep.plan import detect
from lorasweep.spec.execution import Exec
from lorasweep.spec.run import RunSpec
from lorasweep.spec.trainer import PLACE
from lorasweep.store import files
from lorasweep.store.run_store import RunStore
from lorasweep.train.events import Event

if TYPE_CHECKING:
    from lorasweep.launch.trainer import TorchTrainer

POLL_S, LOOK_S = 0.1, 5.0
"""Seconds between looks at the command, and between checks that this process owns the run."""
GRACE_S = 20.0
"""Seconds between SIGTERM and SIGKILL."""
TAIL = 20
"""Last lines of a failed command's output that are shown."""
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")
"""Parts of the names of environment variables whose values are struck out of these lines."""
MARK = "LORASWEEP_ATTEMPT"
"""Environment variable with the attempt's folder, by which its processes are found."""
BASES = ".bases"
"""Folder in the run folder with shipped bases in the form of transformers."""
ASK = """
from importlib.metadata import version
for name in ("accelerate", "peft", "torch", "transformers", "trl"):
    try: print(name, version(name))
    except ImportError: pass
"""


def train(trainer: "TorchTrainer", run: RunSpec, exec_: Exec, stop: StopFlag) -> Iterator[Event]:
    """Train a claimed run by its command, measure the result, and yield the event that ends it.

    Yields nothing if another process has claimed the run meanwhile.

    Raises:
        TrainingError: the command failed, hung, left no result, or not the one that was asked.
        Stopped: `stop` was set; the command has ended.
    """
    from lorasweep.launch.out_of_memory import free_memory
    from lorasweep.train import referee

    store = RunStore(exec_.runs_dir)
    n = store.last_attempt(run.id) or 0
    attempt = store.attempt(run.id, n)
    for k in range(1, n):
        _kill_marked(store.attempt(run.id, k))
    out, rows, log = attempt / "out", attempt / "rows", attempt / "trainer.log"
    out.mkdir()  # an error if it exists: it is never emptied
    base = trainer.base(run, exec_)
    write_rows(rows, run, trainer.data(run, exec_, base), base.tokenizer, exec_.data_dir)
    places = _places(run, exec_, out, rows)
    resume = _checkpoint(store, run.id, n)
    (out / "run.json").write_text(json.dumps({**places, "resume": str(resume or "")}, indent=1))
    words = _words(run, places, resume)
    store.log(run.id, n, f"command: {json.dumps([_without_secrets(word) for word in words])}")
    if detect.gpus():
        base = None
        trainer.release()  # the command needs the memory
        free_memory()
    started = time.monotonic()
    owned = _run(words, attempt, log, stop, started + 3600 * exec_.trainer_max_h, store, run.id, n)
    shutil.rmtree(rows, ignore_errors=True)  # ours; they take as much as the data, for each run
    if not owned:
        return
    wall_s, curve = time.monotonic() - started, referee.reported(out)
    base = base or trainer.base(run, exec_)
    weights = referee.read_weights(referee.find_output(out), run, base)
    data = trainer.data(run, exec_, base)
    event = referee.judge(run, base, data, weights, exec_.forward_parts, curve)
    store.record(run.id, *curve)
    _, result = event.ended[run.id]
    _refuse_same(store, run, result["weights_sha256"])
    versions = versions_of(words[0])
    result |= {"trainer_versions": versions, "step_s": wall_s / run.steps, "resumed": bool(resume)}
    yield event


def _places(run: RunSpec, exec_: Exec, out: Path, rows: Path) -> dict[str, Any]:
    """Return the values of the places, but {resume}; nothing of the test rows."""
    from lorasweep.models.load import transformers_folder

    method: Any = run.method
    cache_ = Path(exec_.runs_dir, BASES)
    cache_.mkdir(exist_ok=True)
    sets = method.target_layers() if method.name == "lora" else ()
    modules = [name for s in sets for name in run.model.modules(s)[0]]
    named = {k: getattr(run, k) for k in ("lr", "seed", "steps", "batch_size", "schedule")}
    named |= {k: getattr(run, k) for k in ("warmup_steps", "weight_decay", "precision", "eps")}
    alpha = getattr(method, "alpha", 0)
    return {
        **named,
        **{"beta1": run.beta1, "beta2": run.beta2, "clip_norm": run.clip_norm or 0},
        **{"method": method.name, "rank": getattr(method, "rank", 0)},
        "alpha": int(alpha) if alpha == int(alpha) else alpha,
        "layers": ",".join(modules),
        "modules": rf".*\b({'|'.join(modules)})" if modules else "",
        "max_length": run.dataset.max_length,
        "gpus": max(1, len(detect.devices())),
        "model": str(transformers_folder(run.model, exec_.models_dir, cache_)),
        "script": _files(run, exec_),
        **{"rows": str(rows), "out": str(out), "run": run.id, "form": run.trainer.rows},
    }


def _files(run: RunSpec, exec_: Exec) -> str:
    """Return the path of the script, if there is one; TrainingError: a file has changed."""
    for path, digest in zip(exec_.trainer_files, run.trainer.files, strict=True):
        if not os.path.isfile(path) or files.sha256(Path(path)) != digest:
            raise TrainingError(
                f"{path} has changed since the command was given. Restore it, or give the command "
                "again, which makes new runs."
            )
    return next(iter(exec_.trainer_files), "")


def _words(run: RunSpec, places: Mapping[str, Any], resume: Path | None) -> list[str]:
    """Return the words of the command with its places filled; each stays one word."""
    t = run.trainer
    words = [*t.command, *(t.lora if run.method.name == "lora" else t.full)]
    values = {**places, "resume": resume}
    words += t.resume if resume else ()
    return [PLACE.sub(lambda m: str(values.get(m[1], m[0])), word) for word in words]


def _checkpoint(store: RunStore, rid: str, n: int) -> Path | None:
    """Return the last checkpoint of the attempts before `n`, since the last one that failed."""
    from lorasweep.train.referee import checkpoints

    for k in range(n - 1, 0, -1):
        if (store.end(rid, k) or {}).get("state") == "failed":
            break
        if found := checkpoints(store.attempt(rid, k) / "out"):
            return found[0]
    return None


# ---------------------------------------------------------------- its life


def environment(attempt: Path) -> dict[str, str]:
    """Return this process's environment without what makes Python find our code first."""
    root = str(Path(__file__).resolve().parents[2])
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    first, *rest = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = os.pathsep.join(rest if first == root else [first, *rest])
    return {**env, **({"PYTHONPATH": path} if path else {}), MARK: str(attempt)}


def _run(
    words: list[str],
    attempt: Path,
    log: Path,
    stop: StopFlag,
    deadline: float,
    store: RunStore,
    rid: str,
    n: int,
) -> bool:
    """Run the command to its end; return whether this process still owns the run."""
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        try:
            process = subprocess.Popen(
                words,
                env=environment(attempt),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise TrainingError(
                f"{words[0]!r} cannot be started ({error.strerror}). Correct trainer.command; its "
                "first word is a program that is found from here."
            ) from None
    # if this process dies, its end of the pipe closes
    kill = ["sh", "-c", 'read x; kill -9 "-$0"', str(process.pid)]
    watcher = subprocess.Popen(kill, stdin=subprocess.PIPE, start_new_session=True)
    looked = time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(POLL_S)
            now = time.monotonic()
            if stop.set:
                raise Stopped
            if now > deadline:
                raise TrainingError(
                    "the trainer did not end in time (trainer.max_h), so it was stopped. "
                    + _tail(log)
                )
            if now - looked > LOOK_S:
                looked = now
                if store.last_attempt(rid) != n:
                    return False
    finally:
        _end(process)
        watcher.kill()
        watcher.wait()
        _kill_marked(attempt)
    if process.returncode:
        code = process.returncode
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        raise TrainingError(f"the trainer ended with {how}. {_tail(log)}")
    return store.last_attempt(rid) == n


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Stop a process group: SIGTERM, and SIGKILL to what is left of it."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _kill_marked(attempt: Path) -> None:
    """Kill the processes of an attempt on this machine, also those that left its group."""
    mark = f"{MARK}={attempt}".encode()
    for place in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in place.read_bytes().split(b"\0"):
                os.kill(int(place.parent.name), signal.SIGKILL)


def _tail(log: Path) -> str:
    """Return the last lines of a command's output, without values of secrets."""
    lines = log.read_text(errors="replace").splitlines()[-TAIL:]
    return "\n".join([f"The last lines of {log}:", *map(_without_secrets, lines)])


def _without_secrets(text: str) -> str:
    named = {v for k, v in os.environ.items() if any(part in k.upper() for part in SECRET)}
    for value in sorted(named, key=len, reverse=True):
        text = text.replace(value, "***") if len(value) > 3 else text
    return text


# ---------------------------------------------------------------- what is known of it


@cache
def versions_of(program: str) -> str:
    """Return the versions of the libraries of a program's Python; '' if it is no Python program."""
    path = shutil.which(program)
    if path is None:
        return ""
    with open(path, "rb") as file:
        first = file.readline(400).decode(errors="replace").strip()
    python = [path] if "python" in Path(path).name else first.removeprefix("#!").split()
    if "python" not in " ".join(python) or not (python == [path] or first.startswith("#!")):
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([*python, "-c", ASK], capture_output=True, text=True, timeout=120)
        return ", ".join(done.stdout.split("\n")[:-1])
    return ""


def _refuse_same(store: RunStore, run: RunSpec, sha256: str) -> None:
    """Raise TrainingError if another rate gave the same weights: the trainer ignores the rate."""
    for rid in store.existing() - {run.id}:
        other = store.result(rid) or {}
        if other.get("weights_sha256") == sha256 and store.spec(rid)["lr"] != run.lr:
            raise TrainingError(
                f"the trainer's weights are equal to those of run {rid}, at a learning rate of "
                f"{store.spec(rid)['lr']:g} instead of {run.lr:g}: it ignores the learning rate. "
                "See that it uses {lr}."
            )
