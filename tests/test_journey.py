"""What a newcomer does, from an empty raw/ to pictures in preds/, in a folder of its own."""

import ast
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import zipfile

import keras
import nbformat
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import REPO, dice
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from skimage.io import imread

LEARNED = "len(batches), int(optimizer.iterations), float(np.array(optimizer.learning_rate))"


def run(folder, *command):
    """Run a script of the repo in a folder and return what it printed."""
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


def execute(folder, then="", times=1, first="", **parameters):
    """Execute the notebook in a folder with other parameters, as papermill does; return it.

    first, then : code to run after the parameters and at the end
    times : how often to run each cell before the next one
    Raises ValueError for a parameter that the notebook does not have.
    """
    notebook = nbformat.read(folder / "train.ipynb", as_version=4)
    cells = []
    for cell in notebook.cells:
        cells += [nbformat.from_dict(cell) for _ in range(times)]
        if "parameters" in cell.metadata.get("tags", []):
            known = {statement.targets[0].id for statement in ast.parse(cell.source).body}
            if unknown := set(parameters) - known:
                raise ValueError(f"the notebook has no parameters {unknown}")
            lines = [f"{name} = {value!r}" for name, value in parameters.items()]
            cells.append(nbformat.v4.new_code_cell("\n".join([*lines, first])))
    notebook.cells = [*cells, nbformat.v4.new_code_cell(then)]
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    hidden = {"PYTEST_CURRENT_TEST", "TF_CPP_MIN_LOG_LEVEL"}  # a kernel that sees them says less
    return client.execute(env={name: os.environ[name] for name in os.environ.keys() - hidden})


def printed(notebook, stream="stdout"):
    """Return all that the cells of an executed notebook printed."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return "".join(out.text for out in outputs if out.get("name") == stream)


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """Return the folder after the whole way, and the executed notebook."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "raw").mkdir()
    for name in ("data.py", "train.ipynb", "raw/volumes.py", "raw/scans.py", "raw/phantom.py"):
        shutil.copy(REPO / name, folder / name)
    run(folder, "raw/phantom.py", "--train", "3", "--test", "2", "--matrix", "64")
    run(folder, "data.py", "--size", "64", "--oblique", "1")
    return folder, execute(folder, then=LEARNED, EPOCHS=3, FILTERS=8, START="")


def test_the_notebook_itself_is_left_as_it_was_and_prints_no_warnings(journey):
    folder, notebook = journey
    assert (folder / "train.ipynb").read_bytes() == (REPO / "train.ipynb").read_bytes()
    assert printed(notebook, "stderr") == ""


def test_each_epoch_is_printed_plotted_and_kept(journey):
    folder, notebook = journey
    lines = [line for line in printed(notebook).splitlines() if line.startswith("Epoch ")]
    assert lines == ["Epoch 1/3", "Epoch 2/3", "Epoch 3/3"]
    assert printed(notebook).count("val_dice: ") == 3
    history = pd.read_csv(folder / "preds" / "history.csv")
    assert len(history) == 3 and {"dice", "loss", "val_dice", "val_loss"} <= set(history)
    assert imread(folder / "preds" / "dice_per_epoch.png").any()


def test_the_learning_rate_has_fallen_to_zero_with_the_last_step(journey):
    batches, steps, rate = ast.literal_eval(journey[1].cells[-1].outputs[-1].data["text/plain"])
    assert steps == 3 * batches and 0 <= rate < 1e-9


def test_the_kept_model_scores_as_said_on_axial_slices_of_patients_that_are_held_out(journey):
    folder, notebook = journey
    said = next(line for line in printed(notebook).splitlines() if " to validate: " in line)
    slices = pd.read_csv(folder / "slices_train.csv")
    assert slices.tilt.max() == 1
    (held,) = ast.literal_eval(said.split(": ")[1])
    to_validate = (slices.patient == held) & (slices.tilt == 0)
    to_train = (slices.patient != held).sum()
    assert said.startswith(f"{to_train} slices to train on, {to_validate.sum()} to validate")
    network = keras.models.load_model(folder / "preds" / "unet.keras")
    imgs, masks = (np.load(folder / f"{name}_train.npy")[to_validate] for name in ("imgs", "masks"))
    predicted = network.predict(imgs[..., None], verbose=0)[..., 0] >= 0.5
    known = pd.read_csv(folder / "preds" / "history.csv").val_dice.iloc[-1]
    assert dice(predicted, masks) == pytest.approx(known, abs=0.01) and known > 0.1


