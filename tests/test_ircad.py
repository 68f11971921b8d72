"""raw/ircad.py on patients of a few pixels in the real layout, and on a server of our own."""

import errno
import io
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import REPO, SHARED_SCANS, body_and_liver
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

import data

sys.path.insert(0, str(REPO / "raw"))
import ircad  # noqa: E402  raw/ has to be on the path first
import volumes  # noqa: E402

AXIAL = (1, 0, 0, 0, 1, 0)
NAMES = ("ircad_e{:02d}_liver.nii.gz", "ircad_e{:02d}_orig.nii.gz")
SERIES = generate_uid()


@pytest.fixture
def raw(root, monkeypatch):
    """Return an empty raw/ for script and data.py, where tiny patients pass and nobody waits."""
    monkeypatch.setattr(volumes, "ROOT", root)
    monkeypatch.setattr(ircad, "RAW", root / "raw")
    monkeypatch.setattr(ircad, "WORK", root / "raw" / ".ircad")
    monkeypatch.setattr(ircad, "SLICES", (6,) * 20)
    monkeypatch.setattr(ircad, "LIVER_ML", (0.1, 4000))
    monkeypatch.setattr(ircad, "PAUSES_S", (0, 0, 0))
    monkeypatch.setattr(ircad.signal, "signal", lambda *_: None)
    return root / "raw"


def dicom(pixels, position, number, orientation=AXIAL, spacing=(1, 1), **fields):
    """Return a slice (rows, columns) as a DICOM file, with a header like those of patient 1."""
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, generate_uid()
    header.Modality, header.SeriesInstanceUID = "CT", SERIES
    header.InstanceNumber, header.WindowCenter, header.WindowWidth = number, 0, 0
    header.ImagePositionPatient, header.ImageOrientationPatient = list(position), list(orientation)
    header.PixelSpacing, header.SliceThickness = list(spacing), 99  # the thickness is no distance
    header.RescaleSlope, header.RescaleIntercept = 1, 0
    header.Rows, header.Columns = pixels.shape
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated = header.BitsStored = pixels.dtype.itemsize * 8
    header.HighBit = header.BitsStored - 1
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    header.PixelData = pixels.tobytes()
    for keyword, value in fields.items():
        if value is None:
            delattr(header, keyword)
        else:
            setattr(header, keyword, value)
    file = io.BytesIO()
    header.save_as(file, enforce_file_format=True)
    return file.getvalue()


def stack(volume, first=(0, 0, 0), step=(0, 0, 2), **fields):
    """Return {"image_0": bytes, ...} of a volume (columns, rows, slices)."""
    places = np.add(first, np.outer(np.arange(volume.shape[2]), step)).tolist()
    return {
        f"image_{k}": dicom(np.ascontiguousarray(volume[:, :, k].T), place, k, **fields)
        for k, place in enumerate(places)
    }


def patient(image=None, white=1, **masks):
    """Return {path: bytes} of a patient; without arguments that of conftest."""
    if image is None:
        image, liver = body_and_liver()
        masks = {"liver": liver, **masks}
    files = {f"PATIENT_DICOM/{name}": file for name, file in stack(image).items()}
    for mask, volume in masks.items():
        pixels = stack((volume > 0).astype(np.uint8) * np.uint8(white))
        files |= {f"MASKS_DICOM/{mask}/{name}": file for name, file in pixels.items()}
    return files


def put(folder, files):
    """Write {path: bytes} below a folder."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def zipped(files, method=zipfile.ZIP_DEFLATED):
    """Return {path: bytes} as the bytes of a zip, with entries for its folders as the real ones."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for folder in sorted({path.rsplit("/", 1)[0] + "/" for path in files if "/" in path}):
            archive.writestr(folder, b"")
        for path, content in files.items():
            archive.writestr(path, content)
    return file.getvalue()


def as_shipped(files, number=1):
    """Return the files as the server has them: {3Dircadb1.1/PATIENT_DICOM.zip: bytes, ...}."""
    parts = {
        "MESHES_VTK": {"MESHES_VTK/liver.vtk": b"mesh"},
        "LABELLED_DICOM": {"LABELLED_DICOM/a": b""},
    }
    for path, content in files.items():
        parts.setdefault(path.split("/")[0], {})[path] = content
    inner = {f"3Dircadb1.{number}/{part}.zip": zipped(held) for part, held in parts.items()}
    return inner | {f"3Dircadb1.{number}/LICENSE.txt": b"CC BY-NC-ND"}


def run(*options):
    """Run the script and return its exit code; 0 if it does not say any."""
    try:
        ircad.main([str(option) for option in options])
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    return 0


def names(raw, split):
    return sorted(path.name for path in (raw / split).iterdir())


def leftovers(raw):
    """Return what is in raw/ and has no place there."""
    known = {"ircad.csv"} | {name.format(n) for name in NAMES for n in range(1, 21)}
    return [path for path in raw.rglob("*") if path.is_file() and path.name not in known]


def load(raw, number=1, split="train"):
    """Return image and mask of a patient as nibabel reads them."""
    return [nib.load(raw / split / name.format(number)) for name in reversed(NAMES)]


def arrays(raw, number=1, split="train"):
    return [np.asarray(volume.dataobj) for volume in load(raw, number, split)]


