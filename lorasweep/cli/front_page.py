"""The page that `python -m lorasweep` prints without arguments."""

import textwrap
from pathlib import Path

FRONT_PAGE = """\
lorasweep: when does LoRA match full fine-tuning, and with which learning rate?

Ask a question (a sweep):
  python -m lorasweep +sweep=lr_ratio action=plan     what would run and what it costs
  python -m lorasweep +sweep=lr_ratio                 run what is missing, print the answer
  python -m lorasweep +sweep=lr_ratio action=status   what is done, running, failed
Choose its size with scale=smoke, tiny (the default), small, ...; on a Slurm cluster add
cluster=slurm. Running a command again is safe: finished runs are not repeated.

Train one run:
  python -m lorasweep model=tiny128 dataset=dialect method=lora method.rank=16 lr=2e-3

Judge runs of your own, or all kept answers:
  python -m analysis --help

{sweeps}
All actions, settings and groups: python -m lorasweep --help
"""


def front_page(conf: Path) -> str:
    """Return the page; `conf` is the configuration folder."""
    names = sorted(p.stem for p in (conf / "sweep").glob("*.yaml"))
    sweeps = textwrap.fill(f"Sweeps: {', '.join(names)}.", 90, subsequent_indent="  ")
    return FRONT_PAGE.format(sweeps=sweeps)
