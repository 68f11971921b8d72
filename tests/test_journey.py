"""What a newcomer does, from an empty raw/ to pictures in preds/, in a folder of its own."""

import ast
import json
import os
import shutil
import subprocess
import sys

import keras
import nbformat
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import REPO
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from skimage.io import imread

LEARNED = """
None if WEIGHTS else (
    int(optimizer.iterations), float(np.array(optimizer.learning_rate)), len(batches)
)
"""


def run(folder, *command):
    """Run a script of the repo in a folder and return what it printed."""
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


def execute(folder, twice=None, **parameters):
    """Execute the notebook in a folder with other parameters, as papermill does; return it.

    twice : words of a cell to run a second time at once, as who steps through a notebook may
    Raises ValueError for a parameter that the notebook does not have.
    """
    notebook = nbformat.read(folder / "train.ipynb", as_version=4)
    if twice:
        again = next(n for n, c in enumerate(notebook.cells) if twice in c.source)
        notebook.cells.insert(again, nbformat.v4.new_code_cell(notebook.cells[again].source))
    notebook.cells.append(nbformat.v4.new_code_cell(LEARNED))
    at = next(n for n, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", []))
    known = {s.targets[0].id for s in ast.parse(notebook.cells[at].source).body}
    if unknown := set(parameters) - known:
        raise ValueError(f"the notebook has no parameters {unknown}")
    lines = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(lines))
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    return client.execute()


def learned(notebook):
    """Return the steps that the training took, the last one's learning rate and the batches."""
    return ast.literal_eval(notebook.cells[-1].outputs[-1].data["text/plain"])


def steps_of_the_export(notebook):
    """Return the table of Dice after each step, as text."""
    exporting = next(c for c in notebook.cells if c.source.startswith("display(export_patients"))
    return [out.data["text/plain"] for out in exporting.outputs if "data" in out][-1]  # after a bar


def printed(notebook):
    """Return all that the cells of an executed notebook printed."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return "".join(out.get("text", "") for out in outputs if out.get("name") == "stdout")


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """Return the folder after the whole way, and the executed notebook."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "raw").mkdir()
    for name in ("data.py", "train.ipynb", "raw/phantom.py"):
        shutil.copy(REPO / name, folder / name)
    run(folder, "raw/phantom.py", "--train", "3", "--test", "2", "--matrix", "64")
    run(folder, "data.py", "--size", "64", "--oblique", "1")
    return folder, execute(folder, EPOCHS=3, FILTERS=8, VIEWS=1, SMALL_SHARE=0.5)


def test_the_notebook_itself_is_left_as_it_was(journey):
    folder, _ = journey
    assert (folder / "train.ipynb").read_bytes() == (REPO / "train.ipynb").read_bytes()