def test_a_converted_patient_gives_upright_slices_in_data_py(raw, tmp_path):
    source = put(tmp_path / "3Dircadb1.1", patient())
    assert run("--from", source) == 0
    data.main(["--size", "32"])
    imgs, masks, _ = data.load_train_data()
    image, liver = body_and_liver()
    np.testing.assert_array_equal(imgs, data.to_gray(image.astype(np.float32)).transpose(2, 1, 0))
    np.testing.assert_array_equal(masks, liver.transpose(2, 1, 0))


def test_the_files_are_like_those_the_tutorial_used(raw, tmp_path):
    run("--from", put(tmp_path / "3Dircadb1.1", patient()))
    for stored, dtype in zip(load(raw), (np.int16, np.uint8), strict=True):
        assert stored.get_data_dtype() == dtype
        assert nib.aff2axcodes(stored.affine) == ("L", "A", "S")
        assert stored.header["sform_code"] == stored.header["qform_code"] == 1
        assert stored.header.get_xyzt_units()[0] == "mm"
        np.testing.assert_allclose(stored.get_qform(), stored.get_sform(), atol=1e-5)
    image, _ = body_and_liver()
    np.testing.assert_array_equal(arrays(raw)[0], image[:, ::-1])  # voxel [x, 31 - row, z]


GEOMETRIES = {  # orientation, first position, step, and the affine by hand, of 8 x 6 x 5 voxels
    "axial": (
        AXIAL,
        (-10, -20, 5),
        (0, 0, 2),
        [[-1.5, 0, 0, 10], [0, 3, 0, 5], [0, 0, 2, 5]],  # row 5 lies at y = -20 + 5 * 3
    ),
    "prone": (  # columns to the right, rows to the front
        (-1, 0, 0, 0, -1, 0),
        (10, 20, 5),
        (0, 0, 2),
        [[-1.5, 0, 0, 0.5], [0, 3, 0, -20], [0, 0, 2, 5]],  # column 7 lies at x = 10 - 7 * 1.5
    ),
    "upside down": (  # rows to the front, so that the normal points to the feet
        (1, 0, 0, 0, -1, 0),
        (-10, 20, 5),
        (0, 0, 2),
        [[-1.5, 0, 0, 10], [0, 3, 0, -20], [0, 0, 2, 5]],
    ),
    "files from head to feet": (
        AXIAL,
        (-10, -20, 5),
        (0, 0, -2),
        [[-1.5, 0, 0, 10], [0, 3, 0, 5], [0, 0, 2, -3]],  # slice 4 lies at z = 5 - 4 * 2
    ),
    "oblique": (  # tilted about the patient's x by an angle of cosine 0.8 and sine 0.6
        (1, 0, 0, 0, 0.8, 0.6),
        (0, 0, 0),
        (0, -1.2, 1.6),
        [[-1.5, 0, 0, 0], [0, 2.4, 1.2, -12], [0, -1.8, 1.6, 9]],  # row 5: 5 * 3 * (0.8, 0.6)
    ),
    "coronal": (  # rows to the feet, slices to the back
        (1, 0, 0, 0, 0, -1),
        (0, 0, 0),
        (0, 2, 0),
        [[-1.5, 0, 0, 0], [0, 2, 0, -8], [0, 0, 3, -15]],
    ),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry_has_the_affine_worked_out_by_hand(name):
    orientation, first, step, expected = GEOMETRIES[name]
    volume = np.arange(8 * 6 * 5, dtype=np.int16).reshape(8, 6, 5)  # (columns, rows, slices)
    files = stack(volume, first, step, orientation=orientation, spacing=(3, 1.5))
    slices = ircad.order_slices(read(files))
    stored = volumes.as_nifti(ircad.to_hu(slices), ircad.make_affine(slices), "LAS")
    np.testing.assert_allclose(stored.affine[:3], expected, atol=1e-6)
    across, down = np.reshape(orientation, (2, 3))
    for column, row, k in np.ndindex(volume.shape):  # every voxel is where its DICOM file says
        lps = np.add(first, across * 1.5 * column + down * 3 * row + np.multiply(step, k))
        voxel = nib.affines.apply_affine(np.linalg.inv(stored.affine), lps * (-1, -1, 1))
        assert stored.dataobj[tuple(np.rint(voxel).astype(int))] == volume[column, row, k]


def read(files):
    """Return the slices of {name: bytes} in the order of the names' letters."""
    paths = [Path("folder", name) for name in sorted(files)]
    return [ircad.read_slice(path, partial(files.get, path.name)) for path in paths]


def test_slices_are_ordered_by_position_and_not_by_name():
    volume = np.zeros((4, 4, 12), np.int16) + np.arange(12, dtype=np.int16)
    slices = read(stack(volume))
    assert [one.path.name for one in slices][:3] == ["image_0", "image_1", "image_10"]
    np.testing.assert_array_equal(ircad.to_hu(ircad.order_slices(slices)), volume)


def test_noise_of_floats_in_spacing_and_position_is_rounded_away():
    noisy = 0.5699999928474426
    files = stack(
        np.zeros((4, 4, 5), np.int16), step=(0, 0, 1.600000023841858), spacing=(noisy,) * 2
    )
    affine = ircad.make_affine(ircad.order_slices(read(files)))
    assert np.abs(np.diag(affine)).tolist() == [0.57, 0.57, 1.6, 1]


def test_values_become_hounsfield_units_through_slope_and_intercept():
    stored = np.full((2, 2, 3), 1000, np.uint16)
    files = stack(stored, RescaleSlope=2, RescaleIntercept=-1024)
    hu = ircad.to_hu(ircad.order_slices(read(files)))
    assert hu.dtype == np.int16
    assert set(hu.ravel().tolist()) == {976}


@pytest.mark.parametrize("white", [1, 255])
def test_masks_of_0_and_1_and_of_0_and_255_are_the_same(raw, tmp_path, white):
    assert run("--from", put(tmp_path / "3Dircadb1.1", patient(white=white))) == 0
    np.testing.assert_array_equal(arrays(raw)[1], body_and_liver()[1][:, ::-1])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, ""),
        ({"InstanceNumber": None}, ""),
        ({"InstanceNumber": 7}, ""),
        ({"ImagePositionPatient": None}, "matched by InstanceNumber"),
        ({"ImagePositionPatient": [0, 0, 0]}, "matched by InstanceNumber"),
    ],
)
def test_mask_slices_find_their_image_by_position_or_else_by_number(fields, said, capsys):
    volume = np.arange(4 * 4 * 12).reshape(4, 4, 12)
    images = ircad.order_slices(read(stack(volume.astype(np.int16))))
    mask = (volume % 7 == 0).astype(np.uint8)
    np.testing.assert_array_equal(ircad.match_slices(read(stack(mask, **fields)), images), mask > 0)
    assert said in capsys.readouterr().out


