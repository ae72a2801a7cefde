"""README, docs/ and the guides: tables are those of the results, paths and commands exist, examples run."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from benchmarks import readme, tables
from shift.schedules.registry import SCHEDULES
from shift.tasks import TASKS
from shift_kernels import backends

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
FOLDERS = (".", "docs", "benchmarks/results", "benchmarks/*", "csrc/*", "shift_kernels/backends/*")
PAGES = sorted({page for folder in FOLDERS for page in ROOT.glob(f"{folder}/*.md")})
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
CODE = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def code(page, language):
    return [m["code"] for m in CODE.finditer(page.read_text()) if m["language"] == language]


def prose(page):
    return CODE.sub("", page.read_text())


def test_every_table_is_what_the_results_say(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().out + "run python -m benchmarks.readme"


def test_a_changed_number_is_found_and_mended(tmp_path, monkeypatch, capsys):
    right = (ROOT / "README.md").read_text()
    table = readme.MARKED.search(right)[0]
    page = tmp_path / "README.md"
    page.write_text(right.replace(table, table.translate(str.maketrans("0123456789", "1234567890"))))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert readme.main(["--check"]) == 1
    assert "README.md" in capsys.readouterr().out
    assert page.read_text() != right
    assert readme.main([]) == 0
    assert page.read_text() == right


def test_a_mark_that_names_no_table_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        readme.updated("<!-- table: nothing -->\n")


def test_every_table_is_used():
    marks = {name for page in readme.files() for name in re.findall(r"<!-- table: (\w+)", page.read_text())}
    assert marks == set(tables.TABLES)


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90


@each_page
def test_every_path_in_backticks_exists(page):
    """A path has a slash, or is a file at the top; what a run or a build makes is not here."""
    for path in re.findall(r"`([\w.-]+(?:/[\w.-]+)+/?|[A-Z]+\.\w+|[\w-]+\.py)`", prose(page)):
        folders = (ROOT, page.parent)
        assert path.startswith(("runs/", "build/", ".venv/")) or any((f / path).exists() for f in folders), (
            path
        )


@each_page
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", t).strip().lower().replace(" ", "-") for t in titles]


@each_page
def test_every_command_exists(page):
    text = page.read_text()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE):
        assert target in targets, target
    for script in re.findall(r"(?:^|`|/)(shift-[a-z]+)(?= |`)", text, re.MULTILINE):
        assert script in PROJECT["scripts"] or script == PROJECT["name"], script
    for module in re.findall(
        r"(?:python|torchrun[^\n]*) -m ((?:shift|shift_kernels|benchmarks)[\w.]*)", text
    ):
        assert importlib.util.find_spec(module) is not None, module
    for extras in re.findall(r"\[([a-z,]+)\]\"", text):
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"]), extras


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("README.md", backends()),
        ("docs/kernels.md", backends()),
        ("docs/schedules.md", SCHEDULES),
        ("docs/training.md", TASKS),
    ],
    ids=["backends", "backends and their limits", "schedules", "tasks"],
)
def test_a_page_that_lists_a_registry_lists_all_of_it(page, names):
    assert [name for name in names if f"`{name}`" not in (ROOT / page).read_text()] == []


@pytest.mark.filterwarnings("default::shift_kernels.BackendFallbackWarning")  # without a compiler
@each_page
def test_python_examples_run(page, capsys):
    for source in code(page, "python"):
        exec(compile(source, page.name, "exec"), {})


def test_versions_that_failed_a_test_are_not_in_the_sentence_of_versions(monkeypatch):
    rows = [dict(python=f"3.1{n}", torch="2.13.0+cpu", passed=1234, failed=n) for n in (0, 1)]
    monkeypatch.setattr(tables, "read", {"matrix": rows}.__getitem__)
    assert tables.matrix() == "Passed (`make matrix`): Python 3.10 with torch 2.13.0 (1,234 tests)."
