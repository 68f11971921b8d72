"""What the tests share: a folder for data.py, hand-made scans, the notebook's functions."""

import ast
import itertools
import json
import linecache
import signal
import sys
import types
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[1]
SHARED_SCANS = REPO.parent / "shared" / "scans"
sys.path.insert(0, str(REPO))

import data  # noqa: E402  the repo's root has to be on the path first
from raw import scans, volumes  # noqa: E402

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it runs by &

ALL_AXES = [
    "".join(codes)
    for order in itertools.permutations(("LR", "PA", "SI"))
    for codes in itertools.product(*order)
]
OBLIQUE = np.array(  # LPS axes of 1 x 1 x 2 mm, tilted by 20 degrees about the patient's x axis
    [
        [-1, 0, 0, 30],
        [0, -np.cos(np.pi / 9), -2 * np.sin(np.pi / 9), 10],
        [0, -np.sin(np.pi / 9), 2 * np.cos(np.pi / 9), -50],
        [0, 0, 0, 1],
    ]
)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Return an empty folder with raw/train and raw/test that data.py takes for its own."""
    for module in (data, scans, volumes):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        (tmp_path / "raw" / split).mkdir(parents=True)
    return tmp_path


def load_notebook():
    """Return a module with the notebook's imports, functions and classes, and nothing else.

    A function that leans on a variable of another cell fails with NameError.
    """
    module = types.ModuleType("notebook")
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    for cell in json.loads((REPO / "train.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            source, name = "".join(cell["source"]), f"train.ipynb {cell['id']}"
            linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
            tree = ast.parse(source)
            tree.body = [node for node in tree.body if isinstance(node, kept)]
            exec(compile(tree, name, "exec"), module.__dict__)
    return module


@pytest.fixture(scope="session")
def notebook():
    """Return the notebook's functions."""
    return load_notebook()


def body_and_liver(shape=(32, 32, 6)):
    """Return a hand-made CT and its liver on the axes (L, P, S): (x, y, z) int16 HU and uint8.

    The liver is a block to the patient's right and to the front, in slices 2 to 4; a small block
    of bone to the left and back makes every mirroring visible.
    """
    image = np.full(shape, -1000, np.int16)
    image[2:-2, 4:-4] = 40
    image[4:14, 6:16, 2:5] = 100
    image[20:24, 22:26, 1:] = 700
    return image, (image == 100).astype(np.uint8)


def save(path, volume, affine=None, axes="LPS", dtype=None):
    """Write a volume given on the axes (L, P, S) as a NIfTI file that stores it on other axes."""
    affine = np.diag([-1.0, -1.0, 2.0, 1.0]) if affine is None else affine
    stored = nib.Nifti1Image(np.asarray(volume, dtype), affine)
    if axes != "LPS":
        here, there = (nib.orientations.axcodes2ornt(codes) for codes in ("LPS", axes))
        stored = stored.as_reoriented(nib.orientations.ornt_transform(here, there))
    nib.save(stored, path)
    return path


def save_patient(folder, name="p1", shape=(32, 32, 6), mask=True, **options):
    """Write the hand-made patient as NAME_orig.nii.gz and NAME_liver.nii.gz.

    The body differs by 1 HU in raw/test: the same slices in both splits are refused.
    """
    image, liver = body_and_liver(shape)
    image[image == 40] += folder.name == "test"
    save(folder / f"{name}_orig.nii.gz", image, **options)
    if mask:
        save(folder / f"{name}_liver.nii.gz", liver, **options)


def dice(a, b):
    """Return the Dice score of two masks."""
    return 2 * np.logical_and(a, b).sum() / (np.count_nonzero(a) + np.count_nonzero(b))
