"""The page of results says what results.csv says, and the recipes fit the notebook."""

import json

import evaluate
import pandas as pd
import papermill
import pytest
import tables
from conftest import REPO

PAGE = REPO / "tests" / "README.md"


def finished_training(folder, recipe="ours", scans=("lits_008", "lits_004")):
    """Write what a training of these scans leaves in its folder, and return it."""
    training = folder / evaluate.name_folder(
        recipe, "without lits_004", 128, 1, [["FILTERS", "16"]]
    )
    (training / "preds").mkdir(parents=True)
    names = [*scans, "mean", "worst"]
    scores = pd.DataFrame({"patient": names, "slices": 3, "dice": [0.91, 0.93, 0.92, 0.91]})
    scores.to_csv(training / "preds" / "metrics.csv", index=False)
    cells = [
        {"source": "model.fit(batches)", "metadata": {"papermill": {"duration": 90}}},
        {"source": "", "outputs": [{"text": ["computes in mixed_bfloat16\n"]}]},
    ]
    (training / "train.ipynb").write_text(json.dumps({"cells": cells}))
    return training


def test_the_tables_of_the_page_are_what_is_printed_from_the_results():
    page = PAGE.read_text(encoding="utf-8")
    assert tables.fill(page, tables.read_results()) == page


def test_the_page_has_at_most_900_words():
    assert len(PAGE.read_text(encoding="utf-8").split()) <= 900


def test_a_mean_is_over_patients_and_the_worst_is_a_scan():
    dice = dict.fromkeys(tables.SCANS, "0.9") | {"lits_006": "0.5", "lits_008": "0.7"}
    rows = pd.DataFrame({"scan": dice.keys(), "dice": dice.values()})
    rows["patient"] = rows.scan.replace(["lits_008", "lits_010"], "lits_006")
    assert tables.mean_and_worst(rows) == "0.871 / 0.500"  # (6 x 0.9 + 0.7) / 7
    assert tables.mean_and_worst(rows[1:]) == ""


def test_a_finished_training_becomes_a_row_a_scan(tmp_path):
    rows = tables.read_training(finished_training(tmp_path), "abc1234", "AMD, AVX512")
    assert rows.columns.tolist() == tables.read_results().columns.tolist()
    assert rows.to_numpy().tolist() == [
        ["ours", "abc1234", *names, "1", "128", "bfloat16", "AMD, AVX512", dice, "1.5"]
        for names, dice in [(["lits_006", "lits_008"], "0.9100"), (["lits_004"] * 2, "0.9300")]
    ]


def test_a_training_that_is_not_finished_adds_nothing(tmp_path):
    training = finished_training(tmp_path)
    (training / "preds" / "metrics.csv").unlink()
    assert tables.read_training(training, "abc1234", "").empty


@pytest.mark.parametrize("recipe", evaluate.RECIPES)
def test_a_recipe_names_parameters_of_the_notebook(recipe):
    known = papermill.inspect_notebook(str(evaluate.NOTEBOOK))
    assert evaluate.RECIPES[recipe].keys() <= known.keys()


def test_scans_of_one_patient_are_left_out_together(tmp_path):
    (tmp_path / "train").mkdir()
    sizes = {"lits_006": 3, "lits_008": 3, "lits_010": 3, "lits_002": 5, "lits_003": 4}
    for name, size in sizes.items():
        (tmp_path / "train" / f"{name}_orig.nii.gz").write_bytes(b"0" * size)
    one = ["lits_006", "lits_008", "lits_010"]
    assert evaluate.split_patients(tmp_path, 2) == {
        "without lits_006 lits_008 lits_010": (["lits_002", "lits_003"], ["lits_003"], one),
        "without lits_002 lits_003": (one, one, ["lits_002", "lits_003"]),
    }