def test_what_is_predicted_is_what_was_kept(journey):
    imgs = np.load(journey[0] / "imgs_test.npy")[..., None]
    kept = keras.models.load_model(journey[0] / "preds" / "unet.keras").predict(imgs, verbose=0)
    predicted = np.load(journey[0] / "preds" / "probabilities.npy")
    difference = np.abs(predicted - kept[..., 0])
    assert difference.max() < 0.1 and difference.mean() < 0.001  # it may compute in bfloat16
    assert not list((journey[0] / "preds").glob("*.h5"))


def test_each_test_slice_has_an_upright_picture_of_its_own(journey):
    folder, _ = journey
    slices = pd.read_csv(folder / "slices_test.csv")
    for patient, rows in slices.groupby("scan"):
        pictures = sorted(path.name for path in (folder / "preds" / patient).iterdir())
        assert pictures == [f"slice_{n:04d}.png" for n in sorted(rows.slice)]
        picture = imread(folder / "preds" / patient / pictures[len(pictures) // 2])
        assert picture.shape == (512, 512, 3) and picture.any()
        assert imread(folder / "preds" / f"{patient}.png").any()
        assert imread(folder / "preds" / f"{patient}_3d.png").any()


def test_each_patient_is_kept_as_a_volume_over_its_scan(journey):
    folder, _ = journey
    for patient in ("phantom_04", "phantom_05"):
        scan = nib.load(folder / "raw" / "test" / f"{patient}_orig.nii.gz")
        liver = nib.load(folder / "preds" / f"{patient}_liver.nii.gz")
        assert liver.shape == scan.shape and liver.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(liver.affine, scan.affine)


def test_the_table_scores_each_patient_and_gives_mean_and_worst(journey):
    table = pd.read_csv(journey[0] / "preds" / "metrics.csv").set_index("scan").dice
    patients = table.drop(["mean", "worst"])
    assert list(patients.index) == ["phantom_04", "phantom_05"]
    assert patients.between(0, 1).all()
    assert table["mean"] == pytest.approx(patients.mean(), abs=1e-4)
    assert table["worst"] == patients.min()


def test_weights_segment_a_new_scan_without_training_or_mask(journey, tmp_path):
    trained, _ = journey
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("preds"))
    shutil.copy(trained / "preds" / "unet.keras", tmp_path / "mine.keras")
    shutil.rmtree(tmp_path / "raw" / "train")
    (tmp_path / "raw" / "test" / "phantom_04_liver.nii.gz").unlink()
    for path in tmp_path.glob("*_train.*"):
        path.unlink()
    run(tmp_path, "data.py", "--only", "test", "--size", "64")
    notebook = execute(
        tmp_path, times=2, WEIGHTS="mine.keras", START=""
    )  # each cell can be run again
    assert "Epoch 1/" not in printed(notebook) and printed(notebook, "stderr") == ""
    table = pd.read_csv(tmp_path / "preds" / "metrics.csv").set_index("scan").dice
    before = pd.read_csv(trained / "preds" / "metrics.csv").set_index("scan").dice
    assert np.isnan(table["phantom_04"])
    assert table["phantom_05"] == pytest.approx(before["phantom_05"], abs=1e-3)
    assert len(list((tmp_path / "preds" / "phantom_04").iterdir())) > 10
    assert (tmp_path / "preds" / "phantom_04_liver.nii.gz").exists()
    assert not (tmp_path / "preds" / "unet.keras").exists()


@pytest.fixture
def copied(journey, tmp_path):
    """Return a copy of the folder of the whole way, and what was kept there, without preds/."""
    shutil.copytree(journey[0], tmp_path, dirs_exist_ok=True, ignore=lambda *_: ["preds"])
    (tmp_path / "preds").mkdir()
    return tmp_path, journey[0] / "preds"


def weights(path):
    """Return the bytes of a kept model's weights; the zip around them holds times."""
    return zipfile.ZipFile(path).read("model.weights.h5")


IN_EPOCH_3 = """
def note(self, epoch, logs=None):
    self.epoch = epoch
def kill(self, batch, logs=None):
    if (self.epoch, batch) == (2, 4):
        os.kill(os.getpid(), 9)
keras.callbacks.TerminateOnNaN.on_epoch_begin = note
keras.callbacks.TerminateOnNaN.on_train_batch_end = kill
"""
SAVING_EPOCH_2 = """
whole_file = np.savez
def half_a_file(path, *arrays, kept):
    whole_file(path, *arrays, kept=kept)
    if '"loss"' in kept.partition('"loss"')[2]:  # of two epochs
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), 9)
np.savez = half_a_file
"""


def test_a_training_killed_twice_ends_bit_for_bit_as_one_that_was_never_stopped(copied):
    folder, known = copied
    (folder / "preds" / "unet.keras").write_bytes(b"trained all night")
    for kill in (SAVING_EPOCH_2, IN_EPOCH_3):
        with pytest.raises(DeadKernelError):
            execute(folder, first=kill, EPOCHS=3, FILTERS=8, START="")
        (model,) = (folder / "preds").glob("*.keras")
        assert model.read_bytes() == b"trained all night"
    said = printed(execute(folder, EPOCHS=3, FILTERS=8, START=""))
    assert "goes on after epoch 2" in said and "Epoch 3/3" in said and "Epoch 2/3" not in said
    assert weights(folder / "preds" / "unet.keras") == weights(known / "unet.keras")
    for name in ("history.csv", "metrics.csv"):
        assert (folder / "preds" / name).read_bytes() == (known / name).read_bytes()
    (renamed,) = (folder / "preds").glob("unet-2*.keras")
    assert renamed.read_bytes() == b"trained all night"
    assert not list((folder / "preds").glob("*training.npz"))


def test_a_training_begins_where_the_model_that_it_starts_from_ended(copied):
    folder, known = copied
    start = {"START": str(known / "unet.keras"), "LEARNING_RATE": 1e-9, "FILTERS": 8}
    execute(folder, EPOCHS=1, NORMALIZE=True, **start)
    found, before = (np.load(path / "probabilities.npy") for path in (folder / "preds", known))
    assert np.abs(found - before).max() < 0.02  # it may compute in bfloat16
    with pytest.raises(CellExecutionError, match="unet.keras' has 8 filters, wanted 4"):
        execute(folder, EPOCHS=1, **start | {"FILTERS": 4})


ON_JAX = """
import json
parameters = {"EPOCHS": 1, "FILTERS": 8, "START": "start.keras", "MUON": False}
names = {"display": lambda table: None}
for cell in json.load(open("train.ipynb", encoding="utf-8"))["cells"]:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names |= parameters
"""


def start_on_jax(folder, devices=1, **options):
    """Start the notebook's cells in a folder on some simulated devices of JAX; return the process.

    Without Muon, which makes 2e-4 of a last digit: so do the same slices in another order.
    options : further environment variables
    """
    hidden = {"PYTEST_CURRENT_TEST", "KERAS_BACKEND"}
    environment = {name: os.environ[name] for name in os.environ.keys() - hidden}
    environment |= {"KERAS_BACKEND": "jax", "MPLBACKEND": "agg", "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", ON_JAX]
    return subprocess.Popen(command, cwd=folder, env=environment | options, **pipes)


def results(folder, process, devices):
    """Return the weights, the Dice and the probabilities that a process on devices ends with."""
    said, errors = process.communicate()
    assert process.returncode == 0 and f"devices: {devices}\n" in said, errors
    scores = pd.read_csv(folder / "preds" / "metrics.csv").dice
    kept = keras.models.load_model(folder / "preds" / "unet.keras").get_weights()
    probabilities = np.load(folder / "preds" / "probabilities.npy")
    return np.concatenate([w.ravel() for w in kept]), scores, probabilities


@pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="needs jax")
def test_four_devices_or_two_machines_of_jax_train_and_predict_as_one_does(copied, tmp_path):
    folder, known = copied
    shutil.copy(known / "unet.keras", folder / "start.keras")
    run(folder, "data.py", "--size", "64")
    second = tmp_path.with_name(f"{tmp_path.name}_second")
    shutil.copytree(folder, second)
    learned, dices, probabilities = results(folder, start_on_jax(folder), 1)
    found = [results(folder, start_on_jax(folder, 4), 4)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    job = {"KERAS_DISTRIBUTION_JOB_ADDRESSES": address, "KERAS_DISTRIBUTION_NUM_PROCESSES": "2"}
    both = {
        path: start_on_jax(path, **job, KERAS_DISTRIBUTION_PROCESS_ID=str(machine))
        for machine, path in enumerate((folder, second))
    }
    found += [results(path, process, 2) for path, process in both.items()]
    for other_learned, other_dices, others in found:
        assert np.linalg.norm(learned - other_learned) <= 1e-5 * np.linalg.norm(learned)
        np.testing.assert_allclose(dices, other_dices, atol=1e-4)
        assert np.abs(probabilities - others).max() < 0.01 and others.any(axis=(1, 2)).all()


def test_the_readme_names_files_that_exist():
    readme = (REPO / "README.md").read_text(encoding="utf-8")
    names = ["requirements.txt", "raw/phantom.py", "data.py", "train.ipynb", "LICENSE"]
    for name in [*names, "tests/README.md"]:
        assert name in readme and (REPO / name).exists()
