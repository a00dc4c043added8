"""The pages that `python -m lorasweep` and `python -m lorasweep --help` print."""

import textwrap
from pathlib import Path

from lorasweep.cli.actions import ACTIONS

START = """\
lorasweep: when does LoRA match full fine-tuning, and with which learning rate?

Ask a question (a sweep), or train one run:
  python -m lorasweep +sweep=lr_ratio action=plan     show what would run and what it costs
  python -m lorasweep +sweep=lr_ratio                 run what is missing, print the answer
  python -m lorasweep +sweep=lr_ratio action=status   show what is done, running, failed
  python -m lorasweep model=tiny128 dataset=dialect method=lora method.rank=16 lr=2e-3
  python -m lorasweep model=./my-model dataset=rows.csv method.rank=16 lr=2e-4 steps=100
Choose the size of a sweep with scale=smoke, tiny (the default), small, ...
Running a command again is safe: finished runs are not repeated, interrupted runs resume.
"""
FRONT_END = """\
Judge runs of your own, or all kept answers: python -m analysis --help
All settings and groups: python -m lorasweep --help
"""
MORE = """\
More commands
  python -m lorasweep +sweep=lr_ratio scale=small    the same question on SmolLM2-135M and GSM8K
  python -m lorasweep +sweep=study                   all questions, one after another
  python -m analysis lr_ratio                        render the report again
On a Slurm cluster (docs/clusters.md) a command submits what is missing and returns; the same
command prints the answer later:
  python -m lorasweep +sweep=lr_ratio cluster=slurm cluster.partition=gpu cluster.gpus=1
  python -m lorasweep +sweep=lr_ratio action=status watch=true
  python -m lorasweep +sweep=lr_ratio action=cancel
"""
SETTINGS = """\
Settings
  format=json                               one JSON object on stdout
  exec.runs_dir=DIR (or LORASWEEP_RUNS)     exec.models_dir=[DIR] (LORASWEEP_MODELS)
  exec.data_dir=[DIR] (LORASWEEP_DATA)      exec.reports_dir=DIR (LORASWEEP_REPORTS)
  exec.workers=N exec.threads=N exec.pack_size=N exec.micro_batch_size=N
  exec.checkpoint_s=60 exec.retry=true exec.compile=true     mirror=wandb
  exec.world_size=4 exec.activation_checkpointing=true       a run on four GPUs
Changing a sweep's grid
  sweep.arms.lora.rank=[1,16]   +sweep.axes.batch_size=[4,8]   ~sweep.arms.fullft
  'sweep.arms.lora.lr=${geom:1e-4,1e-2,4}'  4 learning rates per decade
  'sweep.arms.lora.lr=${around:1e-3,7,2}'   7 learning rates around 1e-3, a factor of 2 apart
Your own model and rows
  model=FOLDER, FILE.gguf or owner/name@revision
  dataset=FILE (.jsonl, .json, .csv, .parquet), FOLDER or owner/name:configuration@revision
  Sweeps, and what is not read from these: files in DIR/sweep, DIR/model, DIR/dataset with
  python -m lorasweep --config-dir DIR +sweep=mine model=mine
"""


def front_page(conf: Path) -> str:
    """Return the page shown without arguments; `conf`: the configuration folder."""
    names = sorted(p.stem for p in (conf / "sweep").glob("*.yaml"))
    sweeps = textwrap.fill(f"Sweeps: {', '.join(names)}.", 90, subsequent_indent="  ")
    actions = textwrap.fill(f"Actions: {', '.join(ACTIONS)}.", 90, subsequent_indent="  ")
    return "\n".join([START, sweeps, actions, FRONT_END])


def help_template() -> str:
    """Return the page of --help; Hydra fills in the groups and their options."""
    lines = ["Actions (action=NAME)"]
    for name, action in ACTIONS.items():
        head = f"  {f'{name} {action.example}'.strip():24} "
        lines += textwrap.wrap(
            head + action.help, 118, subsequent_indent=" " * len(head), drop_whitespace=True
        )
    text = "\n".join([START, MORE, *lines, SETTINGS]).replace("$", "$$")
    groups = "Groups (group=option)\n$APP_CONFIG_GROUPS"
    return f"{text}\n{groups}\nShow the composed configuration: add --cfg job\n"
