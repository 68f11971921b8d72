"""Measure recipes by whole patients, with data.py and the notebook as a user runs them.

    python tests/evaluate.py ours "the tutorial, defects repaired" --folder /tmp/runs

trains on the patients of SCANS/train and scores those of SCANS/test, which hold scans as raw/train
and raw/test do. With `--leave-out` it scores each patient inside SCANS/train by a training without
him, with `--leave-out 3` in three trainings. A recipe is the notebook with other parameters;
RECIPES has them all. `--size 128` makes it quick, `-p FILTERS 32` is as wide as the tutorial's.
Every training has a folder of its own, with the notebook as it ran; a finished one is not run
again, so the table that is printed can grow over several calls. `tests/tables.py --add` keeps the
scores in tests/results.csv.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
from tqdm import tqdm

REPO = Path(__file__).resolve().parents[1]
NOTEBOOK = REPO / "train.ipynb"
ONE_PATIENT = [{"lits_006", "lits_008", "lits_010"}]  # scans of one patient in ../shared/scans

SCRATCH = {"START": ""}
TUTORIAL = SCRATCH | {  # how the tutorial trains
    "MUON": False,
    "NORMALIZE": False,
    "AUGMENT": False,
    "DECAY": False,
    "SMOOTH_MM": 0,
    "CROSS_ENTROPY": False,
    "PRECISION": "float32",
}
WITH_DEFECTS = "the tutorial, with its defects"
RECIPES = {  # parameters of the notebook
    "ours": {},
    "from scratch": SCRATCH,
    WITH_DEFECTS: TUTORIAL | {"VALIDATION_PATIENTS": ["last fifth"]},
    "the tutorial, defects repaired": TUTORIAL,
    "the tutorial, cross-entropy added": TUTORIAL | {"CROSS_ENTROPY": True},
    "Adam": SCRATCH | {"MUON": False},
    "not normalised": SCRATCH | {"NORMALIZE": False},
    "Dice loss alone": SCRATCH | {"CROSS_ENTROPY": False},
    "no augmentation": SCRATCH | {"AUGMENT": False},
    "constant learning rate": SCRATCH | {"DECAY": False},
    "not smoothed": {"SMOOTH_MM": 0},
    "no patient held out": {"VALIDATION_SHARE": 0, "VALIDATION_PATIENTS": []},
}


def patient_of(path: Path) -> str:
    """Return the name of a scan: p1 for p1_orig.nii.gz and p1_liver.nii.gz."""
    return re.sub(r"_(orig|liver)\.nii(\.gz)?$", "", path.name)


def group_patients(folder: Path) -> tuple[list[list[str]], dict[str, int]]:
    """Return the scans of a folder as lists of those of one patient, and the bytes of each scan."""
    sizes = {patient_of(path): path.stat().st_size for path in folder.glob("*_orig.nii*")}
    groups = [sizes.keys() & group for group in ONE_PATIENT]
    alone = [{name} for name in sizes.keys() - set().union(*groups)]
    groups = [sorted(group) for group in [*groups, *alone] if group]
    return sorted(groups, key=lambda group: (-sum(sizes[name] for name in group), group)), sizes


def split_patients(scans: Path, leave_out: int | None) -> dict[str, tuple[list, list, list]]:
    """Return for each training its name and which scans it trains, validates and is tested on.

    leave_out : None to test on SCANS/test, 0 to leave out each patient of SCANS/train in turn,
        N to leave out one of N parts of about equal size; the smallest patient left validates
    """
    groups, sizes = group_patients(scans / "train")
    if leave_out is None:
        return {"test": (sum(groups, []), [], sum(group_patients(scans / "test")[0], []))}
    parts = [[] for _ in range(leave_out or len(groups))]
    for group in groups:
        min(parts, key=lambda part: sum(sizes[name] for name in sum(part, []))).append(group)
    folds = {}
    for part in parts:
        trained, tested = [group for group in groups if group not in part], sum(part, [])
        folds[f"without {' '.join(tested)}"] = (sum(trained, []), trained[-1], tested)
    return folds


def name_folder(recipe: str, fold: str, size: int, seed: int, given: list[list[str]]) -> str:
    """Return the name of a training's folder; tables.py reads recipe, size and seed out of it."""
    name = f"{recipe} {fold} {size} {seed}".replace(" ", "_")
    return "_".join([name, *(re.sub(r"\W+", "_", word) for word in sum(given, []))])


