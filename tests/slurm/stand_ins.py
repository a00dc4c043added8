"""Stand-ins for apptainer, and for srun with pyxis: they check their options and hide Slurm.

A process inside finds `env` and `python3` on its PATH, and nothing else. As the real program does,
`apptainer` stays as the parent, passes signals on, and ends as its child does.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

NOTES = "inside.jsonl"
"""File beside the stand-ins: the mounts and the command of each process started inside."""


def install(folder: Path) -> str:
    """Write the stand-ins into `folder`; return the line of cluster.setup that puts them first."""
    private = folder / "private"
    private.mkdir(parents=True)
    scripts = {private / "python3": f'exec {sys.executable} "$@"'}
    scripts[private / "env"] = f'exec {shutil.which("env")} "$@"'
    for name in ("apptainer", "srun"):
        scripts[folder / name] = f'exec {sys.executable} {__file__} {name} {folder} "$@"'
    for path, line in scripts.items():
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
    return f"export LORASWEEP_REAL_SRUN=$(command -v srun) PATH={folder}:$PATH"


def note(folder: Path, mounts: str, where: str, command: list[str]) -> None:
    """Check the mounts as the real programs do, and write them down."""
    missing = [m for m in mounts.split(",") if not Path(m.partition(":")[0]).exists()]
    if missing or not Path(where).is_dir():
        sys.exit(f"cannot mount {missing}, or enter {where}")
    with open(folder / NOTES, "a", encoding="utf-8") as file:
        file.write(json.dumps({"mounts": mounts.split(","), "command": command}) + "\n")


def apptainer(folder: Path, words: list[str]) -> None:
    """Run `apptainer exec --nv --bind MOUNTS --pwd FOLDER IMAGE COMMAND`."""
    *options, mounts, pwd, where, image = words[:7]
    assert [*options, pwd] == ["exec", "--nv", "--bind", "--pwd"], words
    assert Path(image).is_file(), image
    note(folder, mounts, where, words[7:])
    private = {"PATH": str(folder / "private"), "APPTAINER_CONTAINER": image}
    os.environ.update(private)
    child = subprocess.Popen(words[7:])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(number, lambda number, frame: child.send_signal(number))
    code = child.wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def srun(folder: Path, words: list[str]) -> None:
    """Run the real srun; with --container-image, its command finds no Slurm."""
    ours = [w for w in words if w.startswith(("--container-", "--no-container-"))]
    rest = [w for w in words if w not in ours]
    if ours:
        given = dict(w.partition("=")[::2] for w in ours)
        assert given.keys() == {
            *("--container-image", "--container-mounts", "--container-workdir"),
            "--no-container-entrypoint",
        }, ours
        k = rest.index("env")
        note(folder, given["--container-mounts"], given["--container-workdir"], rest[k:])
        rest[k:k] = ["env", f"PATH={folder / 'private'}"]
    real = os.environ["LORASWEEP_REAL_SRUN"]
    os.execv(real, [real, *rest])


if __name__ == "__main__":
    {"apptainer": apptainer, "srun": srun}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:])
