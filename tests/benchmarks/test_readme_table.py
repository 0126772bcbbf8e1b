"""benchmarks/readme_table.py: README says what the results say, and how figures are found and written."""

import json
from pathlib import Path

import pytest

from benchmarks import readme_table
from benchmarks.readme_table import Row


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A README with an empty table, and one result."""
    result = {
        "seconds": 1234.56,
        "share": 0.901,
        "nothing": None,
        "results": [{"name": "ours", "ms": 2.5}, {"name": "peer", "ms": 4.0}, {"name": "peer", "ms": 5.0}],
        "cases": [{"case": "a B=1", "kind": "forward", "us": 7}],
    }
    (tmp_path / "one.json").write_text(json.dumps(result))
    (tmp_path / "README.md").write_text(f"Above\n{readme_table.BEGIN}\nold\n{readme_table.END}\nBelow\n")
    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    monkeypatch.setattr(readme_table, "README", tmp_path / "README.md")
    monkeypatch.setattr(readme_table, "ROWS", (Row("a thing", "{results.ours.ms:.1f} ms", "", "one.json"),))
    return tmp_path


def test_readme_says_what_the_results_say():
    assert readme_table.main(check=True) == 0


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{seconds:,.0f} s", "1,235 s"),
        ("{share*100:.0f} % of {seconds/1e3:.2f}", "90 % of 1.23"),
        ("{results.0.ms} and {results.2.ms:.0f}", "2.5 and 5"),
        ("{results.ours.ms:.2f}", "2.50"),
        ("{cases.a B=1, forward.us} us", "7 us"),
    ],
)
def test_figures_are_found_by_number_name_and_case(project, template, text):
    assert readme_table.filled(template, "one.json") == text


@pytest.mark.parametrize(
    ("template", "file", "said"),
    [
        ("{results.theirs.ms}", "one.json", "results.theirs.ms in one.json: no 'theirs' there"),
        ("{results.peer.ms}", "one.json", "more than one 'peer' there"),
        ("{results.7.ms}", "one.json", "no '7' there"),
        ("{seconds.ms}", "one.json", "no 'ms' there"),
        ("{results}", "one.json", "that is no single figure"),
        ("{nothing}", "one.json", "that is null"),
        ("{seconds}", "two.json", "two.json in benchmarks/results/ cannot be read"),
    ],
)
def test_a_figure_that_is_not_there_is_one_line_and_code_2(project, monkeypatch, capsys, template, file, said):
    monkeypatch.setattr(readme_table, "ROWS", (Row("a thing", template, "", file),))
    assert readme_table.main() == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and said in errors


def test_check_says_in_one_line_that_the_table_is_out_of_date_and_writing_mends_it(project, capsys):
    before = (project / "README.md").read_text()
    assert readme_table.main(check=True) == 1
    assert capsys.readouterr().err == "README.md is out of date: run python benchmarks/readme_table.py\n"
    assert (project / "README.md").read_text() == before
    assert readme_table.main() == 0 and readme_table.main(check=True) == 0
    after = (project / "README.md").read_text()
    assert after.startswith("Above\n") and after.endswith("\nBelow\n") and "old" not in after
    assert "| a thing | 2.5 ms | | `one.json` |\n" in after


@pytest.mark.parametrize("line", [readme_table.BEGIN, readme_table.END])
def test_a_readme_without_the_place_for_the_table_is_refused(project, capsys, line):
    path = project / "README.md"
    path.write_text(path.read_text().replace(line, ""))
    assert readme_table.main() == 2
    assert "README.md lacks the line" in capsys.readouterr().err