def test_numbers_that_start_at_1_match_those_that_start_at_0():
    volume = np.arange(2 * 2 * 5).reshape(2, 2, 5)
    images = ircad.order_slices(read(stack(volume.astype(np.int16))))
    files = {
        f"image_{k}": dicom(volume[:, :, k].T.astype(np.uint8), (0, 0, 0), k + 1) for k in range(5)
    }
    np.testing.assert_array_equal(ircad.match_slices(read(files), images), volume > 0)


def block(*bounds):
    """Return (12, 12, 12) bool that is true between the bounds."""
    inside = np.zeros((12, 12, 12), bool)
    inside[tuple(slice(*side) for side in bounds)] = True
    return inside


LIVER = block((2, 9), (2, 9), (2, 9))


@pytest.mark.parametrize(
    ("tumour", "hole", "added"),
    [
        ("inside the mask", False, 0),
        ("inside the mask", True, 8),
        ("in its surface", True, 8),
        ("leaning on it", False, 0),
        ("far away", False, 0),
    ],
)
def test_a_tumour_belongs_to_the_liver_if_liver_surrounds_most_of_it(tumour, hole, added):
    piece = {
        "inside the mask": block((4, 6), (4, 6), (4, 6)),
        "in its surface": block((7, 9), (4, 6), (4, 6)),  # 20 of 24 faces
        "leaning on it": block((9, 11), (4, 6), (4, 6)),  # 4 of 24
        "far away": block((10, 12), (10, 12), (10, 12)),
    }[tumour]
    liver = LIVER & ~piece if hole else LIVER.copy()
    assert ircad.add_tumour(liver, piece) == added
    np.testing.assert_array_equal(liver, LIVER)


def test_each_piece_of_a_tumour_is_judged_alone():
    inside, outside = block((4, 6), (4, 6), (4, 6)), block((10, 12), (4, 9), (4, 9))
    liver = LIVER & ~inside
    assert ircad.add_tumour(liver, inside | outside) == 8
    np.testing.assert_array_equal(liver, LIVER)


def test_what_the_liver_mask_leaves_out_is_added_and_printed(raw, tmp_path, capsys):
    image, liver = body_and_liver()
    tumour, vessel = np.zeros_like(liver), np.zeros_like(liver)
    tumour[8:10, 10:12, 3] = vessel[5:7, 8:10, 3] = 1
    adrenal = np.roll(liver, 16, axis=0)
    rest = liver & ~tumour & ~vessel
    files = patient(image, liver=rest, livertumor01=tumour, portalvein=vessel, tumor=adrenal)
    assert run("--from", put(tmp_path / "3Dircadb1.1", files)) == 0
    np.testing.assert_array_equal(arrays(raw)[1], (rest | tumour)[:, ::-1])
    said = capsys.readouterr().out
    assert "livertumor01 is in the liver: 4 voxels" in said
    assert "MASKS_DICOM/tumor" not in said


def under(folder, files):
    return {f"{folder}/{path}": content for path, content in files.items()}


def twice(files):
    return {f"3Dircadb1.1/{path.split('/')[0]}/{path}": file for path, file in files.items()}


def flat_inner_zips(files):
    parts = {"PATIENT_DICOM": {}, "MASKS_DICOM": {}}
    for path, content in files.items():
        part, rest = path.split("/", 1)
        parts[part][rest] = content
    return {f"3Dircadb1.1/{part}.zip": zipped(held) for part, held in parts.items()}


def patient_zip(files):
    return {"3Dircadb1.1.zip": zipped(as_shipped(files))}


