"""A study's report: every number that it must give, one page that loads nothing, and the same as Markdown."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean
from xml.etree import ElementTree as ET

import pytest
from scipy import stats

from cola_core.errors import UserError
from cola_core.study.compare import scores
from cola_core.study.design import Cell
from cola_core.study.report.blocks import Block, Details, Drawing, Heading, Table, Text, write_html, write_markdown
from cola_core.study.report.findings import Findings
from cola_core.study.report.page import report
from cola_core.study.results import Result, read_packed, read_results, result_file, write_packed
from tests.studies import design, result, results

SAID = "## What it shows\n\nLittle, and `gora` **most**.\n\n- one thing\n- another"


@cache
def blocks() -> tuple[Block, ...]:
    made = design(families={"lora": {1: "lora", 2: "wide"}})
    return tuple(report(Findings(made, results(made, {"gora": 0.02}), {}), SAID))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    found = blocks()
    write_html(tmp_path / "index.html", "A title <with> marks", found)
    write_markdown(tmp_path / "README.md", found)
    return tmp_path


def test_what_was_expected_and_what_can_be_seen_stand_before_what_was_seen() -> None:
    order = [block.text for block in blocks() if isinstance(block, Heading)]
    places = [order.index(t) for t in ("What it shows", "What was expected", "What can be seen", "Test accuracy")]
    assert places == sorted(places)
    seen = next(b.text for b in blocks() if isinstance(b, Text) and "smallest detectable" in b.text)
    assert re.search(r"5 blocks .* each of 1 recipes .*\*\*[\d.]+ points\*\*", seen)


def test_the_headline_gives_means_intervals_differences_and_verdicts() -> None:
    table = next(b for b in blocks() if isinstance(b, Table) and "verdict" in b.head and "one" in b.head)
    rows = {row[0]: row for row in table.rows}
    assert rows["gora (1.15 x tokens)"][-1] == "better"
    assert rows["wide (2.00 x parameters)"][-1] == "control"
    assert re.fullmatch(r"\d\d\.\d \[\d\d\.\d, \d\d\.\d\]", rows["lora"][1])
    assert rows["lora"][-1] == "", "the baseline is not compared with itself"


def test_the_page_loads_nothing_and_says_what_markdown_says(written: Path) -> None:
    page, text = ((written / name).read_text() for name in ("index.html", "README.md"))
    assert not re.search(r"<(script|link|img|iframe)|url\((?!#)|@import", page)
    assert "<title>A title &lt;with&gt; marks</title>" in page
    for block in blocks():
        words = block.text.split("\n")[0] if isinstance(block, Heading | Text) else ""
        plain = re.sub(r"[`*]|^- |\[([^\]]+)\]\([^)]+\)", r"\1", words)
        assert plain in re.sub(r"[`*]|\[([^\]]+)\]\([^)]+\)", r"\1", text)
        assert plain in re.sub(r"<[^>]+>", "", page).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    for table in (b.table if isinstance(b, Details) else b for b in blocks() if isinstance(b, Table | Details)):
        for row in table.rows:
            assert "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" in text


def test_every_figure_is_drawn_and_named_once(written: Path) -> None:
    drawings = [block for block in blocks() if isinstance(block, Drawing)]
    assert [d.name for d in drawings] == ["forest", "along", "rates", "losses", "ranks"]
    for drawing in drawings:
        ET.fromstring((written / "figures" / f"{drawing.name}.svg").read_text())


def test_the_same_results_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    write_html(again / "index.html", "A title <with> marks", blocks.__wrapped__())
    assert (again / "index.html").read_bytes() == (written / "index.html").read_bytes()


def test_before_any_cell_was_scored_there_is_a_report_of_the_sweep() -> None:
    made = design()
    swept = [r for r in results(made, {}) if r.cell.phase == "sweep"]
    told = [block.text for block in report(Findings(made, swept, {}), "") if isinstance(block, Heading)]
    assert "Learning rates" in told
    assert "Test accuracy" not in told and "What can be seen" in told


def test_a_study_without_fresh_seeds_looks_at_validation_data_alone() -> None:
    made = design(seeds=[])
    told = list(report(Findings(made, results(made, {}), {}), ""))
    assert "What can be seen" not in [block.text for block in told if isinstance(block, Heading)]
    assert any("no test row is scored" in block.text for block in told if isinstance(block, Text))


def test_the_best_validation_loss_stands_beside_the_baselines() -> None:
    made = design(tasks={"one": {"set": []}, "two": {"set": []}, "aside": {"set": [], "headline": False}})
    found = results(made, {})
    for one in found:
        if one.cell.group.recipe == "gora" and one.cell.group.task != "one":
            one.content["validation_loss"] -= 0.25  # type: ignore[index]
    told = list(report(Findings(made, found, {}), ""))
    (table,) = (b for b in told if isinstance(b, Table) and "tuned" in b.head)
    assert {row[0]: row[3] for row in table.rows} == {"lora": "", "gora": "-0.1250", "wide": "+0.0000"}
    (each,) = (b for b in told if isinstance(b, Table) and b.rows[0][1:2] == ["0.500 at 0.001"])
    assert each.rows[1] == ["gora", "0.500 at 0.001", *["0.250 at 0.001"] * 2]


def test_a_study_without_a_default_rate_says_nothing_of_untuned_recipes() -> None:
    made = design(sweep={"learning_rates": [1e-4, 1e-3, 1e-2], "seeds": [100]})
    told = list(report(Findings(made, results(made, {}), {}), ""))
    (table,) = (b for b in told if isinstance(b, Table) and "tuned" in b.head)
    assert "untuned" not in table.head and {len(row) for row in table.rows} == {len(table.head)}
    assert not any("untuned" in b.text for b in told if isinstance(b, Text))


def test_tasks_where_nothing_is_learnt_are_told_and_left_out_beside() -> None:
    made = design(tasks={"one": {"set": []}, "two": {"set": []}})
    found = results(made, {"gora": 0.02})
    for one in found:
        one.content["majority"] = {"accuracy": 0.9 if one.cell.group.task == "two" else 0.3}  # type: ignore[index]
    findings = Findings(made, found, {})
    told = list(report(findings, ""))
    assert findings.learnt == [("tiny", "one")]
    assert any("noise: one; not learnt: two (" in b.text for b in told if isinstance(b, Text))
    (headline,) = (b for b in told if isinstance(b, Table) and "mean" in b.head)
    assert headline.rows[:2] == [
        ["base model, fitted head", "40.0", "40.0", "", "", "", ""],
        ["majority class", "30.0", "90.0", "", "", "", ""],
    ]
    (table,) = (b for b in told if isinstance(b, Table) and "over task means" in b.head)
    by, gora = scores(made, found, "accuracy"), next(row for row in table.rows if row[0] == "gora")
    differences = {block: 100 * (score - by["lora"][block]) for block, score in by["gora"].items()}
    one, two = ([d for (_, task, _), d in sorted(differences.items()) if task == name] for name in ("one", "two"))
    for column, values in ((1, one + two), (2, one), (4, [fmean(one), fmean(two)])):
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert gora[column] == f"{fmean(values):+.2f} [{low:+.2f}, {high:+.2f}]"


def test_a_report_of_cells_without_a_score_or_calibration_is_written() -> None:
    made = design()
    found = results(made, {})
    for one in found:
        one.content.get("metrics", {}).pop("calibration_error", None)
    table = next(
        b for b in report(Findings(made, found, {}), "") if isinstance(b, Table) and "calibration error" in b.head
    )
    assert {row[5] for row in table.rows} == {""}
    failed = [
        Result(r.cell, {**r.content, "failed": "diverged", "metrics": {}})
        if r.cell.phase == "test" and r.cell.group.task == "one"
        else r
        for r in results(made, {})
    ]
    assert list(report(Findings(made, failed, {}), ""))
    with pytest.raises(UserError, match="none counts in the mean"):
        design(tasks={"one": {"set": [], "headline": False}})


def test_along_a_count_the_differences_are_those_of_blocks() -> None:
    """What all recipes share on a seed is much wider than what they differ by."""
    table = next(b for b in blocks() if isinstance(b, Table) and b.head[:1] == ["family"])
    found = scores(made := design(), results(made, {"gora": 0.02}), "accuracy")
    mine, theirs = ([score for _, score in sorted(found[recipe].items())] for recipe in ("wide", "lora"))
    low, high = stats.ttest_rel(mine, theirs).confidence_interval(0.95)
    row = next(row for row in table.rows if row[1] == "2")
    assert row[-1].endswith(f"[{low:+.4f}, {high:+.4f}]")


def test_several_models_stand_side_by_side_even_where_their_modules_differ() -> None:
    made = design(models={"tiny": {"set": []}, "small": {"set": []}}, tasks={"one": {"set": []}})
    found = results(made, {"gora": 0.02})
    for one in found:
        if one.cell.group.model == "small":
            for link in one.content["links"]:
                link["ranks"] = {f"other.{name}": rank for name, rank in link["ranks"].items()}
    told = list(report(Findings(made, found, {}), ""))
    (table,) = (b for b in told if isinstance(b, Table) and "mean" in b.head)
    assert table.head[1:3] == ["tiny one", "small one"]
    assert any(isinstance(block, Drawing) and block.name == "ranks" for block in told)
    assert "10 blocks" in next(b.text for b in told if isinstance(b, Text) and "smallest detectable" in b.text)


def test_a_task_with_more_seeds_than_others_weighs_no_more_in_the_mean() -> None:
    made = design(tasks={"one": {"set": []}, "two": {"set": []}}, recipes={"lora": {"set": []}})
    group, other = made.groups()
    found = [result(Cell("test", group, 1e-3, seed), 0.9) for seed in range(3)]
    found.append(result(Cell("test", other, 1e-3, 0), 0.5, loss=0.1))
    told = [b for b in report(Findings(made, found, {}), "") if isinstance(b, Table)]
    assert next(b.rows[-1][3] for b in told if "mean" in b.head) == "70.00"
    assert next(b.rows[-1][1] for b in told if "test loss" in b.head) == "0.3000"


def test_what_makes_a_row_no_equal_one_is_told_beside_it() -> None:
    made = design(
        tasks={"one": {"set": []}, "two": {"set": []}},
        recipes={
            "lora": {"set": []},
            "part": {"set": [], "tasks": ["one"]},
            "low": {"set": [], "learning_rates": [1.0]},
        },
        sweep={"learning_rates": [1e-4, 1e-3, 1e-2], "seeds": [100], "extend": 0},
    )
    found = results(made, {})
    found[0] = replace(found[0], content={**found[0].content, "code": "another"})
    told = list(report(Findings(made, found, {}), ""))
    (table,) = (b for b in told if isinstance(b, Table) and "mean" in b.head)
    rows = {row[0].split()[0]: row for row in table.rows}
    assert rows["part"][table.head.index("mean")] == "", "a mean over other tasks is no equal of the others"
    assert rows["low"][0] == "low (rate at the end of all tried: one two)"
    assert any("1 by code another" in block.text for block in told if isinstance(block, Text))


def test_results_come_back_as_they_were_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    made = design()
    for one in results(made, {}):
        cell, group = one.cell, one.cell.group
        told = {**vars(group), "phase": cell.phase, "learning_rate": cell.learning_rate, "seed": cell.seed}
        write_packed(result_file(tmp_path, cell, "key"), {**one.content, "cell": told})
    found = {r.cell: r for r in read_results(tmp_path)}
    for one in results(made, {}):
        assert found[one.cell].validation_loss == one.validation_loss
        assert found[one.cell].metrics == one.metrics
    path = next((tmp_path / "cells").iterdir())
    before = path.read_bytes()
    write_packed(path, read_packed(path))
    assert path.read_bytes() == before, "the same content gives the same bytes"
    path.write_bytes(before[:-9])
    with pytest.raises(UserError, match=r"no result of a cell .* delete it, and the cell runs again"):
        list(read_results(tmp_path))
