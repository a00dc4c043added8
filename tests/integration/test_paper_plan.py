"""The README's table of what the study takes is the one that its command prints."""

import re

import pytest

from tests.world import ROOT


@pytest.mark.slow
def test_the_readmes_plan_is_what_its_command_prints(command):
    text = (ROOT / "README.md").read_text()
    shown = re.search(r"<!-- plan: .*?```text\n(.*?)```", text, re.DOTALL)
    study = ("+sweep=study", "scale=paper", "action=plan", "hardware=h100")
    assert shown and shown[1] in command(*study).stdout