def stored_zips(files):
    inner = {"3Dircadb1/3Dircadb1.1.zip": zipped(as_shipped(files), zipfile.ZIP_STORED)}
    return {"3Dircadb1.zip": zipped(inner, zipfile.ZIP_STORED)}


def with_junk(files):
    return under("3Dircadb1.1", files) | {
        "3Dircadb1.1/PATIENT_DICOM/.DS_Store": b"x",
        "3Dircadb1.1/PATIENT_DICOM/._image_1": b"x",
        "3Dircadb1.1/PATIENT_DICOM/DICOMDIR": b"x",
        "3Dircadb1.1/._3Dircadb1.1.zip": b"x",
        "__MACOSX/3Dircadb1.1/PATIENT_DICOM/._image_1": b"x",
        "3Dircadb1.1/LABELLED_DICOM/image_0": b"x",
    }


LAYOUTS = {  # what is given to --from, and what lies there, {path: bytes}
    "unpacked": ("3Dircadb1", partial(under, "3Dircadb1/3Dircadb1.1")),
    "unpacked twice": ("", twice),
    "unpacked patient": ("3Dircadb1.1", partial(under, "3Dircadb1.1")),
    "inner zips": ("3Dircadb1", lambda files: under("3Dircadb1", as_shipped(files))),
    "flat inner zips": ("", flat_inner_zips),
    "patient zips": ("", patient_zip),
    "one patient's zip": ("3Dircadb1.1.zip", patient_zip),
    "whole zip": ("a.zip", lambda files: {"a.zip": zipped(under("3Dircadb1", as_shipped(files)))}),
    "whole zip of stored zips": ("3Dircadb1.zip", stored_zips),
    "whole zip in a folder": ("", lambda files: stored_zips(files) | {"b.zip": b"no", "c": b"x"}),
    "zip of plain files": ("a.zip", lambda files: {"a.zip": zipped(under("3Dircadb1.1", files))}),
    "with junk": ("", with_junk),
    "zipped with junk": ("a.zip", lambda files: {"a.zip": zipped(with_junk(files))}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_arrays(raw, tmp_path, layout):
    source, lay = LAYOUTS[layout]
    assert run("--from", put(tmp_path / "somewhere", lay(patient())) / source) == 0
    image, liver = body_and_liver()
    for found, expected in zip(arrays(raw), (image, liver), strict=True):
        np.testing.assert_array_equal(found, expected[:, ::-1])
    assert leftovers(raw) == []


def test_a_folder_unpacked_beside_its_zip_is_read_from_the_zip(raw, tmp_path):
    cut_off = {path: file[:99] for path, file in patient().items() if "image_0" in path}
    folder = put(tmp_path / "a", under("3Dircadb1.1", cut_off))  # somebody stopped unpacking
    assert run("--from", put(folder, as_shipped(patient()))) == 0
    assert arrays(raw)[0].shape == (32, 32, 6)


def test_a_patient_without_a_number_needs_to_be_told_one(raw, tmp_path, capsys):
    folder = put(tmp_path / "scan", patient())
    assert run("--from", folder) == 1
    assert "--patients N" in capsys.readouterr().err
    assert run("--from", folder, "--patients", 5) == 0
    assert names(raw, "train") == ["ircad_e05_liver.nii.gz", "ircad_e05_orig.nii.gz"]


def test_only_the_patients_asked_for_are_converted_and_absent_ones_are_named(raw, tmp_path, capsys):
    source = tmp_path / "3Dircadb1"
    for number in (1, 2, 14):
        put(source / f"3Dircadb1.{number}", patient())
    assert run("--from", source, "--patients", 2) == 0
    assert names(raw, "train") == [name.format(2) for name in NAMES]
    assert run("--from", source, "--patients", 2, 3) == 1
    assert f"patient 3 failed: is not in {source}" in capsys.readouterr().out
    assert run("--from", source) == 0
    assert f"{source} does not hold patients 3, 4, 5" in capsys.readouterr().out
    assert names(raw, "test") == [name.format(14) for name in NAMES]


def test_another_split_moves_the_files_and_converts_nothing(raw, tmp_path, monkeypatch):
    source = tmp_path / "3Dircadb1"
    for number in (1, 3, 14):
        put(source / f"3Dircadb1.{number}", patient())
    assert run("--from", source) == 0
    before = {p.name: p.stat().st_ino for p in raw.glob("*/*.nii.gz")}
    assert names(raw, "test") == [name.format(14) for name in NAMES]
    monkeypatch.setattr(ircad, "convert", None)
    assert run("--from", source, "--test", 3) == 0
    assert {p.name: p.stat().st_ino for p in raw.glob("*/*.nii.gz")} == before
    assert names(raw, "test") == [name.format(3) for name in NAMES]
    assert run("--from", source, "--test") == 0
    assert names(raw, "test") == []


def test_a_patient_in_both_splits_stops_everything_before_anything_moves(raw, tmp_path, capsys):
    for split, number in (("train", 1), ("train", 14), ("test", 14), ("test", 1)):
        (raw / split / NAMES[1].format(number)).write_text("mine")
    assert run("--from", tmp_path, "--test", 14) == 1
    assert "raw/train too: take one away" in capsys.readouterr().err
    assert len(list(raw.glob("*/*.nii.gz"))) == 4


def edited(name, **fields):
    """Return a change that writes one image slice anew with other header fields."""

    def change(files):
        k = int(name.rsplit("_", 1)[1])
        pixels = np.ascontiguousarray(body_and_liver()[0][:, :, k].T)
        header = {"position": (0, 0, 2 * k), "number": k} | fields
        files[name] = dicom(pixels, **header)

    return change


def without(text):
    def change(files):
        for path in [path for path in files if text in path]:
            del files[path]

    return change


def replaced(path, content):
    def change(files):
        files[path] = content

    return change


CT = "PATIENT_DICOM/image_3"
MASK = "MASKS_DICOM/liver/image_3"
SMALL = dicom(np.zeros((8, 8), np.uint8), (0, 0, 6), 3)
FILE_ERRORS = {
    "no mask folder": (without("MASKS_DICOM"), "no slices of this patient in MASKS_DICOM/liver"),
    "no liver": (without("liver"), "no slices of this patient in MASKS_DICOM/liver"),
    "a mask slice less": (without(MASK), "liver has 5 slices, but the CT 6"),
    "no CT": (without("PATIENT"), "no slices of this patient in PATIENT_DICOM"),
    "a slice missing": (without("image_3"), "image_2 and image_4 lie 4 mm apart"),
    "a single slice": (lambda files: [without(f"_{k}")(files) for k in range(1, 6)], "only slice"),
    "a slice twice": (edited(CT, position=(0, 0, 4)), "image_2 and image_3 lie 0 mm apart"),
    "two series": (
        lambda files: files.update({"PATIENT_DICOM/b/image_3": files[CT], CT: files[CT]}),
        "image_3 lie 0 mm apart and other neighbours 2 mm",
    ),
    "two orientations": (edited(CT, orientation=(0, 1, 0, 1, 0, 0)), "along [0.0, 1.0, 0.0, 1.0"),
    "two spacings": (edited(CT, spacing=(2, 1)), "image_3 is 32 x 32 pixels of 2.0 x 1.0 mm"),
    "two sizes": (replaced(CT, SMALL), "image_3 is 8 x 8 pixels of 1.0 x 1.0 mm"),
    "no position": (edited(CT, ImagePositionPatient=None), "has no ImagePositionPatient"),
    "no orientation": (edited(CT, ImageOrientationPatient=None), "no ImageOrientationPatient"),
    "no spacing": (edited(CT, PixelSpacing=None), "has no PixelSpacing"),
    "beyond 16 bits": (edited(CT, RescaleSlope=100), "-100000 to 70000 HU, wanted 16 bits"),
    "no DICOM": (
        replaced(CT, b"not at all"),
        "image_3 cannot be read as a whole file (InvalidDicomError",
    ),
    "cut off": (
        lambda files: files.update({CT: files[CT][:-9]}),
        "image_3 cannot be read as a whole file (",
    ),
    "another mask size": (replaced(MASK, SMALL), "is 8 x 8 pixels, but the CT 32 x 32"),
    "a mask elsewhere": (
        replaced(MASK, dicom(np.zeros((32, 32), np.uint8), (0, 0, 99), 44)),
        "neither positions nor InstanceNumbers",
    ),
    "an empty mask": (
        lambda files: files.update(patient(body_and_liver()[0], liver=np.zeros((32, 32, 6)))),
        "marks no liver",
    ),
    "in colour": (edited(CT, SamplesPerPixel=3), "image_3 cannot be read as a whole file ("),
    "two frames": (edited(CT, NumberOfFrames=2, Rows=16), "image_3 is 2 x 16 x 32 pixels"),
}


@pytest.mark.parametrize("name", FILE_ERRORS)
def test_files_that_do_not_fit_are_named_in_one_sentence_and_others_go_on(
    raw, tmp_path, capsys, name
):
    change, sentence = FILE_ERRORS[name]
    files = patient()
    change(files)
    put(tmp_path / "3Dircadb1" / "3Dircadb1.1", files)
    put(tmp_path / "3Dircadb1" / "3Dircadb1.2", patient())
    assert run("--from", tmp_path / "3Dircadb1", "--patients", 1, 2) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if sentence in line]
    assert len(said) == 1
    assert said[0].startswith("patient 1 failed: ")
    assert names(raw, "train") == [name.format(2) for name in NAMES]
    assert leftovers(raw) == []
    table = pd.read_csv(raw / "ircad.csv")
    assert table["verdict"].tolist() == ["failed", "ok"]
    assert sentence in table["why"][0]


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a/../../evil", "C:/evil", "..\\evil"])
def test_paths_in_a_zip_that_lead_out_of_it_lead_nowhere(raw, tmp_path, path):
    content = zipped(as_shipped(patient()) | {path: b"evil"})
    put(tmp_path, {"3Dircadb1.zip": content})
    assert run("--from", tmp_path / "3Dircadb1.zip") == 0
    assert names(raw, "train") == [name.format(1) for name in NAMES]
    assert leftovers(raw) == [] == list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"3Dircadb1.zip": b"<html>"}, "3Dircadb1.zip cannot be read as a whole file (BadZipFile"),
        ({"3Dircadb1.zip": zipped({"a/b": b"c"})}, "holds no PATIENT_DICOM: wanted 3Dircadb1.zip"),
        (
            {"3Dircadb1.zip": one[:-30] if (one := zipped({"a": b"b"})) else b""},
            "cannot be read as",
        ),
    ],
)
def test_a_source_without_patients_is_one_sentence(raw, tmp_path, capsys, content, sentence):
    put(tmp_path / "x", content)
    assert run("--from", tmp_path / "x" / "3Dircadb1.zip") == 1
    assert sentence in capsys.readouterr().err
    assert run("--from", tmp_path / "x") == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert leftovers(raw) == []