def test_training_prints_one_line_an_epoch(journey):
    lines = [line for line in printed(journey[1]).splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all("val_dice" in line for line in lines)


def test_validation_is_on_axial_slices_of_patients_that_are_held_out(journey):
    folder, notebook = journey
    said = next(line for line in printed(notebook).splitlines() if " to validate: " in line)
    slices = pd.read_csv(folder / "slices_train.csv")
    (held,) = ast.literal_eval(said.split(": ")[1])
    to_train = (slices.patient != held).sum()
    to_validate = ((slices.patient == held) & (slices.family == 0)).sum()
    assert said.startswith(f"{to_train} slices to train on, {to_validate} to validate")
    assert slices.family.max() == 1


def test_each_test_slice_has_an_upright_picture_of_its_own(journey):
    folder, _ = journey
    slices = pd.read_csv(folder / "slices_test.csv")
    for patient, rows in slices.groupby("patient"):
        pictures = sorted(path.name for path in (folder / "preds" / patient).iterdir())
        assert pictures == [f"slice_{n:04d}.png" for n in sorted(rows.slice)]
        picture = imread(folder / "preds" / patient / pictures[len(pictures) // 2])
        assert picture.shape == (512, 512, 3) and picture.any()
        assert imread(folder / "preds" / f"{patient}.png").any()
        assert imread(folder / "preds" / f"{patient}_3d.png").any()


def test_the_table_scores_each_patient_and_gives_mean_and_worst(journey):
    table = pd.read_csv(journey[0] / "preds" / "metrics.csv").set_index("patient").dice
    patients = table.drop(["mean", "worst"])
    assert list(patients.index) == ["phantom_04", "phantom_05"]
    assert patients.between(0, 1).all()
    assert table["mean"] == pytest.approx(patients.mean(), abs=1e-4)
    assert table["worst"] == patients.min()


def test_each_patient_is_kept_as_a_volume_over_its_scan(journey):
    folder, _ = journey
    for patient in ("phantom_04", "phantom_05"):
        scan = nib.load(folder / "raw" / "test" / f"{patient}_orig.nii.gz")
        liver = nib.load(folder / "preds" / f"{patient}_liver.nii.gz")
        assert liver.shape == scan.shape and liver.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(liver.affine, scan.affine)


def test_dice_per_epoch_is_plotted_and_kept(journey):
    folder, _ = journey
    history = pd.read_csv(folder / "preds" / "history.csv")
    assert history.epoch.tolist() == [1, 2, 3] and {"dice", "val_dice"} <= set(history)
    assert imread(folder / "preds" / "dice_per_epoch.png").any()


def test_the_lowest_validation_loss_is_kept_and_at_the_end_the_last_epoch(journey):
    lines = [line for line in printed(journey[1]).splitlines() if line.startswith("epoch ")]
    history = pd.read_csv(journey[0] / "preds" / "history.csv")
    stage = [0, 1, 1]  # the first epoch sees small slices; a lower loss there counts no more
    lowest_before = history.val_loss.groupby(stage).transform(lambda v: v.cummin().shift())
    is_kept = history.val_loss < lowest_before.fillna(np.inf)  # the first of equals is kept
    is_kept.iloc[-1] = True
    assert [line.endswith("kept") for line in lines] == is_kept.tolist()
    assert history.val_dice.max() > 0
    keras.models.load_model(journey[0] / "preds" / "unet.keras")


def test_the_learning_rate_has_fallen_to_zero_with_the_last_step(journey):
    steps, rate, batches = learned(journey[1])
    assert steps == 3 * batches and 0 <= rate < 1e-9


def test_the_export_smooths_and_keeps_the_largest_piece(journey):
    assert "smoothed  largest piece" in steps_of_the_export(journey[1])


def test_what_is_predicted_is_what_was_kept_also_if_the_training_is_run_again(journey, tmp_path):
    folder = shutil.copytree(journey[0], tmp_path / "clone")
    other = dict(EPOCHS=4, FILTERS=4, DECAY=False, LEARNING_RATE=0.1, SMOOTH_MM=0)
    more = dict(LARGEST_PIECE=False, PRECISION="float32")
    notebook = execute(folder, twice="model.fit(", **other, **more)
    steps, rate, batches = learned(notebook)
    assert steps == 4 * batches and rate == pytest.approx(0.1)
    assert len(list((folder / "preds").glob("unet-*.keras"))) == 2  # the first, and the journey's
    assert not {"smoothed", "largest"} & set(steps_of_the_export(notebook).split())
    imgs = np.load(folder / "imgs_test.npy")[..., None]
    kept = keras.models.load_model(folder / "preds" / "unet.keras").predict(imgs, verbose=0)
    predicted = np.load(folder / "preds" / "probabilities.npy")
    np.testing.assert_allclose(predicted, kept[..., 0], atol=0.01)  # kept as float16


def test_weights_segment_a_new_scan_without_training_or_mask(journey, tmp_path):
    trained, _ = journey
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("preds"))
    shutil.copy(trained / "preds" / "unet.keras", tmp_path / "mine.keras")
    shutil.rmtree(tmp_path / "raw" / "train")
    (tmp_path / "raw" / "test" / "phantom_04_liver.nii.gz").unlink()
    for name in ("imgs_train.npy", "masks_train.npy", "slices_train.csv"):
        os.remove(tmp_path / name)
    run(tmp_path, "data.py", "--only", "test", "--size", "64")
    notebook = execute(tmp_path, WEIGHTS="mine.keras", VIEWS=1)
    assert "epoch 1/" not in printed(notebook)
    table = pd.read_csv(tmp_path / "preds" / "metrics.csv").set_index("patient").dice
    before = pd.read_csv(trained / "preds" / "metrics.csv").set_index("patient").dice
    assert np.isnan(table["phantom_04"])
    assert table["phantom_05"] == pytest.approx(before["phantom_05"], abs=1e-3)
    assert len(list((tmp_path / "preds" / "phantom_04").iterdir())) > 10
    assert (tmp_path / "preds" / "phantom_04_liver.nii.gz").exists()
    assert not (tmp_path / "preds" / "unet.keras").exists()


def test_a_training_that_keeps_no_epoch_stops_before_it_replaces_anything(journey, tmp_path):
    folder = shutil.copytree(journey[0], tmp_path / "clone")
    before = {path.name: path.read_bytes() for path in (folder / "preds").glob("*.*")}
    with pytest.raises(CellExecutionError, match="no model was kept: train again"):
        execute(folder, EPOCHS=1, FILTERS=8, LEARNING_RATE=1e39)  # infinite in float32
    after = {path.name: path.read_bytes() for path in (folder / "preds").glob("*.*")}
    (renamed,) = after.keys() - before.keys()
    assert after[renamed] == before.pop("unet.keras")
    assert {name: after[name] for name in before} == before


def test_weights_without_a_scan_to_segment_are_refused_in_a_sentence(journey, tmp_path):
    for name in ("data.py", "train.ipynb"):
        shutil.copy(REPO / name, tmp_path / name)
    shutil.copytree(journey[0] / "raw" / "train", tmp_path / "raw" / "train")
    run(tmp_path, "data.py", "--size", "64")
    with pytest.raises(CellExecutionError, match="nothing to segment: put scans in raw/test"):
        execute(tmp_path, WEIGHTS=str(journey[0] / "preds" / "unet.keras"))


def test_an_unknown_parameter_is_refused(journey):
    with pytest.raises(ValueError, match="EPOCH'"):
        execute(journey[0], EPOCH=3)


@pytest.mark.parametrize(
    "name, value, wanted",
    [
        ("SMALL_SHARE", 50, "0 or more"),
        ("AUGMENT", "false", "True or False"),
        ("EPOCHS", 2.5, "a whole number"),
        ("PRECISION", "bfloat16", "auto, float32 or mixed_bfloat16"),
        ("VALIDATION_PATIENTS", "p1", "a list of names"),
    ],
)
def test_a_wrong_parameter_stops_the_notebook_before_it_starts(tmp_path, name, value, wanted):
    for file in ("data.py", "train.ipynb"):
        shutil.copy(REPO / file, tmp_path / file)
    with pytest.raises(CellExecutionError, match=f"{name} is {value!r}, wanted {wanted}"):
        execute(tmp_path, **{name: value})
    assert not (tmp_path / "preds").exists()


def test_the_readme_names_files_that_exist():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    names = ["requirements.txt", "raw/phantom.py", "data.py", "train.ipynb", "LICENSE"]
    for name in [*names, "tests/README.md"]:
        assert name in readme and (REPO / name).exists()
    assert json.loads((REPO / "train.ipynb").read_text(encoding="utf-8"))["nbformat"] == 4
