"""raw/volumes.py: what is wrong with a file, which voxels are liver, and writing whole files."""

import gzip
import os
import types

import nibabel as nib
import numpy as np
import pytest
from conftest import OBLIQUE, body_and_liver, save

from raw import volumes

LPS = np.diag([-1.0, -1.0, 2.0, 1.0])  # the affine of hand-made scans


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
        volumes.read_voxels(path, 0)


def test_of_a_web_page_saved_as_a_scan_nothing_else_is_said(root, caplog):
    (root / "a_orig.nii.gz").write_bytes(b"<html>" * 100)
    with pytest.raises(ValueError, match="a_orig.nii.gz cannot be read as a whole file"):
        volumes.open_volume(root / "a_orig.nii.gz")
    assert caplog.records == []


def test_a_file_without_gzip_that_is_cut_short_is_named_too(root):
    path = save(root / "p1_orig.nii", body_and_liver()[0])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"^p1_orig.nii cannot be read as a whole file \(Value"):
        volumes.read_voxels(path, 0)


@pytest.mark.parametrize("name", ["p1_orig.nii", "p1_orig.nii.gz", "P1_ORIG.NII.GZ"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", ["i2", "f4", "f8"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_voxels_are_those_that_nibabel_reads(root, name, order, dtype, kind):
    image = kind(body_and_liver()[0][..., None], OBLIQUE, kind.header_class(endianness=order))
    image.set_data_dtype(dtype)
    image.header.set_slope_inter(2, -24)
    nib.save(image, root / name)
    stored, slope, inter, gaps = volumes.read_voxels(root / name, 0)
    assert (stored.shape, stored.dtype, slope, inter) == ((32, 32, 6), order + dtype, 2, -24)
    assert gaps == 0
    np.testing.assert_array_equal(stored, body_and_liver()[0])
    np.testing.assert_array_equal(stored * slope + inter, nib.load(root / name).get_fdata()[..., 0])


@pytest.mark.parametrize("name", ["p1_orig.nii", "p1_orig.nii.gz"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_is_read_by_what_it_is_and_not_by_its_name(root, name, zipped):
    path = save(root / "a.nii.gz", body_and_liver()[0], OBLIQUE)
    content = path.read_bytes() if zipped else gzip.decompress(path.read_bytes())
    (root / name).write_bytes(content)
    assert volumes.open_volume(root / name).shape == (32, 32, 6)
    np.testing.assert_array_equal(volumes.open_volume(root / name).affine, nib.load(path).affine)
    np.testing.assert_array_equal(volumes.read_image(root / name).voxels, body_and_liver()[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("order", "<>")
def test_voxels_without_a_number_are_air_and_counted(root, value, order):
    image = nib.Nifti1Image(body_and_liver()[0].astype(f"{order}f4"), LPS)
    image.dataobj[:2, 5, 5] = value
    image.header.set_slope_inter(2, -24)
    nib.save(image, root / "p1_orig.nii")
    with pytest.MonkeyPatch.context() as patched:  # half the range is no CT
        patched.setattr(volumes, "HU_SHARES", {})
        voxels, slope, inter, gaps = volumes.read_image(root / "p1_orig.nii")
    assert gaps == 2 and (voxels[:2, 5, 5] * slope + inter == -1000).all()
    np.testing.assert_array_equal(voxels[2:], body_and_liver()[0][2:])


def organs(share, below=-500, above=60):
    """Return a made-up CT (100, 100, 2) of which a share is below and the rest above."""
    image = np.full((100, 100, 2), above, np.int16)
    image.reshape(-1)[: round(share * image.size)] = below
    return image


RAW = body_and_liver()[0].astype(np.int16) + 1024  # what a scanner stores, 0 to 4095


def with_corner(image, columns, value):
    """Return an image whose first voxels, (columns, columns) in all slices, have another value."""
    changed = image.copy()
    changed[:columns, :columns] = value
    return changed


def around(image, value):
    """Return an image in which what lies outside the circle of the scanner has another value."""
    x, y = np.indices(image.shape[:2]) - 15.5
    return np.where((x**2 + y**2 > 15.5**2)[..., None], value, image)


NOT_HU = {
    "gray values": (body_and_liver()[0].clip(0, 255), "holds values from 0 to 255, wanted Houns"),
    "z-scored": ((body_and_liver()[0] - 200) / 500, "holds values from -2.4 to 1, wanted Houns"),
    "-1 to 1": (body_and_liver()[0] / 1000, "holds values from -1 to 0.7, wanted Hounsfield units"),
    "as stored": (RAW, "holds values from 24 to 1724, wanted .* of which 1% to 100% are fat and"),
    "as stored, one odd corner": (with_corner(RAW, 1, -2000), "holds values from -2000 to 1724"),
    "as stored, one corner of air": (with_corner(RAW, 3, -1000), "holds values .* not 0.88%"),
    "as stored, padded": (around(RAW, -2000), "holds values .* -100\\) and not 0%"),
    "as stored, padded with air": (around(RAW, -1000), "holds values .* bone and metal .* not 62%"),
    "shifted twice": (body_and_liver()[0] - 1024, "holds values from -2024 to -324, .* organs"),
    "all below zero": (body_and_liver()[0] - 2000, "holds values from -3000 to -1300, wanted"),
    "too little fat": (organs(0.009), "holds values from -500 to 60, .* and not 0.9%"),
    "too little organ": (organs(0.992), "holds values from -500 to 60, .* organs .* not 0.8%"),
    "wrapped into 8 bits": (
        body_and_liver()[0].astype(np.int8),  # air is 24
        "holds int8, wanted Hounsfield units, which 8 bits cannot hold",
    ),
    "too much bone": (organs(0.7, above=700), "holds values .* organs .* not 0%"),
}


@pytest.mark.parametrize("case", NOT_HU)
def test_an_image_that_is_not_in_hounsfield_units_is_refused(root, case):
    image, sentence = NOT_HU[case]
    path = save(root / "raw/train/p1.nii", image)
    with pytest.raises(ValueError, match=f"^raw/train/p1.nii {sentence}"):
        volumes.read_image(path)


HU = {
    "clipped as LiTS is": body_and_liver()[0].clip(-160, 240),
    "body alone": body_and_liver()[0][2:-2, 3:-3],  # 4 % of it air
    "a little fat": organs(0.011),
    "a little organ": organs(0.989),
    "padded": around(body_and_liver()[0], -3024),
    "fractions": body_and_liver()[0] + 0.3,
}


@pytest.mark.parametrize("case", HU)
def test_an_image_in_hounsfield_units_is_read(root, case):
    path = save(root / "raw/train/p1.nii", HU[case])
    np.testing.assert_array_equal(volumes.read_image(path).voxels, HU[case])


NO_MASKS = {
    "CT": (np.arange(32 * 32 * 6).reshape(32, 32, 6), "is no label mask, it holds values like 0, "),
    "negative labels": (body_and_liver()[0].clip(-1, 50), "is no label mask, .* like -1, 40, 50;"),
    "fractions": (
        np.where(body_and_liver()[0] > 90, body_and_liver()[0] / 700, 0),
        "is no label mask, it holds values like 0, 0.143, 1; wanted 0 for background and 1",
    ),
    "complex": (body_and_liver()[1].astype(np.complex64), "holds complex64, wanted"),
}


@pytest.mark.parametrize("case", NO_MASKS)
def test_what_is_no_mask_is_refused(root, case):
    volume, sentence = NO_MASKS[case]
    path = save(root / "raw/train/p1.nii", volume, dtype=volume.dtype.str.replace("i8", "i4"))
    with pytest.raises(ValueError, match=f"^raw/train/p1.nii {sentence}"):
        volumes.read_mask(path, "all")


def labelled(*labels, dtype=np.float32):
    """Return a mask (4, 4, 4) with a background of the first label and a row of each other."""
    mask = np.full((4, 4, 4), labels[0], dtype)
    for row, label in enumerate(labels[1:]):
        mask[row // 4, row % 4] = label
    return mask


LIVERS = {  # labels of a mask, --label, and which of its labels are liver; None if it is refused
    "0 and 1": ((0, 1), "", {1}),
    "0 and 255": ((0, 255), "", {255}),
    "0 and any value": ((0, 10.921457), "", {10.921457}),
    "0 and a fraction": ((0, 0.5), "", {0.5}),
    "0 and a tiny value": ((0, 1e-5), "", {1e-5}),
    "0 and below": ((0, -1), "", {-1}),
    "two without 0": ((1, 2), "", {2}),
    "two of either sign": ((-1, 1), "", {1}),
    "nothing": ((0,), "", set()),
    "LiTS": ((0, 1, 2), "", {1, 2}),
    "LiTS, scaled": ((0, 0.996, 2), "", {0.996, 2}),
    "LiTS, scaled otherwise": ((0, 1.004, 1.992), "", {1.004, 1.992}),
    "LiTS with dust": ((0, 1, 2, 3e-4, 1.0002), "", {1, 2, 1.0002}),
    "dust beside any value": ((0, 7.3, 1e-7), "", {7.3}),
    "four organs": ((0, 1, 2, 3, 4), "", None),
    "two organs": ((0, 1, 3), "", None),
    "two others": ((0, 2, 6), "", None),
    "three without 0": ((1, 2, 3), "", None),
    "one of four": ((0, 1, 2, 3, 4), "1", {1}),
    "another of four, scaled": ((0, 1.02, 1.99, 3.01, 4), "3", {3.01}),
    "liver without tumour": ((0, 1, 2), "1", {1}),
    "not there": ((0, 1, 2), "6", set()),
    "segments": ((0, 1, 2, 3, 4, 5, 6, 7, 8), "all", {1, 2, 3, 4, 5, 6, 7, 8}),
}


@pytest.mark.parametrize("case", LIVERS)
def test_liver_is_what_the_labels_or_the_option_say(root, case):
    labels, option, wanted = LIVERS[case]
    mask = labelled(*labels)
    path = save(root / "p1_liver.nii.gz", mask)
    if wanted is None:
        with pytest.raises(ValueError, match="^p1_liver.nii.gz holds [0-9] labels"):
            volumes.read_mask(path, option)
        return
    liver = np.isin(mask, np.float32([*wanted]))
    np.testing.assert_array_equal(volumes.read_mask(path, option), liver)


def test_organs_are_refused_with_their_sizes_and_with_what_to_run(root):
    path = save(root / "p1_liver.nii", labelled(0, 3, 1, 1, 6), np.diag([-10, -10, 5, 1]))
    with pytest.raises(ValueError) as refused:  # a row is 4 voxels of half a ml
        volumes.read_mask(path)
    assert str(refused.value) == (
        "p1_liver.nii holds 3 labels (1: 4.0 ml, 3: 2.0 ml, 6: 2.0 ml), wanted 0 and the liver, or "
        "LiTS's 0, 1 and 2: run `python data.py --label N` with the liver's, or `--label all` if "
        "all are (the liver in eight segments)"
    )


def test_a_whole_body_of_organs_is_refused_with_the_largest(root):
    mask = np.arange(105, dtype=np.uint8).repeat(3)[: 7 * 9 * 5].reshape(7, 9, 5)
    mask[mask == 5] = 6
    path = save(root / "p1_liver.nii", mask)
    with pytest.raises(ValueError, match=r"holds 103 labels \(6: 0.0 ml, ([^,]+, ){18}[^,]+\), w"):
        volumes.read_mask(path)


def test_voxels_of_a_mask_without_a_number_are_background_and_counted(root):
    mask = labelled(0, 1)
    mask[3] = np.nan
    liver = volumes.read_liver(save(root / "p1_liver.nii", mask))
    assert liver.gaps == 16 and liver.labels == [0, 1]
    np.testing.assert_array_equal(liver.voxels, labelled(0, 1) == 1)


@pytest.mark.parametrize("files", [{}, {"memory.max": "max"}, {"memory.max": "2000000000"}])
def test_free_memory_is_the_systems_or_what_a_container_leaves(tmp_path, monkeypatch, files):
    monkeypatch.setattr(volumes, "CGROUP", tmp_path)
    system = types.SimpleNamespace(available=10**10)
    monkeypatch.setattr(volumes.psutil, "virtual_memory", lambda: system)
    (tmp_path / "memory.stat").write_text("anon 500000000\nfile 1400000000\n")
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    limited = files.get("memory.max", "max") != "max"
    assert volumes.free_memory() == (1.5e9 if limited else 10**10)  # files in memory can go


@pytest.mark.parametrize("labels", [(1,), (255,), (1, 2)])
def test_every_label_above_zero_is_liver(root, labels):
    liver = body_and_liver()[1]
    values = liver * labels[0]
    values[6, 8, 3] = labels[-1]
    path = save(root / "p1_liver.nii.gz", values)
    np.testing.assert_array_equal(volumes.read_mask(path), liver > 0)


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
