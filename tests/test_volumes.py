"""raw/volumes.py: names of scans, what is wrong with a file, and writing whole files."""

import gzip
import os

import nibabel as nib
import numpy as np
import pytest
from conftest import OBLIQUE, body_and_liver, save

from raw import volumes

LPS = np.diag([-1.0, -1.0, 2.0, 1.0])  # the affine of hand-made scans


def touch(root, *names):
    """Make empty files in raw/."""
    for name in names:
        (root / "raw" / name).touch()


def names_of(patients):
    return [(name, image.name, mask and mask.name) for name, image, mask in patients]


def test_pairs_are_made_by_name_whatever_case_and_order(root):
    touch(root, "train/B_ORIG.nii", "train/b_Liver.nii.gz", "test/new_v2_orig.nii")
    touch(root, "train/a_orig.nii.gz", "train/a_LIVER.NII.GZ")
    touch(root, "train/volume-10.nii", "train/segmentation-10.nii.gz")
    found = volumes.find_patients(None)
    assert names_of(found["train"]) == [
        ("a", "a_orig.nii.gz", "a_LIVER.NII.GZ"),
        ("B", "B_ORIG.nii", "b_Liver.nii.gz"),
        ("volume-10", "volume-10.nii", "segmentation-10.nii.gz"),
    ]
    assert names_of(found["test"]) == [("new_v2", "new_v2_orig.nii", None)]
    assert found["train"][0].image == root / "raw/train/a_orig.nii.gz"
    assert volumes.find_patients("test") == {"test": found["test"]}


@pytest.mark.parametrize("name", ["p1_bone.nii.gz", "p1_liver.nrrd", "p1_orig.nii.gz.part"])
def test_a_file_of_another_name_is_left_out_aloud_and_a_hidden_one_silently(root, name, capsys):
    touch(root, "test/p1_orig.nii", f"test/{name}", "test/.p2_orig.nii")
    assert names_of(volumes.find_patients("test")["test"]) == [("p1", "p1_orig.nii", None)]
    said = f"raw/test/{name} is left out: wanted NAME_orig.nii.gz or NAME_liver.nii.gz\n"
    assert capsys.readouterr().out == said


def test_no_test_scans_is_said(root, capsys):
    touch(root, "train/p1_orig.nii", "train/p1_liver.nii")
    assert volumes.find_patients(None)["test"] == []
    assert capsys.readouterr().out.startswith("raw/test holds no scans")


