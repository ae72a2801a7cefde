"""The report says what the data say: the verdict in words, the tables, and files that stand alone."""

from __future__ import annotations

import re
import struct
import sys
import warnings
from pathlib import Path

import pytest
from synthetic_runs import collected, reaches, switches, write_arm

from shift.comparison.figures import criterion_figure
from shift.comparison.report import write_report
from shift.comparison.verdict import caveat, verdict
from shift.report.style import save_figures
from shift.report.words import duration, each, flops, percent

NEVER = 1000


def always(n_loops: int):
    return lambda step: n_loops


def results_of(out: Path, looped: list[int], shift: list[int], **others: list[int]) -> dict:
    """Results in which an arm reaches the target at these steps, one for each seed.

    SHIFT loops from step 30 on, so that step s costs 30 + 4 (s - 30), and Looped's step s costs 4 s.
    """
    write_arm(out, "looped", {i: reaches(s) for i, s in enumerate(looped)}, always(4))
    write_arm(out, "shift", {i: reaches(s) for i, s in enumerate(shift)}, switches(30), looks=True)
    for name, steps in others.items():
        n_loops = 1 if name == "single" else 2
        write_arm(out, name, {i: reaches(s) for i, s in enumerate(steps)}, always(n_loops))
    return collected(out, ["looped", "shift", *others], list(range(len(looped))))


@pytest.mark.parametrize(
    ("looped", "shift", "says"),
    [
        # 4 * 50 = 200 against 30 + 4 * 20 = 110
        ([50, 50, 50], [50, 50, 50], "SHIFT saved 45% of the compute to the target of 99%: it needed 0.55"),
        # 110 / 200 and 230 / 200
        ([50, 50], [50, 80], "But the seeds disagree"),
        ([50, 50], [80, 80], "SHIFT did not save: to the target of 99% it needed 1.15 times"),
        # 190 / 200
        ([50, 50], [70, 70], "which is as good as even"),
        ([50, 50, 50], [50, 50, NEVER], "SHIFT did not save reliably: on 1 of 3 seeds it never reached"),
        ([50, NEVER], [50, 50], "SHIFT saved 45% of the compute to the target of 99% on 1 of 2 seeds"),
        ([NEVER, NEVER], [50, 50], "Looped on none of them, so a saving has no number"),
        ([NEVER, NEVER], [NEVER, NEVER], "Neither SHIFT nor Looped reached the target of 99% on any seed"),
    ],
)
def test_the_verdict_follows_the_data(tmp_path, looped, shift, says):
    assert says in verdict(results_of(tmp_path, looped, shift))[0]


def test_the_verdict_never_claims_a_saving_where_a_seed_failed(tmp_path):
    first = verdict(results_of(tmp_path, [50, 50, 50], [50, 50, NEVER]))[0]
    assert "saved" not in first
    assert "seed 2: ended at 60.0%" in first
    assert "On the other 2 it needed 0.55" in first


def test_a_cheaper_arm_is_named(tmp_path):
    sentences = verdict(results_of(tmp_path, [50, 50], [50, 50], ramp=[40, 40]))
    assert "Cheaper than SHIFT to the same target on all seeds: Linear ramp (0.40 times Looped)." in sentences


def test_an_arm_that_fails_on_a_seed_is_not_called_cheaper(tmp_path):
    text = " ".join(verdict(results_of(tmp_path, [50, 50], [50, 50], ramp=[40, NEVER])))
    assert "Cheaper" not in text


def test_loops_are_called_needless_where_single_reaches_the_target(tmp_path):
    text = " ".join(verdict(results_of(tmp_path, [50], [50], single=[60])))
    assert "this task needs no loops" in text


def test_no_saving_is_claimed_without_looped(tmp_path):
    write_arm(tmp_path, "shift", {0: reaches(50)}, switches(30))
    assert verdict(collected(tmp_path, ["shift"], [0])) == [
        "SHIFT and Looped were not both run, so this comparison says nothing about savings."
    ]