def test_a_damaged_slice_in_a_zip_is_found_by_its_checksum(raw, tmp_path, capsys):
    content = bytearray(zipped(under("3Dircadb1.1", patient()), 0))
    content[content.index(b"\x00\x00\xff\xfc") if b"\x00\x00\xff\xfc" in content else 5000] ^= 1
    put(tmp_path, {"3Dircadb1.zip": bytes(content)})
    assert run("--from", tmp_path / "3Dircadb1.zip", "--patients", 1) == 1
    assert "Bad CRC-32" in capsys.readouterr().out
    assert leftovers(raw) == [] == names(raw, "train")


@pytest.mark.parametrize(
    "options",
    [
        ("--from", "nowhere"),
        ("--patients", "0"),
        ("--patients", "21"),
        ("--test", "x"),
        ("--patients",),
    ],
)
def test_a_bad_option_is_answered_with_one_sentence(raw, capsys, options):
    assert run(*options) == 2
    assert (
        f"error: {'--from nowhere' if 'nowhere' in options else 'argument'}"
        in capsys.readouterr().err
    )
    assert not (raw / ".ircad").exists()


@pytest.mark.parametrize("where", ["image", "table"])
def test_a_full_disk_is_one_sentence_and_the_next_run_goes_on(
    raw, tmp_path, capsys, monkeypatch, where
):
    source = put(tmp_path / "3Dircadb1.1", patient())

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        if where == "image":
            disk.setattr(ircad.nib, "save", full)
        else:
            disk.setattr(ircad.pd.DataFrame, "to_csv", full)
        assert run("--from", source) == 1
    assert "raw/ircad.py: the disk is full" in capsys.readouterr().err
    assert leftovers(raw) == []
    assert run("--from", source) == 0


