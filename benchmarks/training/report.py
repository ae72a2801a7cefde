"""What the two benchmarks of training write: where it ran, and files."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import torch

from shift.run.files import replace_atomically
from shift.run.summary import environment


def heading(command: str, settings: dict[str, Any]) -> str:
    """Command, commit, date, machine, versions and settings, as a line of Markdown and an empty one."""
    facts = environment(torch.device("cpu"))
    machine, versions = facts["machine"], facts["versions"]
    said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())
    return (
        f"`{command}`, commit {(facts['commit'] or 'unknown')[:7]}, {datetime.date.today()}, "
        f"{machine['device']} ({machine['cores']} cores, {torch.backends.cpu.get_cpu_capability()}), "
        f"torch {versions['torch']}, Python {versions['python']}; {said}.\n\n"
    )


def write(path: Path, text: str, data: dict[str, Any]) -> None:
    """``path``.md and ``path``.json; the latter with where it ran."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path.with_suffix(".md"), text.encode())
    data = environment(torch.device("cpu")) | data
    replace_atomically(path.with_suffix(".json"), (json.dumps(data, indent=1) + "\n").encode())
