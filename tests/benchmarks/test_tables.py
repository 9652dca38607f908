"""Tables in pages come from the records, and nothing else can be written between their marks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import clock
from benchmarks.tables import stale
from benchmarks.tables.__main__ import DEFINITIONS, main, used_names
from benchmarks.tables.pages import blocks, pages
from benchmarks.tables.records import RESULTS, ROOT, Record, load_records, origin

SOAK = "<!-- table: soak -->\n<!-- end -->\n"


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A folder with the records and one page that has one marked table."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for path in RESULTS.glob("*.jsonl"):
        shutil.copy(path, results)
    (tmp_path / "page.md").write_text(f"# Before\n\n{SOAK}\nafter\n")
    return tmp_path


def run(house: Path, *flags: str) -> int:
    return main([*flags, "--root", str(house), "--results", str(house / "benchmarks/results")])


# ---- the pages of this clone


def test_pages_are_what_the_records_give(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_every_table_stands_in_a_page_below_results():
    """No record is measured for a table that nobody can find."""
    shown = set()
    for path in RESULTS.glob("*.md"):
        shown |= {block.name for block in blocks(path.read_text(), path.name)}
    assert shown == set(DEFINITIONS)
    assert used_names(ROOT) == list(DEFINITIONS)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_table_says_where_its_figures_come_from(name):
    table = DEFINITIONS[name].build(load_records())
    assert table.rows and table.records
    assert all(len(cells) == len(table.header) for cells in table.rows)
    last = table.markdown().splitlines()[-1]
    for record in table.records:
        assert record.commit_text in last and record.date in last and record.file in last
        assert record.environment["device"] in last


def test_figures_of_the_readme_are_kept():
    """One figure of each table as the README stated it before the tables were generated."""
    records = load_records()
    for name, figures in {
        "real-data": ["21/112 = 18.8 % (12.6 - 27.0)", "0.0538 (0.0496 - 0.0586)", "27112"],
        "real-data-differences": ["no difference seen (+4.0 points, +0.0 to +9.0; p 0.219)"],
        "real-data-settings": ["18/112, 0.556, 0.0248 (0.0316)", "19/112, 0.556, 0.0740"],
        "quickstart": ["0.1626", "1.133 -> 0.395"],
        "h100-training": ["**20,985**", "12,315", "12,788", "**19,294**", "75 %", "55.8"],
        "h100-decoding": ["**3,505**", "2,754", "1,943", "29.1", "45,450"],
        "h100-kernels": ["**0.349**", "sdpa 0.310", "394 TFLOP/s", "**11.81**", "peft 3.58"],
        "cpu-training": ["**437**", "144 (4 rows), 95 (8 rows)", "1.87x", "4.83, 8.44"],
        "cpu-sampling": ["**314.7**", "102.0", "160 %", "35/64"],
        "cpu-sampling-drafts": ["50.8 -> 109.8", "2.51, 70 %"],
        "memory-plan": ["| 765 | 24.5 | 13.5 | 40.4 |", "| 20.6 |"],
        "memory-measured": ["| 1.96 | 2.00 |"],
        "sharded-memory": ["| 664 | 879 |"],
        "soak": ["338.8, 339.0", "888, 1652, 1829"],
        "cpu-distill-processes": ["19.0 and 19.8"],
        "busy": ["| 595 | 375 | 299 |", "| 629 | 185 | 28 |"],
        "speed": ["**20,985**", "5.85x"],
    }.items():
        text = DEFINITIONS[name].build(records).markdown()
        for figure in figures:
            assert figure in text, f"{name}: {figure}"


# ---- writing and checking


def test_a_marked_table_is_written_and_the_rest_of_the_page_left(house, capsys):
    assert run(house) == 0
    text = (house / "page.md").read_text()
    assert text.startswith("# Before\n\n<!-- table: soak -->\n|  |  |\n")
    assert text.endswith("<!-- end -->\n\nafter\n")
    assert "| killed at steps | 888, 1652, 1829 |" in text
    assert capsys.readouterr().out == "page.md: written\n"
    assert run(house) == 0
    assert (house / "page.md").read_text() == text and capsys.readouterr().out == ""


@pytest.mark.parametrize("changed", ["page", "record"])
def test_check_is_red_where_a_figure_differs(house, capsys, changed):
    run(house)
    assert run(house, "--check") == 0
    path = house / ("page.md" if changed == "page" else "benchmarks/results/soak.jsonl")
    path.write_text(path.read_text().replace("1652", "1653"))
    before = (house / "page.md").read_text()
    capsys.readouterr()
    assert run(house, "--check") == 1
    line = 1 + next(i for i, text in enumerate(before.splitlines()) if "165" in text)
    assert capsys.readouterr().out.startswith(f"page.md:{line}: ")
    assert (house / "page.md").read_text() == before


def test_check_is_red_where_a_newer_record_has_other_figures(house, capsys):
    run(house)
    path = house / "benchmarks/results/soak.jsonl"
    document = json.loads(path.read_text())
    document["environment"] |= {"date": "2031-01-01T00:00:00+00:00", "commit": "abc1234"}
    document["kills"] = [1, 2, 3]
    with path.open("a") as file:
        file.write(json.dumps(document) + "\n")
    assert run(house, "--check") == 1
    run(house)
    assert "| killed at steps | 1, 2, 3 |" in (house / "page.md").read_text()
    assert "commit abc1234 (2031-01-01)" in (house / "page.md").read_text()


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("\n<!-- table: soap -->\n<!-- end -->\n", 2, "unknown table 'soap'; expected one of"),
        ("<!-- table: soak -->\n", 1, "<!-- end --> is missing"),
        ("a\n<!-- table: soak -->\n<!-- table: busy -->\n<!-- end -->\n", 2, "is missing before"),
        ("<!-- end -->\n", 1, "<!-- end --> without a table"),
    ],
)
def test_a_wrong_mark_is_refused_with_page_and_line(house, text, line, said):
    (house / "page.md").write_text(text)
    with pytest.raises(ValueError, match=rf"page\.md:{line}: .*{re.escape(said)}"):
        run(house)


def test_a_mark_in_a_code_block_is_text(house):
    (house / "page.md").write_text(f"```\n{SOAK}```\n~~~text\n<!-- table: x -->\n~~~\n")
    before = (house / "page.md").read_text()
    assert run(house) == 0
    assert (house / "page.md").read_text() == before


def test_pages_are_those_that_git_tracks_or_would(house):
    assert pages(house) == [house / "page.md"]
    subprocess.run(["git", "init", "-q", house], check=True)
    (house / ".gitignore").write_text("runs/\n")
    (house / "runs").mkdir()
    (house / "runs" / "made.md").write_text(SOAK)
    assert pages(house) == [house / "page.md"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ('{"benchmark": "busy", "environment": {}}', 'expected an object with "benchmark": "soak"'),
        ('{"benchmark": "soak"}', "an .environment."),
    ],
)
def test_a_damaged_record_is_named_with_file_and_line(house, line, said):
    path = house / "benchmarks/results/soak.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=rf"soak\.jsonl:2: .*{said}"):
        run(house)


def test_a_table_without_records_is_named(house):
    (house / "benchmarks/results/soak.jsonl").unlink()
    with pytest.raises(ValueError, match="no record of a long run in benchmarks/results"):
        run(house)


def test_the_list_names_every_table(capsys):
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(DEFINITIONS)


# ---- where a figure comes from


def test_origin_of_measured_and_transcribed_records():
    measured = {"device": "CPU 9", "threads": 2, "gpu": None, "torch": "3.0", "triton": None}
    measured |= {"commit": "abc1234+", "date": "2030-05-06T07:08:09+00:00"}
    by_hand = {"device": "a card", "gpu": "a card", "commit": None, "stated_in": "fff0000"}
    by_hand |= {"date": "2030-01-02", "source": "transcribed from README at 056574f"}
    records = [
        Record("soak", 1, {"environment": measured}),
        Record("busy", 1, {"environment": by_hand}),
    ]
    assert origin(records) == (
        "Measured on CPU 9 (2 threads, torch 3.0), commit abc1234+ (2030-05-06); on a card, commit "
        "not recorded, at the latest fff0000 (2030-01-02). Records: `benchmarks/results/soak.jsonl`"
        ", `benchmarks/results/busy.jsonl` (transcribed from README at 056574f)."
    )
    assert [record.commit for record in records] == ["abc1234", "fff0000"]
    ran = Record("step", 1, {"environment": {"commit": "aaa", "tree": "bbb1 and a tile; why"}})
    assert (ran.commit, ran.commit_text) == ("bbb1", "bbb1 and a tile")


def test_a_record_says_commit_date_machine_and_versions(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    about = clock.machine("cpu")
    assert about["cores"] >= 1 and about["cpu_model"] and about["torch"] and about["date"]
    clock.record({"benchmark": "soak", "environment": about}, wanted=False)
    (record,) = load_records(tmp_path)
    assert set(clock.ORIGIN) <= record.environment.keys()
    with pytest.raises(AssertionError, match="soak: environment lacks commit, triton"):
        for name in ("commit", "triton"):
            del about[name]
        clock.record({"benchmark": "soak", "environment": about}, wanted=False)
    assert len((tmp_path / "soak.jsonl").read_text().splitlines()) == 1


# ---- older than the code


def git(house: Path, *arguments: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    command = ["git", "-C", str(house), *who, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(house: Path, path: str, subject: str) -> str:
    file = house / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{subject}\n")
    git(house, "add", "--", path)
    git(house, "commit", "-q", "-m", subject)
    return git(house, "rev-parse", "--short", "HEAD")


@pytest.fixture
def clone(house: Path) -> Path:
    """A git repository whose soak record is of its first commit."""
    git(house, "init", "-q")
    first = commit(house, "kernels/a.py", "first")
    path = house / "benchmarks/results/soak.jsonl"
    path.write_text(path.read_text().replace('"commit": "5c8c5fd"', f'"commit": "{first}+"'))
    return house


def stale_line(clone: Path, capsys) -> str:
    assert run(clone, "--stale") == 0
    return capsys.readouterr().out.splitlines()[0]


def test_stale_counts_commits_that_touch_the_measured_code(clone, capsys):
    assert stale_line(clone, capsys).endswith("up to date")
    commit(clone, "README.txt", "a page is no code")
    assert stale_line(clone, capsys).endswith("up to date")
    newest = commit(clone, "kernels/a.py", "a faster product")
    line = stale_line(clone, capsys)
    assert re.match(r"soak +soak +[0-9a-f]{7} +stale: 1 commit since, ", line)
    assert f"newest {newest} " in line and line.endswith("a faster product")


def test_stale_says_what_git_cannot_tell(clone, capsys, tmp_path_factory):
    path = clone / "benchmarks/results/soak.jsonl"
    document = json.loads(path.read_text())
    for told, said in [("1234567", "commit 1234567 is not in this clone"), (None, "not recorded")]:
        document["environment"]["commit"] = told
        path.write_text(json.dumps(document) + "\n")
        assert stale_line(clone, capsys).endswith(said)
    commit(clone, "kernels/a.py", "second")
    shallow = tmp_path_factory.mktemp("clones") / "shallow"
    git(clone, "clone", "-q", "--depth", "1", f"file://{clone}", str(shallow))
    assert "no full history" in stale.report({}, shallow)
    assert "no git clone" in stale.report({}, tmp_path_factory.mktemp("none"))


def test_paths_of_the_measured_code_exist():
    """A path that was moved away would make its tables look up to date for ever."""
    kinds = {path.stem for path in RESULTS.glob("*.jsonl")}
    assert kinds <= set(stale.MEASURED_PATHS)
    no_record_yet = {"measure", "product"}  # of a session on a card: benchmarks/card
    assert set(stale.MEASURED_PATHS) - kinds <= no_record_yet
    for kind, paths in stale.MEASURED_PATHS.items():
        assert [path for path in paths if not (ROOT / path).exists()] == [], kind
