"""Print the tables of tests/README.md from tests/results.csv, and add scores to both.

    python tests/tables.py                                writes the tables into tests/README.md
    python tests/tables.py --add /tmp/runs/* --device "AMD, AVX512"

The second adds the finished trainings that evaluate.py left in these folders. A row is a scan that
a training scored: `recipe` and `commit` say how it was trained (of two recipes with one name the
commit tells which), `scan` is its file and `patient` the first scan of the same patient, `size` is
the sides of the slices in pixels (128 goes with 16 filters, 256 with 32 up to d8e6015 and with 16
since), `minutes` is how long the whole training took. What is not known is empty. Where only a mean
and a worst scan are known, they are two rows: patient "mean of 7" and scan "worst of 9". A training
that was repeated on another device has more rows; the tables take the first.
"""

import argparse
import json
import re
import subprocess
from pathlib import Path

import evaluate
import pandas as pd

HERE = Path(__file__).resolve().parent
SAME = ["recipe", "commit", "patient", "scan", "seed", "size", "precision", "device"]
COLUMNS = [*SAME, "dice", "minutes"]
TODAY = ("ours", "7e3adfe")
STEPS = [  # recipe, commit, what it changed
    (evaluate.WITH_DEFECTS, "c3dc747", ""),
    ("the tutorial, defects repaired", "c3dc747", ""),
    ("augmented", "61fe3c8", "cross-entropy, batch normalisation, falling rate"),
    ("smoothed", "1e39bad", "along the patient; batches of 5, smallest patient validates"),
    ("batch normalisation", "e7383e4", "after every second convolution"),
    ("Muon", "61f5503", "stronger augmentation, batches of 10"),
    ("held norms", "4fab397", "of kernels, for batch normalisation; last epoch kept"),
    ("from scratch", "d8e6015", "faster augmentation, fewer biases"),
    ("from scratch", "7e3adfe", "16 filters"),
    ("ours", "7e3adfe", "begun with `preds/synthetic.keras`"),
]
PARTS = {  # what is left out: the recipe without it; aa33f70 itself printed the last two
    "nothing": "ours",
    "Muon": "Adam",
    "held norms": "not normalised",
    "cross-entropy": "Dice loss alone",
    "movement": "no movement",
    "light": "same light",
    "noise": "no noise",
    "largest piece": "ours, smoothed",
    "largest piece, smoothing": "ours, as predicted",
}
PARTS_COMMIT = "aa33f70"
SCANS = {"ircad_e01": "patient 1"} | {
    f"lits_{n:03d}": f"LiTS {n}" for n in (5, 6, 8, 10, 0, 2, 3, 4)
}
EXTERNAL = {"ircad_e17": "patient 17"}  # of another training


def read_results() -> pd.DataFrame:
    """Return tests/results.csv as it stands there, all columns text."""
    return pd.read_csv(HERE / "results.csv", dtype=str, keep_default_na=False)


def find(results: pd.DataFrame, recipe: str, commit: str, size: int) -> pd.DataFrame:
    """Return the rows of a recipe on processors, not GPUs."""
    is_found = (results.recipe == recipe) & (results.commit == commit)
    is_found &= results["size"] == str(size)
    return results[is_found & ~results.device.str.startswith("H200")]


def mean_and_worst(rows: pd.DataFrame) -> str:
    """Return "0.960 / 0.951", of all seven patients and nine scans; empty if some are missing."""
    rows = rows.drop_duplicates(["patient", "scan"]).astype({"dice": float})
    mean = rows.dice[rows.patient == "mean of 7"]
    worst = rows.dice[rows.scan == "worst of 9"]
    scans = rows[rows.scan.isin(SCANS)]
    if mean.empty and len(scans) == len(SCANS):
        mean, worst = [scans.groupby("patient").dice.mean().mean()], [scans.dice.min()]
    return " / ".join(f"{value:.3f}" for value in [*mean, *worst])


def by_seed(rows: pd.DataFrame) -> str:
    """Return `mean_and_worst` of each seed that has it."""
    scores = [mean_and_worst(rows[rows.seed == seed]) for seed in sorted(rows.seed.unique())]
    return ", ".join(filter(None, scores))