def test_a_file_that_lacks_its_partner_is_never_overwritten(raw, tmp_path, capsys):
    source = put(tmp_path / "3Dircadb1.1", patient())
    mine = raw / "train" / NAMES[0].format(1)
    mine.write_text("mine")
    assert run("--from", source) == 1
    assert "would be overwritten: take it away" in capsys.readouterr().out
    assert mine.read_text() == "mine"
    assert names(raw, "train") == [mine.name]


@pytest.mark.parametrize("name", range(2))
def test_stopped_between_the_names_it_leaves_neither_file(raw, tmp_path, capsys, monkeypatch, name):
    source, replace = put(tmp_path / "3Dircadb1.1", patient()), volumes.os.replace

    def stop(here, there):
        replace(here, there)
        if there.name == NAMES[name].format(1):
            raise KeyboardInterrupt

    with monkeypatch.context() as interruption:
        interruption.setattr(volumes.os, "replace", stop)
        assert run("--from", source) == 1
    assert "interrupted, the same command goes on" in capsys.readouterr().err
    assert names(raw, "train") == leftovers(raw) == []
    assert run("--from", source) == 0


def test_killed_between_the_names_it_goes_on(raw, tmp_path):
    source = put(tmp_path / "3Dircadb1.1", patient())
    run("--from", source)
    (raw / "train" / NAMES[1].format(1)).unlink()
    assert run("--from", source) == 0
    assert names(raw, "train") == [name.format(1) for name in NAMES]


def test_the_table_says_what_the_files_hold(raw, tmp_path, capsys):
    files = patient()
    run("--from", put(tmp_path / "3Dircadb1.1", files))
    row = pd.read_csv(raw / "ircad.csv").iloc[0]
    assert row.drop("why").to_dict() == {
        "patient": 1,
        "split": "train",
        "slices": 6,
        "with_liver": 3,
        "spacing_mm": "1 x 1 x 2",
        "liver_ml": 1,  # 10 x 10 x 3 voxels of 2 cubic mm are 0.6 ml
        "liver_hu": 100,
        "side": "right",
        "verdict": "ok",
    }
    said = capsys.readouterr().out
    assert "spacing_mm" in said
    assert said.count("CC BY-NC-ND 4.0") == said.count("L. Soler et al.") == 1
    assert said.endswith("next: python data.py\n")


def mirrored():
    image, liver = body_and_liver()
    return patient(image[::-1], liver=liver[::-1])


def fatty():
    image, liver = body_and_liver()
    return patient(np.where(liver, -40, image).astype(np.int16), liver=liver)


@pytest.mark.parametrize(
    ("make", "limits", "why"),
    [
        (patient, {"SLICES": (129,) * 20}, "6 slices instead of 129"),
        (patient, {"LIVER_ML": (200, 4000)}, "a liver of 1 ml"),
        (fatty, {}, "a liver of -40 HU"),
        (mirrored, {}, "a liver on the left"),
    ],
)
def test_an_odd_patient_is_named_and_stays(raw, tmp_path, capsys, monkeypatch, make, limits, why):
    for name, value in limits.items():
        monkeypatch.setattr(ircad, name, value)
    source = put(tmp_path / "3Dircadb1.1", make())
    for _ in range(2):  # also when it is there already
        assert run("--from", source) == 1
        assert f"patient 1 odd: {why}" in capsys.readouterr().out
    assert len(names(raw, "train")) == 2


