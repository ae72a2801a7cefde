"""Every example runs as it stands, and says what it promises."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from shift import data, generate, train
from shift import eval as evaluation
from shift.tasks import TASKS

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
SAYS = {
    "own_model": r"differ by \d\.\de-0[5-9]\n(.*\n)+after 150 steps: ([7-9]\d|100)% right",
    "compare_runs": r"looped: 60% right after [\d.]+ GFLOP; .*\nswitch at a quarter: 60% right",
    "own_training_loop": r"step \d+: from here on 4 loops\nafter 150 steps: [3-9]\d% right",
    "trm": r"\n".join(
        rf"{model}, .*\n.*: relative difference \d\.\de-0[7-9]; .*\n.*of grids never seen: [7-9]\d%.*"
        for model in ("HRM", "TRM")
    ),
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


def test_the_four_commands_of_the_language_model_run_in_miniature(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tokenizers")
    folder = Path(__file__).parents[2] / "examples" / "lm"
    block = re.search(r"```bash\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    commands = [line for line in block.splitlines() if line.startswith("shift-")]
    assert [line.split()[0] for line in commands] == [
        "shift-data",
        "shift-train",
        "shift-eval",
        "shift-generate",
    ]
    (tmp_path / "examples").symlink_to(folder.parent)
    monkeypatch.chdir(tmp_path)
    tiny = "--steps 4 --batch-size 2 --eval-samples 2 --task.options seq_len=16 --model.d-model 16"
    small = {
        "shift-data": "--vocab-size 300 --validation 0.4",
        "shift-train": tiny,
        "shift-eval": "--samples 2",
        "shift-generate": "--max-new-tokens 5",
    }
    main = {"shift-data": data, "shift-train": train, "shift-eval": evaluation, "shift-generate": generate}
    for line in commands:
        line = re.sub(r"\$LIB/asyncio .*\$LIB/xml", str(folder.parents[1] / "shift" / "schedules"), line)
        name, *words = shlex.split(line)
        assert main[name].main([*words, *small[name].split()]) == 0, capsys.readouterr()
    assert capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "runs/lm-eval/eval.md").is_file()
