"""Tests of raw/phantom.py: is it anatomy, is it no give-away, and are real scans safe from it?"""

import gzip
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import REPO
from scipy.ndimage import label

sys.path.insert(0, str(REPO / "raw"))
import phantom  # noqa: E402  raw/ has to be on the path first

MATRIX = 64
NUMBERS = range(1, 9)  # the default set: 6 to train, 2 to test


@pytest.fixture(scope="module")
def patients() -> dict[int, list[nib.Nifti1Image]]:
    """The default patients, small: number -> CT, mask."""
    return {number: phantom.make_patient(number, MATRIX, seed=0) for number in NUMBERS}


@pytest.fixture
def raw(tmp_path) -> Path:
    """A folder raw/ with nothing but the script in it, and the module that it needs."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for name in ("phantom.py", "volumes.py"):
        shutil.copy(REPO / "raw" / name, folder)
    return folder


def run(raw: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "raw/phantom.py", "--matrix", "32", *options]
    return subprocess.run(command, cwd=raw.parent, capture_output=True, text=True)


def names(raw: Path) -> dict[str, list[str]]:
    return {part: sorted(p.name for p in (raw / part).iterdir()) for part in ("train", "test")}


def contents(raw: Path) -> dict[Path, bytes]:
    files = (path for path in sorted(raw.rglob("*")) if path.is_file() and path.suffix != ".pyc")
    return {path: path.read_bytes() for path in files}


def world_centre(image: nib.Nifti1Image, inside: np.ndarray) -> np.ndarray:
    """Centroid in NIfTI's world: mm to the patient's right, front and head."""
    return nib.affines.apply_affine(image.affine, np.argwhere(inside).mean(axis=0))


def up(image: nib.Nifti1Image) -> np.ndarray:
    """The volume with its last axis from feet to head."""
    return np.asarray(nib.as_closest_canonical(image).dataobj)


def largest_piece(inside: np.ndarray) -> np.ndarray:
    pieces, count = label(inside)
    return pieces == np.bincount(pieces.ravel())[1:].argmax() + 1 if count else inside


def best_interval_dice(image: np.ndarray, mask: np.ndarray) -> float:
    """The Dice of somebody who knows the best of 91 HU intervals for this very patient."""
    scores = []
    for low in range(-10, 120, 10):
        for width in (20, 30, 40, 60, 80, 110, 150):
            guess = largest_piece((image >= low) & (image <= low + width))
            scores.append(2 * np.sum(guess & mask) / (guess.sum() + mask.sum()))
    return max(scores)


def test_no_hu_interval_gives_the_liver_away(patients):
    scores = [best_interval_dice(up(image), up(mask) > 0) for image, mask in patients.values()]
    assert np.mean(scores) < 0.75


def test_the_same_seed_gives_the_same_patient_and_another_seed_another():
    first, again, other = (phantom.make_patient(2, 32, seed) for seed in (0, 0, 1))
    assert first[0].to_bytes() == again[0].to_bytes()
    assert first[1].to_bytes() == again[1].to_bytes()
    assert first[0].to_bytes() != other[0].to_bytes()


def test_image_and_mask_share_one_grid_in_mm(patients):
    for image, mask in patients.values():
        assert image.shape == mask.shape
        assert MATRIX in image.shape
        np.testing.assert_array_equal(image.affine, mask.affine)
        for stored in (image, mask):
            np.testing.assert_allclose(stored.get_qform(), stored.get_sform(), atol=1e-3)
            assert stored.header["sform_code"] == stored.header["qform_code"] == 1
            assert stored.header.get_xyzt_units()[0] == "mm"


def test_voxels_are_hounsfield_units_and_masks_0_and_1(patients):
    for image, mask in patients.values():
        hu, inside = np.asarray(image.dataobj), np.asarray(mask.dataobj)
        assert hu.dtype == np.int16
        assert inside.dtype == np.uint8
        assert set(np.unique(inside)) == {0, 1}
        assert hu.min() >= -1024
        assert 300 < hu.max() <= 2000  # bone
        assert abs(np.percentile(hu, 5) + 1000) < 40  # air beside the patient
        assert 35 < np.median(hu[inside > 0]) < 120


def test_livers_have_a_human_volume(patients):
    for image, mask in patients.values():
        liver_ml = np.count_nonzero(mask.dataobj) * np.prod(image.header.get_zooms()) / 1000
        assert 600 < liver_ml < 3600


def test_the_liver_is_one_piece(patients):
    for _, mask in patients.values():
        assert label(np.asarray(mask.dataobj))[1] == 1


def test_the_liver_lies_to_the_right_of_the_spine_whatever_the_stored_axes(patients):
    for image, mask in patients.values():
        bone = world_centre(image, np.asarray(image.dataobj) > 250)
        liver = world_centre(mask, np.asarray(mask.dataobj) > 0)
        assert liver[0] - bone[0] > 20  # mm; NIfTI's x grows to the patient's right
        assert liver[1] - bone[1] > 20  # mm to the front


def test_spleen_stomach_and_aorta_lie_to_the_left_and_the_vena_cava_to_the_right():
    rng = np.random.default_rng(5)
    axes_mm, _ = phantom.place_grid(MATRIX, rng)
    labels = phantom.draw_labels(axes_mm, "none", rng)

    def left_mm(tissue):
        return axes_mm[0][np.argwhere(labels == phantom.LABEL[tissue])[:, 0]].mean()

    assert left_mm("liver") < left_mm("vena cava") < left_mm("spinal canal")
    assert left_mm("spinal canal") < left_mm("aorta") < left_mm("spleen")
    assert left_mm("spinal canal") < left_mm("gut content")


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PSR"])
def test_other_stored_axes_show_the_same_patient_in_the_same_place(monkeypatch, axes):
    monkeypatch.setattr(phantom, "OBLIQUE_AXES", "none")
    monkeypatch.setattr(phantom, "STORED_AXES", ("LAS",))
    usual = nib.as_closest_canonical(phantom.make_patient(1, 32, seed=0)[0])
    monkeypatch.setattr(phantom, "STORED_AXES", (axes,))
    stored = phantom.make_patient(1, 32, seed=0)[0]
    assert nib.aff2axcodes(stored.affine) == tuple(axes)
    other = nib.as_closest_canonical(stored)
    np.testing.assert_array_equal(np.asarray(usual.dataobj), np.asarray(other.dataobj))
    np.testing.assert_allclose(usual.affine, other.affine, atol=1e-3)


def test_train_and_test_both_hold_a_patient_with_other_axes(patients):
    axes = {number: nib.aff2axcodes(patients[number][0].affine) for number in NUMBERS}
    assert axes[1] == ("L", "A", "S")
    assert len({axes[number] for number in range(1, 7)}) > 1
    assert {axes[7], axes[8]} != {("L", "A", "S")}


def test_one_patient_lies_obliquely_in_the_scanner(patients):
    oblique = [np.abs(nib.affines.obliquity(image.affine)).max() for image, _ in patients.values()]
    assert sum(angle > 0.01 for angle in oblique) == 1


def test_there_are_slices_without_liver_above_all_livers_and_below_most(patients):
    with_liver = [up(mask).any(axis=(0, 1)) for _, mask in patients.values()]
    assert not any(slices[-2:].any() for slices in with_liver)
    assert sum(slices[:2].any() for slices in with_liver) <= 2  # a long right lobe may be cut
    assert min(slices.mean() for slices in with_liver) > 0.5


def test_patients_differ_in_size_slices_and_anatomy(patients):
    assert len({image.header.get_zooms() for image, _ in patients.values()}) == len(NUMBERS)
    assert len({up(image).shape[2] for image, _ in patients.values()}) >= 4
    volumes = [np.count_nonzero(mask.dataobj) for _, mask in patients.values()]
    assert max(volumes) > 1.2 * min(volumes)


@pytest.mark.parametrize("lesion", ["tumour", "cyst"])
def test_lesions_belong_to_the_liver(lesion):
    rng = np.random.default_rng(3)
    axes_mm, _ = phantom.place_grid(MATRIX, rng)
    labels = phantom.draw_labels(axes_mm, lesion, rng)
    lesions = [phantom.LABEL[tissue] for tissue in phantom.LESION_TISSUES]
    assert np.isin(labels, lesions).any()
    assert phantom.IN_LIVER[lesions].all()
    assert phantom.IN_LIVER[phantom.LABEL["hepatic vein"]]
    assert not phantom.IN_LIVER[phantom.LABEL["vena cava"]]
    assert label(phantom.IN_LIVER[labels])[1] == 1  # the lesions do not lie outside


def test_a_patient_does_not_depend_on_how_many_others_there_are(raw):
    assert run(raw, "--train", "2", "--test", "0").returncode == 0
    second = (raw / "train" / "phantom_02_orig.nii.gz").read_bytes()
    assert run(raw, "--train", "1", "--test", "1").returncode == 0
    assert (raw / "test" / "phantom_02_orig.nii.gz").read_bytes() == second


def test_names_are_numbered_on_from_train_to_test_and_the_next_command_is_printed(raw):
    done = run(raw, "--train", "2", "--test", "1")
    assert done.returncode == 0, done.stderr
    pairs = [[f"phantom_{n:02d}_{kind}.nii.gz" for kind in ("liver", "orig")] for n in (1, 2, 3)]
    assert names(raw) == {"train": pairs[0] + pairs[1], "test": pairs[2]}
    assert len(re.findall(r"^phantom_\d\d ", done.stdout, re.MULTILINE)) == 3
    assert done.stdout.endswith("next: python data.py\n")


def test_a_rerun_replaces_its_own_files_and_removes_those_left_over(raw):
    (raw / "train").mkdir()
    (raw / "train" / ".gitkeep").write_text("")
    assert run(raw, "--train", "2", "--test", "1").returncode == 0
    before = (raw / "train" / "phantom_01_orig.nii.gz").read_bytes()
    assert run(raw, "--train", "1", "--test", "0", "--seed", "4").returncode == 0
    own = ["phantom_01_liver.nii.gz", "phantom_01_orig.nii.gz"]
    assert names(raw) == {"train": [".gitkeep", *own], "test": []}
    assert (raw / "train" / "phantom_01_orig.nii.gz").read_bytes() != before


def real_scan(path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), path)


def broken_file(path: Path) -> None:
    path.write_bytes(b"not gzip at all")


def cut_file(path: Path) -> None:
    path.write_bytes(gzip.compress(bytes(400))[:15])


def folder_in_the_way(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("train/p03_orig.nii.gz", real_scan),
        ("test/p03_liver.NII", broken_file),
        ("train/phantom_01_orig.nii.gz", real_scan),  # only the name is ours
        ("test/phantom_01_orig.nii.gz", broken_file),
        ("train/phantom_02_liver.nii.gz", cut_file),
        ("train/phantom_03_liver.nii.gz", folder_in_the_way),
    ],
)
def test_a_file_it_did_not_make_stops_it_before_anything_is_written(raw, name, make):
    (raw / name).parent.mkdir()
    make(raw / name)
    before = contents(raw)
    done = run(raw)
    assert done.returncode != 0
    assert contents(raw) == before
    assert Path(name).name in done.stderr
    assert "data.py" in done.stderr  # what to do next
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_its_own_file_under_another_name_is_not_its_own(raw):
    assert run(raw, "--train", "1", "--test", "0").returncode == 0
    (raw / "train" / "phantom_01_orig.nii.gz").rename(raw / "train" / "mine_orig.nii.gz")
    before = contents(raw)
    assert run(raw, "--train", "1", "--test", "0").returncode != 0
    assert contents(raw) == before


def test_a_failed_write_leaves_no_half_written_file(tmp_path, monkeypatch):
    def fail(image, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(phantom.nib, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        phantom.write_patient(tmp_path, 1, 32, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [("--train", "0"), ("--test", "-1"), ("--matrix", "16"), ("--seed", "-1")]
)
def test_a_bad_option_is_answered_with_one_sentence(raw, options):
    done = run(raw, *options)
    assert done.returncode == 2
    assert f"error: {options[0]}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (raw / "train").exists()