def test_a_file_that_was_damaged_later_is_named(raw, tmp_path, capsys):
    source = put(tmp_path / "3Dircadb1.1", patient())
    run("--from", source)
    path = raw / "train" / NAMES[1].format(1)
    path.write_bytes(path.read_bytes()[:-40])
    assert run("--from", source) == 1
    said = capsys.readouterr().out
    assert f"patient 1 failed: raw/train/{path.name} or its mask cannot be read" in said


def test_the_known_counts_are_those_of_twenty_patients():
    assert len(ircad.SLICES) == 20
    assert sum(ircad.SLICES) == 2823


class Server:
    """A server on this machine that gives, patient by patient, the answers in a list."""

    def __init__(self, answers):
        self.answers = {number: list(kinds) for number, kinds in answers.items()}
        self.asked = []
        self.halfway, self.go_on = threading.Event(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                (path,) = parse_qs(urlparse(self.path).query)["path"]
                number = int(path.removeprefix("/3Dircadb1."))
                server.asked.append(number)
                server.answer(self, number, server.answers[number].pop(0))

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/s/share/download"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request, number, kind):
        body = zipped(as_shipped(patient(), number))
        if isinstance(kind, int):
            request.send_error(kind)
            return
        request.send_response(200)
        if kind == "html":
            body = b"<!DOCTYPE html><title>Nextcloud</title>"
        request.send_header("Content-Type", "text/html" if kind == "html" else "application/zip")
        if kind != "cut without length" and kind != "without length":
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if kind == "damaged":
            body = body[:900] + bytes([body[900] ^ 255]) + body[901:]
        request.wfile.write(body[: len(body) // 2])
        if kind == "wait":
            self.halfway.set()
            self.go_on.wait(30)
        if not str(kind).startswith("cut"):
            request.wfile.write(body[len(body) // 2 :])

    def close(self):
        self.go_on.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def serve():
    servers = []

    def start(answers):
        servers.append(Server(answers))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_patients_are_downloaded_one_by_one_and_the_zips_are_not_kept(raw, serve):
    server = serve({1: ["zip"], 14: ["without length"]})
    assert run("--url", server.url, "--patients", 1, 14) == 0
    assert server.asked == [1, 14]
    assert names(raw, "train") == [name.format(1) for name in NAMES]
    assert names(raw, "test") == [name.format(14) for name in NAMES]
    np.testing.assert_array_equal(arrays(raw)[0], body_and_liver()[0][:, ::-1])
    assert leftovers(raw) == []
    assert run("--url", server.url, "--patients", 1, 14) == 0
    assert server.asked == [1, 14]  # nothing is fetched twice


def test_kept_zips_serve_a_later_run(raw, serve):
    server = serve({1: ["zip"]})
    assert run("--url", server.url, "--patients", 1, "--keep") == 0
    shutil.rmtree(raw / "train")
    assert run("--url", server.url, "--patients", 1) == 0
    assert run("--url", server.url, "--patients", 1) == 0
    assert server.asked == [1]


def test_kept_zips_survive_a_run_that_reads_them_or_another_source(raw, serve, tmp_path):
    server = serve({1: ["zip"]})
    assert run("--url", server.url, "--patients", 1, "--keep") == 0
    kept = raw / ".ircad" / "3Dircadb1.1.zip"
    for source in (raw / ".ircad", put(tmp_path / "3Dircadb1.1", patient())):
        shutil.rmtree(raw / "train")
        assert run("--from", source, "--patients", 1) == 0
        assert kept.exists()


@pytest.mark.parametrize("trouble", [500, 503, 429, "cut", "cut without length", "damaged"])
def test_trouble_that_passes_is_waited_out_with_growing_pauses(
    raw, serve, trouble, monkeypatch, capsys
):
    pauses = []
    monkeypatch.setattr(ircad, "PAUSES_S", (2, 4, 8))
    monkeypatch.setattr(ircad.time, "sleep", pauses.append)
    server = serve({1: [trouble] * 3 + ["zip"]})
    assert run("--url", server.url, "--patients", 1) == 0
    assert pauses == [2, 4, 8]
    assert capsys.readouterr().out.count("trying again") == 3
    assert leftovers(raw) == []


@pytest.mark.parametrize(
    ("answers", "asked", "sentence"),
    [
        (["cut"] * 4, 4, "gives no whole zip"),
        (["cut without length"] * 4, 4, "gives no whole zip"),
        (["damaged"] * 4, 4, "gives no whole zip"),
        ([404], 1, "(404 Not Found)"),
        (["html"], 1, "answers with text/html, no zip"),
    ],
)
def test_a_patient_who_does_not_come_is_named_and_the_others_go_on(
    raw, serve, capsys, answers, asked, sentence
):
    server = serve({1: answers, 2: ["zip"]})
    assert run("--url", server.url, "--patients", 1, 2) == 1
    assert server.asked == [1] * asked + [2]
    (said,) = (line for line in capsys.readouterr().out.splitlines() if "patient 1 failed" in line)
    assert sentence in said
    assert said.endswith("use --from")
    assert names(raw, "train") == [name.format(2) for name in NAMES]
    assert leftovers(raw) == []


def test_a_server_that_is_down_is_not_asked_for_twenty_patients(raw, serve, capsys, monkeypatch):
    server = serve({1: ["zip"], 2: [503] * 4})
    assert run("--url", server.url) == 1
    assert server.asked == [1] + [2] * 4
    assert "patient 2 failed" in capsys.readouterr().out
    assert names(raw, "train") == [name.format(1) for name in NAMES]
    server.close()
    assert run("--url", server.url) == 1
    said = capsys.readouterr().out
    assert "patient 2 failed" in said
    assert "patient 3" not in said


def test_a_server_that_says_nothing_more_is_given_up(raw, serve, capsys, monkeypatch):
    monkeypatch.setattr(ircad, "TIMEOUT_S", (5, 0.05))
    monkeypatch.setattr(ircad, "PAUSES_S", (0,))
    server = serve({1: ["wait", "wait"]})
    assert run("--url", server.url, "--patients", 1) == 1
    assert "patient 1 failed: " in capsys.readouterr().out
    assert server.asked == [1, 1]
    assert leftovers(raw) == []


def test_a_disk_that_fills_while_downloading_is_one_sentence(raw, serve, capsys, monkeypatch):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ircad, "open", lambda *_: Full(), raising=False)
    assert run("--url", serve({1: ["zip"]}).url) == 1
    assert "the disk is full" in capsys.readouterr().err


def copy_script(folder):
    """Copy the script, and the modules that it needs."""
    for name in ("ircad.py", "dicom.py", "volumes.py"):
        shutil.copy(REPO / "raw" / name, folder)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_in_a_download_it_goes_on_with_what_is_missing(raw, serve, stop):
    copy_script(raw)
    server = serve({1: ["zip"], 2: ["wait", "zip"]})
    options = ["--url", server.url, "--patients", "1", "2"]
    process = subprocess.Popen(
        [sys.executable, "-B", "raw/ircad.py", *options],
        cwd=raw.parent,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert server.halfway.wait(60)
    process.send_signal(stop)
    said = process.communicate(timeout=60)[1].splitlines()
    assert names(raw, "train") == [name.format(1) for name in NAMES]
    if stop != signal.SIGKILL:
        assert process.returncode == 1
        assert said[-1].endswith("interrupted, the same command goes on with what is missing")
    for script in raw.glob("*.py"):
        script.unlink()
    assert run(*options) == 0
    assert server.asked == [1, 2, 2]
    assert len(names(raw, "train")) == 4
    assert leftovers(raw) == []


def test_killed_while_writing_it_clears_the_halves_away(raw, tmp_path):
    (raw / ".ircad").mkdir()
    for half in (raw / "test" / ".ircad_e14_orig.nii.gz", raw / ".ircad" / ".3Dircadb1.2.zip"):
        half.write_text("half")
    (raw / "train" / "volume-9.nii.part").write_text("a browser's download")
    assert run("--from", put(tmp_path / "3Dircadb1.1", patient())) == 0
    assert (raw / "train" / "volume-9.nii.part").read_text() == "a browser's download"
    (raw / "train" / "volume-9.nii.part").unlink()
    assert leftovers(raw) == []


def test_importing_the_script_does_nothing(tmp_path):
    copy_script(tmp_path)
    command = [sys.executable, "-B", "-c", "import ircad"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "dicom.py",
        "ircad.py",
        "volumes.py",
    ]


@pytest.mark.skipif(
    not (SHARED_SCANS / "train" / "ircad_e01_orig.nii.gz").exists(),
    reason="needs patient 1 in ../shared/scans, which may not be redistributed",
)
def test_patient_1_comes_back_from_dicom_voxel_for_voxel(raw, tmp_path):
    """The DICOM files are made from 60 slices of the NIfTI, with a header like the real ones."""
    scans = [SHARED_SCANS / "train" / name.format(1) for name in reversed(NAMES)]
    wanted = [nib.load(path).slicer[:, :, 30:90] for path in scans]
    folder, noisy = tmp_path / "3Dircadb1.1", {"spacing": (0.5699999928474426,) * 2}
    parts = ("PATIENT_DICOM", wanted[0], 1), ("MASKS_DICOM/liver", wanted[1], 255)
    for part, scan, white in parts:
        volume = np.asarray(scan.dataobj)[:, ::-1] * scan.get_data_dtype().type(white)
        put(folder / part, stack(volume, (0, 0, 48), (0, 0, 1.600000023841858), **noisy))
    assert run("--from", folder) == 1  # six slices are expected here
    for found, expected in zip(load(raw), wanted, strict=True):
        np.testing.assert_allclose(found.affine, expected.affine, atol=1e-4)
        np.testing.assert_array_equal(
            np.asarray(nib.as_closest_canonical(found).dataobj),
            np.asarray(nib.as_closest_canonical(expected).dataobj),
        )
    row = pd.read_csv(raw / "ircad.csv").iloc[0]
    assert row["why"] == "60 slices instead of 6"
    assert row["with_liver"] == np.asarray(wanted[1].dataobj).any(axis=(0, 1)).sum() > 0