def test_few_seeds_are_called_few(tmp_path):
    assert "3 seeds prove little" in str(caveat(results_of(tmp_path, [50] * 3, [50] * 3)))
    assert caveat({"seeds": list(range(10))}) is None


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("comparison")
    results = results_of(out, [50, 50], [50, NEVER], single=[NEVER, NEVER], ramp=[40, 40])
    results["plan"]["command"] = "shift-compare --task '<b>'"
    write_report(results, out)
    return out


def test_the_html_file_needs_no_other(written):
    page = (written / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "<script" not in page
    assert "@import" not in page
    assert "url(" not in page


def test_text_is_escaped_in_the_html_file(written):
    page = (written / "report.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


@pytest.mark.parametrize(
    "text",
    [
        "SHIFT did not save reliably",
        "2 seeds prove little",
        "Looped, stopped at SHIFT's compute",
        "never",
        "Every arm starts from the same initial weights",
        "0123456789abcdef",
        "Linear ramp",
    ],
)
def test_both_reports_hold_what_a_reader_needs(written, text):
    assert text in (written / "report.md").read_text()
    assert text in (written / "report.html").read_text()


def test_the_markdown_shows_pictures_that_exist(written):
    pictures = re.findall(r"\]\((figures/\w+\.png)\)", (written / "report.md").read_text())
    assert len(pictures) == 4
    for picture in pictures:
        width = struct.unpack(">I", (written / picture).read_bytes()[16:20])[0]
        assert width == 1600  # sharp at 800 pixels


def test_markdown_tables_are_rectangular(written):
    text = (written / "report.md").read_text()
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_without_matplotlib_the_report_says_so(tmp_path, monkeypatch):
    results = results_of(tmp_path, [50], [50])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    _, page = write_report(results, tmp_path)
    assert "matplotlib is not installed" in page.read_text()


def test_many_seeds_are_shown_by_their_range():
    assert each(["9.5", "10.0", "9.0"]) == "9.5, 10.0, 9.0"
    assert each(["9.5", "10.0", "9.0", "9.9", "9.8", "9.7"]) == "9.0 to 10.0"
    assert each([134] * 6) == "134"


def test_numbers_are_not_prettied_up():
    assert percent(0.99996) == "99.9%"
    assert percent(1.0) == "100.0%"
    assert (flops(1.234e12), duration(75)) == ("1.23\u00a0TFLOP", "1\u00a0min 15\u00a0s")


def test_the_looks_of_every_criterion_are_drawn(tmp_path):
    write_arm(tmp_path, "climb", {0: reaches(50)}, switches(40), looks=True)
    results = collected(tmp_path, ["climb"], [0])
    assert results["arms"]["climb"]["criterion"]["enough"] == 0.5  # climb's own default
    looks = results["arms"]["climb"]["seeds"][0]["looks"]
    assert [(look["step"], look["fired"]) for look in looks] == [(20, False), (40, True)]
    figure = criterion_figure(results)
    assert len(figure.axes) == 2
    assert all(len(axes.lines) == 3 for axes in figure.axes)  # the limit, the seed, its ring


def test_there_is_room_for_many_arms_with_a_criterion(tmp_path):
    names = ["shift", "shift@scaled", "climb", "climb@scaled", "ladder"]
    for name in names:
        write_arm(tmp_path, name, {0: reaches(50)}, switches(40), looks=True)
    results = collected(tmp_path, names, [0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the layout warns where panels would collapse
        assert save_figures({"criterion": lambda: criterion_figure(results)}, tmp_path)


@pytest.mark.parametrize("text", ["$\\bad{$", "a\nb", "<b>|`*_[x](y)", "\ud800\u202e", "#"])
def test_names_out_of_a_file_may_hold_anything(tmp_path, text):
    results = results_of(tmp_path, [50], [50], climb=[50])
    results["task"]["name"] = results["commit"] = results["plan"]["command"] = text
    for arm in results["arms"].values():
        arm["label"] = text
        arm["seeds"][0]["failure"] = text
        arm["seeds"][0]["final_groups"] = {text: 0.5}
    results["fairness"][0]["detail"] = text
    report, page = write_report(results, tmp_path)
    assert "\n# " not in report.read_text()
    assert "<b>" not in page.read_text()
    assert not re.search(r"(?<!\\)\]\(y\)", re.sub(r"(`+).*?\1", "", report.read_text()))