MISSING = {
    "no scans": (None, [], "raw/train holds no volumes .* `python raw/phantom.py` for"),
    "no test scans where they are wanted": (
        "test",
        ["train/p1_orig.nii", "train/p1_liver.nii"],
        "raw/test holds no volumes",
    ),
    "image without mask": (
        None,
        ["train/p1_orig.nii"],
        "raw/train/p1_orig.nii has no liver mask: put p1_liver.nii beside it",
    ),
    "mask without image": (
        None,
        ["train/segmentation-1.nii"],
        "raw/train/segmentation-1.nii has no image: put volume-1.nii beside it",
    ),
    "test mask without image": (
        "test",
        ["test/t_liver.nii.gz"],
        "raw/test/t_liver.nii.gz has no image: put t_orig.nii.gz beside it",
    ),
    "two images of a patient": (
        None,
        ["train/P1_orig.nii", "train/p1_orig.nii.gz"],
        "raw/train/p1_orig.nii.gz and P1_orig.nii are both the image of patient p1",
    ),
    "two masks of a patient": (
        None,
        ["train/p1_liver.nii", "train/p1_liver.nii.gz"],
        "raw/train/p1_liver.nii.gz and p1_liver.nii are both the mask of patient p1",
    ),
    "a patient in both splits, of which one is wanted": (
        "test",
        ["train/p1_orig.nii", "test/P1_orig.nii"],
        "raw/test/P1_orig.nii is of a patient that raw/train has too",
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_files_that_make_no_patients_are_named(root, case):
    only, names, sentence = MISSING[case]
    touch(root, *names)
    with pytest.raises((FileNotFoundError, ValueError), match=f"^{sentence}"):
        volumes.find_patients(only)


def test_a_folder_that_is_not_there_holds_no_scans(root):
    (root / "raw/train").rmdir()
    with pytest.raises(FileNotFoundError, match="^raw/train holds no volumes"):
        volumes.find_patients(None)


def leaning(degrees):
    """Return the affine of slices of 5 mm that lean from the feet towards the back."""
    affine = np.diag([-1.0, -1.0, 5.0, 1.0])
    affine[1, 2] = -5 * np.tan(np.radians(degrees))
    return affine


SHAPE = (5, 6, 7)
HEADERS = {  # shape, affine, unit of length, what is said, None if nothing
    "hand-made": (SHAPE, LPS, "mm", None),
    "oblique": (SHAPE, OBLIQUE, "mm", None),
    "one frame": ((*SHAPE, 1), LPS, "mm", None),
    "unit not said": (SHAPE, LPS, "unknown", None),
    "leaning by rounding": (SHAPE, leaning(7), "mm", None),
    "leaning gantry": (SHAPE, leaning(9), "mm", "has axes that are not at right angles, .* resam"),
    "2-D": (SHAPE[:2], LPS, "mm", "has the shape 5 x 6, wanted one 3-D volume"),
    "two frames": ((*SHAPE, 2), LPS, "mm", "has the shape 5 x 6 x 7 x 2, wanted one 3-D volume"),
    "no slices": ((5, 6, 0), LPS, "mm", "has the shape 5 x 6 x 0, wanted one 3-D volume"),
    "micrometres": (SHAPE, LPS, "micron", "gives its voxel sizes in micrometres, wanted mm"),
    "metres": (SHAPE, LPS, "meter", "gives its voxel sizes in metres, wanted mm"),
    "no thickness": (SHAPE, np.diag([-1, -1, 0, 1]), "mm", "has an affine that cannot be inverted"),
    "NaN": (SHAPE, np.diag([np.nan, -1, 2, 1]), "mm", "has an affine that cannot be inverted"),
}


@pytest.mark.filterwarnings("ignore:invalid value")  # of NaN, before it is refused
@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_would_mislead_is_refused(root, case):
    shape, affine, unit, sentence = HEADERS[case]
    image = nib.Nifti1Image(np.zeros(shape, np.uint8), None)  # so that nibabel takes any affine
    image.header.set_sform(affine, code=1)
    image.header.set_xyzt_units(unit)
    path = root / "raw/train/p1_orig.nii"
    nib.save(image, path)
    if sentence is None:
        volumes.check_header(path)
        return
    with pytest.raises(ValueError, match=f"^raw/train/p1_orig.nii {sentence}"):
        volumes.check_header(path)


def moved(mm):
    """Return the affine of hand-made scans, moved along their columns."""
    affine = LPS.copy()
    affine[0, 3] = mm
    return affine


APART = "a{1}_orig.nii and its mask a{1}_liver.nii have affines that put one voxel"
GRIDS = {  # shape and affine of a mask, what is said, None if nothing
    "the same": ((32, 32, 6), LPS, None),
    "rounded": ((32, 32, 6), np.diag([-1.0001, -1, 2, 1]), None),
    "one slice fewer": (
        (32, 32, 5),
        LPS,
        "a{1}_orig.nii is 32 x 32 x 6 but its mask a{1}_liver.nii is 32 x 32 x 5: export",
    ),
    "thicker slices": ((32, 32, 6), np.diag([-1, -1, 2.5, 1]), f"{APART} 2.5 mm apart"),
    "mirrored": ((32, 32, 6), np.diag([1, -1, 2, 1]), f"{APART} 62 mm apart"),
    "half a voxel apart": ((32, 32, 6), moved(0.5), f"{APART} 0.5 mm apart"),
    "2-D": ((32, 32), LPS, "a{1}_liver.nii has the shape 32 x 32, wanted one 3-D volume"),
}


@pytest.mark.parametrize("case", GRIDS)
def test_a_mask_on_another_grid_than_its_image_is_refused(root, case):
    shape, affine, sentence = GRIDS[case]
    image = save(root / "a{1}_orig.nii", body_and_liver()[0])
    mask = save(root / "a{1}_liver.nii", np.zeros(shape, np.uint8), affine)
    patient = volumes.Patient("a{1}", image, mask)
    if sentence is None:
        volumes.check_patient(patient)
        return
    with pytest.raises(ValueError) as refused:
        volumes.check_patient(patient)
    assert str(refused.value).startswith(sentence)


def test_a_header_without_orientation_is_said(root, capsys):
    path = root / "raw/test/t_orig.nii.gz"
    patient = volumes.Patient("t", path, None)
    volumes.check_patient(patient._replace(image=save(path, body_and_liver()[0])))
    assert capsys.readouterr().out == ""
    nib.save(nib.Nifti1Image(body_and_liver()[0], None), path)
    volumes.check_patient(patient)
    assert capsys.readouterr().out.startswith("raw/test/t_orig.nii.gz does not say how it lies")


def flipped(content, at):
    """Return bytes of which one is another."""
    changed = bytearray(content)
    changed[at] ^= 0xFF
    return bytes(changed)


DAMAGE = {
    "no NIfTI": lambda zipped: gzip.compress(b"<html>404 Not Found</html>" * 99),
    "no gzip": lambda zipped: b"<html>404 Not Found</html>" * 99,
    "empty": lambda zipped: b"",
    "cut short": lambda zipped: zipped[:-40],
    "cut short before it was zipped": lambda zipped: gzip.compress(gzip.decompress(zipped)[:2000]),
    "broken stream": lambda zipped: flipped(zipped, -60),
    "wrong checksum": lambda zipped: flipped(zipped, -6),
    "wrong length": lambda zipped: flipped(zipped, -1),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_named_in_one_line(root, case):
    path = save(root / "raw/train/p1_orig.nii.gz", body_and_liver()[0])
    path.write_bytes(DAMAGE[case](path.read_bytes()))
    with pytest.raises(ValueError, match=r"^raw/train/p1_orig.nii.gz cannot be read as a.*again$"):
        volumes.read_voxels(path)


def test_a_file_without_gzip_that_is_cut_short_is_named_too(root):
    path = save(root / "p1_orig.nii", body_and_liver()[0])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"^p1_orig.nii cannot be read as a whole file \(Value"):
        volumes.read_voxels(path)


@pytest.mark.parametrize("name", ["p1_orig.nii", "p1_orig.nii.gz", "P1_ORIG.NII.GZ"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["i2", "f4", "f8"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_voxels_are_those_that_nibabel_reads(root, name, order, dtype, kind):
    image = kind(body_and_liver()[0][..., None], OBLIQUE, kind.header_class(endianness=order))
    image.set_data_dtype(dtype)
    image.header.set_slope_inter(2, -24)
    nib.save(image, root / name)
    stored, slope, inter = volumes.read_image(root / name)
    assert (stored.shape, stored.dtype, slope, inter) == ((32, 32, 6), order + dtype, 2, -24)
    np.testing.assert_array_equal(stored, body_and_liver()[0])
    np.testing.assert_array_equal(stored * slope + inter, nib.load(root / name).get_fdata()[..., 0])


def image_with(value):
    image = body_and_liver()[0].astype(np.float32)
    image[5, 5, 5] = value
    return image


VALUES = {
    "NaN": (volumes.read_image, image_with(np.nan), "holds NaN or infinite values"),
    "infinite": (volumes.read_image, image_with(np.inf), "holds NaN or infinite values"),
    "complex": (volumes.read_image, image_with(0).astype(np.complex64), "holds complex64, wanted"),
    "gray values": (
        volumes.read_image,
        body_and_liver()[0].clip(0, 255),
        "holds values from 0 to 255, 0.00% of them below -100, wanted Hounsfield units",
    ),
    "shifted by 1024, with an odd corner": (
        volumes.read_image,
        np.where(np.arange(6144).reshape(32, 32, 6) < 9, -1024, body_and_liver()[0] + 1024),
        "holds values from -1024 to 1724, 0.15% of them below -100, wanted Hounsfield units",
    ),
    "brought to a mean of 0 and a deviation of 1": (
        volumes.read_image,
        ((body_and_liver()[0] + 250) / 500).astype(np.float32),
        "holds values from -1.5 to 1.9, 0.00% of them below -100, wanted Hounsfield units",
    ),
    "several organs": (  # voxels of 2 cubic mm: 300 of the liver, and 80 of bone as a kidney
        volumes.read_mask,
        (body_and_liver()[1] + 2 * (body_and_liver()[0] == 700) + 0).astype(np.uint8) * 2,
        "holds several organs, label: ml 2: 0.6, 4: 0.16; wanted one label, or LiTS's 1 and 2",
    ),
    "all below zero": (
        volumes.read_image,
        body_and_liver()[0] - 2000,
        "holds values from -3000 to -1300, 100.00% of them below -100, wanted Hounsfield units",
    ),
    "NaN in a mask": (
        volumes.read_mask,
        np.where(body_and_liver()[1], 1.0, np.nan),
        "holds NaN or infinite values",
    ),
    "CT as mask": (
        volumes.read_mask,
        np.arange(32 * 32 * 6, dtype=np.int16).reshape(32, 32, 6),
        "is no label mask, it holds values like 0, ",
    ),
    "a negative label": (volumes.read_mask, -body_and_liver()[1].astype(np.int8), "is no label"),
    "fractions as mask": (
        volumes.read_mask,
        body_and_liver()[1] * np.float32(0.5),
        "is no label mask, it holds values like 0, 0.5; wanted 0 for background and 1",
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_that_cannot_be_are_refused(root, case):
    read, volume, sentence = VALUES[case]
    path = save(root / "raw/train/p1.nii", volume)
    with pytest.raises(ValueError, match=f"^raw/train/p1.nii {sentence}"):
        read(path)


@pytest.mark.parametrize("labels", [(1,), (255,), (1, 2)])
def test_every_label_above_zero_is_liver(root, labels):
    liver = body_and_liver()[1]
    values = liver * labels[0]
    values[6, 8, 3] = labels[-1]
    path = save(root / "p1_liver.nii.gz", values)
    np.testing.assert_array_equal(volumes.read_mask(path), liver > 0)


def test_a_scan_that_is_clipped_to_the_window_is_still_in_hounsfield_units(root):
    clipped = body_and_liver()[0].clip(-160, 240)
    stored, _, _ = volumes.read_image(save(root / "p1_orig.nii", clipped))
    np.testing.assert_array_equal(stored, clipped)


def test_labels_that_scaling_has_bent_are_labels(root):
    liver = body_and_liver()[1]
    bent = liver * np.float32(0.996)
    bent[6, 8, 3] = 2
    np.testing.assert_array_equal(volumes.read_mask(save(root / "p1_liver.nii", bent)), liver > 0)


@pytest.mark.parametrize(
    ("sform", "qform", "sentence"),
    [
        (np.eye(4), np.eye(4), "has an identity affine, as if its own was lost"),
        (np.diag([-1, -1, 2, 1]), np.diag([1, -1, 2, 1]), "put one voxel 62 mm apart: the sform"),
    ],
)
def test_a_header_that_may_mislead_is_said(root, capsys, sform, qform, sentence):
    image = nib.Nifti1Image(body_and_liver()[0], sform)  # 32 voxels of 1 mm along x
    image.set_sform(sform, 1)
    image.set_qform(qform, 1)
    nib.save(image, root / "p1_orig.nii")
    volumes.check_patient(volumes.Patient("p1", root / "p1_orig.nii", None))
    assert sentence in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numerical_dust_in_a_mask_is_not_liver(root, dtype):
    dusty = body_and_liver()[1].astype(dtype)
    dusty[dusty == 0] = 3e-4
    path = save(root / "p1_liver.nii.gz", dusty)
    np.testing.assert_array_equal(volumes.read_mask(path), body_and_liver()[1] > 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32])
@pytest.mark.parametrize("label", [1, 2, 255])
def test_a_mask_that_was_scaled_when_it_was_saved_is_still_a_mask(root, dtype, label):
    image = nib.Nifti1Image(body_and_liver()[1] * float(label), LPS)
    image.set_data_dtype(dtype)  # nibabel then picks a slope that gives the labels back nearly
    nib.save(image, root / "p1_liver.nii.gz")
    mask = volumes.read_mask(root / "p1_liver.nii.gz")
    np.testing.assert_array_equal(mask, body_and_liver()[1] > 0)


def test_a_mask_that_is_stored_the_other_way_round_is_still_a_mask(root):
    image = nib.Nifti1Image(1 - body_and_liver()[1], LPS)
    image.header.set_slope_inter(-1, 1)
    nib.save(image, root / "p1_liver.nii")
    mask = volumes.read_mask(root / "p1_liver.nii")
    np.testing.assert_array_equal(mask, body_and_liver()[1] > 0)


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SRP"])
def test_what_a_volume_shows_keeps_its_place_on_other_axes(root, axes):
    image = volumes.as_nifti(body_and_liver()[0], OBLIQUE, axes)
    expected = nib.load(save(root / "p1_orig.nii", body_and_liver()[0], OBLIQUE, axes))
    np.testing.assert_array_equal(image.dataobj, expected.dataobj)
    np.testing.assert_allclose(image.affine, expected.affine)
    assert image.header["sform_code"] == image.header["qform_code"] == 1
    assert image.header.get_xyzt_units()[0] == "mm"


def contents(folder):
    """Return {name: content} of the files in a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def two(tmp_path):
    """Return two paths, of which the first has a file from an earlier run."""
    (tmp_path / "a.npy").write_bytes(b"old a")
    return tmp_path / "a.npy", tmp_path / "b.csv"


def write(drafts):
    for draft, content in zip(drafts, (b"new a", b"new b"), strict=True):
        draft.write_bytes(content)


def test_files_get_their_names_together(tmp_path, two):
    with volumes.whole(*two) as drafts:
        write(drafts)
        assert [path.name for path in tmp_path.glob("[!.]*")] == ["a.npy"]
        assert contents(tmp_path)["a.npy"] == b"old a"
    assert contents(tmp_path) == {"a.npy": b"new a", "b.csv": b"new b"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("begun", [0, 1, 2])
def test_what_fails_in_the_middle_leaves_nothing_behind(tmp_path, two, begun, error):
    with pytest.raises(error), volumes.whole(*two) as drafts:
        for draft in drafts[:begun]:
            draft.write_bytes(b"half")
        raise error
    assert contents(tmp_path) == {"a.npy": b"old a"}


@pytest.mark.parametrize("missing", [0, 1])
def test_a_file_that_was_not_written_keeps_the_others_from_their_names(tmp_path, two, missing):
    with pytest.raises(FileNotFoundError), volumes.whole(*two) as drafts:
        write(drafts)
        drafts[missing].unlink()
    assert contents(tmp_path) == {"a.npy": b"old a"}


@pytest.mark.parametrize("error", [PermissionError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize(("at", "written"), [(1, 2), (2, 2), (3, 2), (1, 0)])
def test_a_rename_that_fails_brings_back_what_stood_there(
    tmp_path, two, monkeypatch, at, written, after, error
):
    replace, targets = os.replace, []

    def fail_once(source, target):
        targets.append(target)
        if len(targets) != at or after:
            replace(source, target)
        if len(targets) == at:
            raise error

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(error), volumes.whole(*two) as drafts:
        for draft in drafts[:written]:
            draft.write_bytes(b"new")
    assert len(targets) >= at
    assert contents(tmp_path) == {"a.npy": b"old a"}


def test_what_cannot_be_brought_back_is_not_thrown_away(tmp_path, two, monkeypatch):
    replace = os.replace

    def fail_once_moved(source, target):
        if source != two[0]:
            raise PermissionError
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once_moved)
    with pytest.raises(PermissionError), volumes.whole(*two) as drafts:
        write(drafts)
    assert contents(tmp_path) == {".earlier-a.npy": b"old a"}


def test_what_a_killed_run_left_is_never_brought_back_and_cleared_by_the_next(
    tmp_path, two, monkeypatch
):
    for name in (".a.npy", ".earlier-a.npy", ".earlier-b.csv"):
        (tmp_path / name).write_bytes(b"of a killed run")
    replace = os.replace

    def held_open(source, target):
        if source == two[0]:
            raise PermissionError
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", held_open)
        with pytest.raises(PermissionError), volumes.whole(*two) as drafts:
            write(drafts)
    assert contents(tmp_path)["a.npy"] == b"old a" and not two[1].exists()
    with volumes.whole(*two) as drafts:
        write(drafts)
    assert contents(tmp_path) == {"a.npy": b"new a", "b.csv": b"new b"}