def as_table(heads: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(" | ".join(line).rstrip() for line in lines)


def tabulate_steps(results: pd.DataFrame) -> str:
    """Return the table with a row for each step from the tutorial to today's recipe."""
    rows = []
    for recipe, commit, what in STEPS:
        scores = [by_seed(find(results, recipe, commit, size)) for size in (128, 256)]
        rows.append([": ".join(filter(None, [recipe, what])), *scores, commit])
    return as_table(["step", "128 x 128", "256 x 256", "commit"], rows)


def tabulate_scans(results: pd.DataFrame) -> str:
    """Return the table with a row for each scan: today's recipe, the first two seeds."""
    today = find(results, *TODAY, 256)
    seeds = [today[today.seed == seed] for seed in ("0", "1")]
    rows = []
    for scan, name in (SCANS | EXTERNAL).items():
        found = [seed.dice[seed.scan == scan].astype(float)[:1] for seed in seeds]
        rows.append([name, *("".join(dice.map("{:.3f}".format)) for dice in found)])
    rows.insert(len(SCANS), ["mean / worst", *map(mean_and_worst, seeds)])
    return as_table(["tested on", "seed 0", "seed 1"], rows)


def tabulate_parts(results: pd.DataFrame) -> str:
    """Return the table with a row for each part: today's recipe without it, seed by seed."""
    rows = []
    for part, recipe in PARTS.items():
        scores = {size: by_seed(find(results, recipe, PARTS_COMMIT, size)) for size in (128, 256)}
        rows.append([part, scores[128]])
        rows += [[f"{part}, 256 x 256", scores[256]]] if scores[256] else []
    return as_table(["left out", "mean / worst"], rows)


TABLES = {"steps": tabulate_steps, "scans": tabulate_scans, "parts": tabulate_parts}


def fill(page: str, results: pd.DataFrame) -> str:
    """Return a page with each table between `<!-- NAME -->` and `<!-- end -->` printed anew."""
    for name, tabulate in TABLES.items():
        start, end = f"<!-- {name} -->\n", "<!-- end -->"
        if start not in page:
            raise ValueError(f"tests/README.md has no place for the table {name}: {start.strip()}")
        before, rest = page.split(start, 1)
        page = f"{before}{start}{tabulate(results)}\n{end}{rest.split(end, 1)[1]}"
    return page


def read_notebook(folder: Path) -> tuple[str, str]:
    """Return what a training printed, and the minutes that its cell with `fit` took."""
    log, notebook, minutes = folder / "log", folder / "train.ipynb", ""
    printed = log.read_text(encoding="utf-8") if log.exists() else ""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"] if notebook.exists() else []
    for cell in cells:
        for output in cell.get("outputs", []):
            text = output.get("text", output.get("data", {}).get("text/plain", ""))
            printed += "".join(text) + "\n"
        if ".fit(" in "".join(cell["source"]):
            minutes = f"{cell['metadata']['papermill']['duration'] / 60:.1f}"
    return printed, minutes


def read_training(folder: Path, commit: str, device: str) -> pd.DataFrame:
    """Return a finished training as rows of tests/results.csv; none if it is not finished."""
    name = re.fullmatch(r"(.+?)_(without_.+?|test)_(\d+)_(\d+)(_[A-Z].*)?", folder.name)
    if not name or not (folder / "preds" / "metrics.csv").exists():
        return pd.DataFrame(columns=COLUMNS)
    printed, minutes = read_notebook(folder)
    precision = re.search(r"computes in (?:mixed_)?(\w+)", printed)
    recipe, scores = name[1].replace("_", " "), evaluate.read_scores(folder)
    table = scores.assign(recipe=recipe, commit=commit, seed=name[4], size=name[3], device=device)
    table["precision"], table["minutes"] = precision[1] if precision else "", minutes
    table["dice"] = table.dice.map("{:.4f}".format)
    return table[COLUMNS]


def main() -> None:
    """Add what the command line names to results.csv, and print the tables anew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--add", type=Path, nargs="+", default=[], metavar="FOLDER")
    parser.add_argument("--commit", help="that they were trained with (the last one)")
    parser.add_argument("--device", default="", help='that they were trained on: "AMD, AVX512"')
    options = parser.parse_args()

    results = read_results()
    if options.add:
        last = ["git", "-C", str(HERE), "rev-parse", "--short=7", "HEAD"]
        commit = options.commit or subprocess.check_output(last, text=True).strip()
        added = [read_training(folder, commit, options.device) for folder in options.add]
        for folder, rows in zip(options.add, added, strict=True):
            print(f"{folder}: {len(rows)} rows")
        results = pd.concat([results, *added]).drop_duplicates(SAME, keep="last")
        results.to_csv(HERE / "results.csv", index=False, lineterminator="\n")
    readme = HERE / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
