"""docs/evidence.md says what the files in bench/results/paper hold."""

from pathlib import Path

import pytest

from blaq.reproduce.results import Spread, read_versioned

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "paper"
EVIDENCE = (ROOT / "docs" / "evidence.md").read_text()


@pytest.mark.parametrize("name", ["table3", "table4", "short/table3", "short/table4"])
def test_accuracies_and_gaps_are_the_files(name):
    content = read_versioned(RESULTS / f"{name}.json")
    for row in content["content"]["rows"]:
        cells = (f"| {row['label']} |", f"| {Spread(**row['test_accuracy']).text(100)} |",
                 f"| {row['evaluations']:,} | {row['lr']:g} |")
        assert any(all(cell in line for cell in cells) for line in EVIDENCE.splitlines()), cells
    for claim in content["claims"]:
        if claim["verdict"] != "not measured":
            gap = f"{float(claim['here'].split()[0]):+.2f}".replace("-", "−")
            assert f"{gap} points" in EVIDENCE, claim


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda path: path.stem)
def test_every_file_says_where_it_comes_from(path):
    found = read_versioned(path)
    assert found["command"].startswith(f"blaq reproduce {path.stem}")
    assert found["origin"]["commit"] and found["origin"]["dirty"] is False
    runs = [run for row in found["content"].get("rows", []) for run in row.get("runs", [])]
    for run in runs + found["content"].get("runs", []):
        assert run["commit"] and run["command"].startswith("blaq reproduce ")
        assert "seed" in run and "config" in run
    assert path.with_suffix(".png").exists() and path.with_suffix(".svg").exists()