def lay_out(folder: Path, scans: Path, trained: list[str], tested: list[str]) -> None:
    """Fill a folder with scripts, the model to start from, and links to the scans of a training."""
    shutil.rmtree(folder, ignore_errors=True)
    for split, names in {"train": trained, "test": tested}.items():
        (folder / "raw" / split).mkdir(parents=True)
        for path in scans.glob("*/*.nii*"):
            if patient_of(path) in names:
                (folder / "raw" / split / path.name).symlink_to(path.resolve())
    (folder / "preds").mkdir()
    start = REPO / "preds" / "synthetic.keras"
    for file in [REPO / "data.py", start, *(REPO / "raw").glob("*.py")]:
        shutil.copy(file, folder / file.relative_to(REPO))  # a link would slice the repo's raw/


def slice_as_the_tutorial(folder: Path, size: int) -> None:
    """Slice a folder's scans with the tutorial's defects; changes the process that it runs in.

    Hounsfield units wrap around in 8 bits, every second row and column is taken (every fourth for
    128 pixels), slices without liver are not trained on, and the last fifth of the training slices
    is a patient of its own, to validate on.
    """
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    import data

    data.to_gray = lambda hu: hu.astype(np.int16).astype(np.uint8)
    data.resize = lambda picture, rows, columns: picture[
        :: picture.shape[0] // rows, :: picture.shape[1] // columns
    ]
    data.main(["--size", str(size)])
    slices = pd.read_csv("slices_train.csv", dtype=str, keep_default_na=False)
    liver = slices.liver.to_numpy() == "1"
    for name in ("imgs_train.npy", "masks_train.npy"):
        np.save(name, np.load(name)[liver])
    slices = slices[liver].reset_index(drop=True)
    slices.loc[slices.index >= 0.8 * len(slices), "patient"] = "last fifth"
    slices.to_csv("slices_train.csv", index=False)


def train(folder: Path, recipe: str, size: int, parameters: dict) -> None:
    """Slice, then execute the notebook, train.ipynb of the folder, which trains and scores."""
    if recipe == WITH_DEFECTS:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            process.submit(slice_as_the_tutorial, folder, size).result()
    else:
        subprocess.run([sys.executable, "data.py", "--size", str(size)], cwd=folder, check=True)
    options = {"parameters": parameters, "cwd": str(folder), "progress_bar": False}
    papermill.execute_notebook(str(NOTEBOOK), str(folder / NOTEBOOK.name), **options)
    for file in [*folder.rglob("*.npy"), *folder.rglob("slice_*.png")]:
        file.unlink()


def read_scores(folder: Path) -> pd.DataFrame:
    """Return a table with a row for each scored scan of a finished training: scan, patient, dice.

    patient : the first scan of the same patient
    """
    scores = pd.read_csv(folder / "preds" / "metrics.csv")
    scores = scores.rename(columns={"patient": "scan"})  # its name until there was a patients.csv
    scores = scores[~scores.scan.isin(["mean", "worst"])].dropna(subset="dice")
    first = {scan: min(group) for group in ONE_PATIENT for scan in group}
    return pd.DataFrame(
        {"scan": scores.scan, "patient": scores.scan.replace(first), "dice": scores.dice}
    )


def main() -> None:
    """Train what the command line asks for and is not there yet, and print the means."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", choices=RECIPES)
    parser.add_argument("--scans", type=Path, default=REPO.parent / "shared" / "scans")
    parser.add_argument("--folder", type=Path, required=True, help="where the trainings are kept")
    parser.add_argument("--leave-out", type=int, nargs="?", const=0, metavar="PARTS")
    parser.add_argument("--size", type=int, default=256, help="of the slices")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    options = parser.parse_args()

    given = {name: json.loads(value) for name, value in options.p}
    unknown = sorted(given.keys() - papermill.inspect_notebook(str(NOTEBOOK)).keys())
    if unknown:
        parser.error(f"{NOTEBOOK.name} has no parameter {', '.join(unknown)}")

    results = []
    folds = split_patients(options.scans, options.leave_out)
    todo = [(r, s, f) for r in options.recipes for s in options.seeds for f in folds]
    for recipe, seed, fold in tqdm(todo, unit=" trainings"):
        trained, validated, tested = folds[fold]
        name = name_folder(recipe, fold, options.size, seed, options.p)
        folder = options.folder.resolve() / name
        if not (folder / "preds" / "metrics.csv").exists():
            lay_out(folder, options.scans, trained, tested)
            parameters = given | {"SEED": seed, "VALIDATION_PATIENTS": validated}
            train(folder, recipe, options.size, parameters | RECIPES[recipe])
        results.append(read_scores(folder).assign(recipe=recipe, seed=seed))
    table = pd.concat(results)
    patients = table.groupby(["recipe", "seed", "patient"], sort=False).dice.mean()
    mean = patients.groupby(["recipe", "seed"], sort=False).agg(["count", "mean"])  # of patients
    worst = table.groupby(["recipe", "seed"], sort=False).dice.min().rename("worst scan")
    print(mean.join(worst).round(4).to_string())


if __name__ == "__main__":
    main()
