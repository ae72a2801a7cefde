"""Every example runs as it stands, and says what it promises."""

import re
import runpy
from pathlib import Path

import pytest

from shift.tasks import TASKS

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
SAYS = {
    "own_model": r"differ by \d\.\de-0[5-9]\n(.*\n)+after 150 steps: ([7-9]\d|100)% right",
    "compare_runs": r"looped: 60% right after [\d.]+ GFLOP; .*\nswitch at a quarter: 60% right",
    "own_training_loop": r"step \d+: from here on 4 loops\nafter 150 steps: [3-9]\d% right",
    "own_task": r"switch at step 50; ([6-9]\d|100)% of the letters right",
}
"""What it prints, where that is more than that it ends."""


@pytest.fixture
def tasks_as_they_were():
    before = dict(TASKS)
    yield
    TASKS.clear()
    TASKS.update(before)


@pytest.mark.filterwarnings("default::shift_kernels.BackendFallbackWarning")  # without a compiler
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(path, tmp_path, monkeypatch, capsys, tasks_as_they_were):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    said = capsys.readouterr().out
    assert re.search(SAYS.get(path.stem, r"\S"), said), said
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"


def test_what_an_example_says_belongs_to_an_example():
    assert set(SAYS) <= {path.stem for path in EXAMPLES}
