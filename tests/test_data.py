"""data.py on volumes small enough to work out by hand."""

import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import ALL_AXES, OBLIQUE, REPO, body_and_liver, dice, save, save_patient

import data
from raw import volumes

TRAIN_IMAGE, TRAIN_MASK = "raw/train/p1_orig.nii.gz", "raw/train/p1_liver.nii.gz"


def gray_of(hu):
    """Return the gray value that the window -160..240 HU gives: (hu + 160) / 400 * 255, rounded."""
    return {-1000: 0, 40: 128, 100: 166, 700: 255}[hu]


def upright_pictures():
    """Return what the hand-made patient looks like on 32 x 32 pixels: imgs and masks, by hand."""
    imgs = np.full((6, 32, 32), gray_of(-1000), np.uint8)
    masks = np.zeros((6, 32, 32), np.uint8)
    imgs[:, 4:28, 2:30] = gray_of(40)
    imgs[2:5, 6:16, 4:14] = gray_of(100)
    imgs[1:, 22:26, 20:24] = gray_of(700)
    masks[2:5, 6:16, 4:14] = 1
    return imgs, masks


def sliced(split="train", size=32, *options):
    """Run data.py and load what it wrote for a split."""
    data.main([f"--size={size}", *options])
    return data.load_data(split)


def save_volumes(root, image, liver, affine=None, liver_affine=None):
    """Write a training patient."""
    save(root / TRAIN_IMAGE, image, affine)
    save(root / TRAIN_MASK, liver, affine if liver_affine is None else liver_affine)


def written(root):
    """Return {name: content} of the files beside data.py, hidden ones too."""
    return {path.name: path.read_bytes() for path in root.iterdir() if path.is_file()}


@pytest.mark.parametrize("axes", ALL_AXES)
def test_every_storage_order_gives_the_same_upright_slices(root, axes):
    save_patient(root / "raw/train", axes=axes)
    imgs, masks, _ = sliced()
    expected_imgs, expected_masks = upright_pictures()
    np.testing.assert_array_equal(imgs, expected_imgs)
    np.testing.assert_array_equal(masks, expected_masks)


@pytest.mark.parametrize("axes", ALL_AXES)
def test_slices_go_back_onto_the_very_voxels_they_came_from(root, axes):
    path = save(root / TRAIN_MASK, body_and_liver()[1], OBLIQUE, axes)
    restored = data.restore(upright_pictures()[1], path)
    np.testing.assert_array_equal(restored, np.asarray(nib.load(path).dataobj))


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SRP"])
def test_an_oblique_volume_is_sliced_along_its_closest_axes(root, axes):
    save_patient(root / "raw/train", affine=OBLIQUE, axes=axes)
    np.testing.assert_array_equal(sliced().masks, upright_pictures()[1])


@pytest.mark.parametrize("axes", ["LPS", "RSA", "IPL"])
def test_a_volume_stands_upright_as_a_view_with_its_voxel_sizes(root, axes):
    path = save(root / "a_orig.nii.gz", body_and_liver()[0], np.diag([-0.7, -0.9, 3, 1]), axes)
    stored = np.asarray(nib.load(path).dataobj)
    stack, (shape, spacing_mm) = data.upright(stored, path), data.grid(path)
    np.testing.assert_array_equal(stack, body_and_liver()[0].transpose(2, 1, 0))
    assert np.shares_memory(stack, stored)
    assert shape.tolist() == [6, 32, 32] and spacing_mm == pytest.approx([3, 0.9, 0.7])


def test_gray_values_of_a_scan_stand_upright(root):
    path = save(root / "a_orig.nii.gz", body_and_liver()[0], axes="PIR")
    np.testing.assert_array_equal(data.read_gray(path), upright_pictures()[0])


def test_the_table_names_scan_patient_slice_liver_and_files(root):
    save_patient(root / "raw/train", "p1")
    save_patient(root / "raw/train", "p2", axes="LPI")
    (root / "raw/patients.csv").write_text("scan,patient\np2,Ada\n")
    slices = sliced("train", 32, "--label=1").slices
    columns = ["scan", "patient", "slice", "tilt", "liver", "image", "mask", "label"]
    assert list(slices.columns) == columns
    assert slices.scan.tolist() == ["p1"] * 6 + ["p2"] * 6
    assert slices.patient.tolist() == ["p1"] * 6 + ["Ada"] * 6
    assert slices.label.tolist() == ["1"] * 12
    assert slices.slice.tolist() == [0, 1, 2, 3, 4, 5] + [5, 4, 3, 2, 1, 0]
    assert slices.liver.tolist() == [0, 0, 1, 1, 1, 0] * 2
    for column, kind in (("image", "orig"), ("mask", "liver")):
        files = [root / f"raw/train/p{n}_{kind}.nii.gz" for n in (1, 2)]
        assert slices[column].unique().tolist() == files


def test_hounsfield_units_are_windowed_and_never_wrap():
    hu = np.array([-32768, -1000, -160, -100, 40, 240, 256, 3000, 32767], np.float32)
    assert data.to_gray(hu).tolist() == [0, 0, 0, 38, 128, 255, 255, 255, 255]


def test_rescale_slope_and_intercept_of_the_header_are_applied(root):
    image, liver = body_and_liver()
    stored = nib.Nifti1Image(((image.astype(np.int32) + 1024) // 2).astype(np.uint16), np.eye(4))
    stored.header.set_slope_inter(2, -1024)
    save(root / TRAIN_MASK, liver, np.eye(4))
    nib.save(stored, root / TRAIN_IMAGE)
    assert set(np.unique(sliced().imgs)) == {0, 128, 166, 255}


def test_shrinking_averages_and_does_not_skip_pixels(root):
    image, liver = body_and_liver((64, 64, 6))
    image[::2], image[1::2] = 0, 80  # HU in stripes of one pixel; their mean is 40 HU, gray 128
    image[:, 0] = -1000  # a row of air
    save_volumes(root, image, liver)
    assert (np.abs(sliced().imgs[:, 4:-4, 4:-4].astype(int) - 128) <= 1).all()


def test_masks_stay_binary_when_shrunk_and_keep_their_size(root):
    save_patient(root / "raw/train", shape=(64, 64, 6))
    masks = sliced().masks
    assert set(np.unique(masks)) == {0, 1}
    assert masks.sum() == 3 * 5 * 5  # 10 x 10 voxels in three slices, at half the size


def test_a_slice_that_is_not_square_is_centred_between_padding(root):
    save_patient(root / "raw/train", shape=(32, 24, 6))  # 32 columns, 24 rows
    imgs, masks, _ = sliced()
    assert not imgs[:, :4].any() and not imgs[:, 28:].any()
    np.testing.assert_array_equal(np.argwhere(masks[3])[[0, -1]], [[4 + 6, 4], [4 + 15, 13]])


def test_pixels_that_are_not_square_keep_their_proportions_in_mm(root):
    flat = np.diag([-1.0, -2.0, 2.0, 1.0])  # rows of 2 mm: 32 x 32 mm in all
    save_volumes(root, *body_and_liver((32, 16, 6)), flat)
    rows, columns = np.nonzero(sliced().masks[3])
    assert (rows.min(), rows.max()) == (12, 31)  # rows 6 to 15 of 2 mm
    assert (columns.min(), columns.max()) == (4, 13)


def test_rounding_in_the_masks_header_does_not_part_it_from_its_image(root):
    image, liver = body_and_liver((32, 24, 6))
    liver[:] = image == -1000
    affine = np.diag([-1, -1.0208, 2, 1])  # 24 rows fill 24 pixels, with 1.0209 they fill 25
    save_volumes(root, image, liver, affine, np.diag([-1, -1.0209, 2, 1]))
    imgs, masks, _ = sliced()
    assert (imgs[masks == 1] < 64).all()


def test_a_fourth_axis_of_one_frame_and_clipped_ct_are_sliced_too(root):
    image, liver = body_and_liver()
    save_volumes(root, np.clip(image, -160, 240)[..., None], liver)
    np.testing.assert_array_equal(sliced().imgs, upright_pictures()[0])


@pytest.mark.parametrize("shape", [(100, 100, 9), (90, 64, 9), (40, 52, 9)])
@pytest.mark.parametrize("axes", ["LAS", "PSR"])
def test_a_resampled_mask_comes_back_nearly_whole(root, shape, axes):
    places = np.indices(shape).T - (np.array(shape) - 1) / 2
    ball = ((places / (np.array(shape) * 0.4)) ** 2).sum(axis=-1).T < 1
    path = save(root / TRAIN_MASK, ball.astype(np.uint8), axes=axes)
    restored = data.restore(data.slice_mask(volumes.read_mask(path), path, 64), path)
    assert restored.dtype == np.uint8
    assert dice(restored, volumes.read_mask(path)) > 0.98


def test_probabilities_are_cut_at_one_half_on_the_way_back(root):
    path = save(root / TRAIN_MASK, body_and_liver()[1])
    masks = upright_pictures()[1]
    restored = data.restore(masks * np.float16(0.9), path)
    np.testing.assert_array_equal(restored, data.restore(masks, path))
    assert not data.restore(masks * np.float32(0.4), path).any()


def test_probabilities_are_interpolated_before_they_are_cut(root):
    path = save(root / TRAIN_MASK, np.zeros((16, 16, 1), np.uint8))
    stack = np.tile(np.float32([0.9, 0.9, 0.9, 0.2, 0.2, 0.2, 0.2, 0.2]), (1, 8, 1))
    # two voxels a pixel: the fourth pixel begins at voxel 6. The voxels beside that border have
    # 0.725 and 0.375, with 0.4 for 0.2 they have 0.775 and 0.525
    assert data.restore(stack, path)[:, 0, 0].tolist() == 6 * [1] + 10 * [0]
    stack[stack < 0.5] = 0.4
    assert data.restore(stack, path)[:, 0, 0].tolist() == 7 * [1] + 9 * [0]


def test_a_stack_of_another_scan_is_not_put_back(root):
    path = save(root / TRAIN_MASK, body_and_liver()[1])
    with pytest.raises(ValueError, match="^raw/train/p1_liver.nii.gz has 6 slices but 5"):
        data.restore(np.zeros((5, 32, 32)), path)


def headers_of(image):
    header = image.header
    codes = int(header["sform_code"]), int(header["qform_code"]), header.get_xyzt_units()
    return image.shape, nib.aff2axcodes(image.affine), codes, type(image)


@pytest.mark.parametrize("codes", [(1, 1), (2, 0), (0, 1), (0, 0)])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 1)])
def test_a_mask_has_the_header_of_its_scan(root, shape, kind, codes):
    scan = kind(np.full(shape, -1000, np.int16), OBLIQUE)
    scan.set_sform(OBLIQUE, codes[0])
    scan.set_qform(OBLIQUE, codes[1])
    scan.header.set_xyzt_units("mm", "sec")
    scan.header.set_slope_inter(2, -24)
    scan.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Doe^Jane"))
    scan.header["descrip"] = scan.header["aux_file"] = b"Doe^Jane"
    nib.save(scan, root / "a_orig.nii.gz")
    mask = np.zeros((5, 6, 7), bool)
    mask[1, 2, 3] = True
    data.write_mask(root / "a_liver.nii.gz", mask, root / "a_orig.nii.gz")
    scan, result = nib.load(root / "a_orig.nii.gz"), nib.load(root / "a_liver.nii.gz")
    assert headers_of(result) == headers_of(scan)
    np.testing.assert_array_equal(result.affine, scan.affine)
    np.testing.assert_array_equal(result.header.get_zooms(), scan.header.get_zooms())
    assert result.get_data_dtype() == np.uint8 and not result.header.extensions
    assert result.header["descrip"] == result.header["aux_file"] == b""
    np.testing.assert_array_equal(np.asarray(result.dataobj).reshape(5, 6, 7), mask)


def test_a_mask_of_another_shape_is_not_written(root):
    scan = save(root / "a_orig.nii.gz", body_and_liver()[0])
    with pytest.raises(ValueError, match="^a_orig.nii.gz is 32 x 32 x 6 but its mask is 6 x 32 x"):
        data.write_mask(root / "a_liver.nii.gz", np.zeros((6, 32, 32), bool), scan)
    assert not (root / "a_liver.nii.gz").exists()


def test_a_mask_is_written_whole_or_not_at_all(root, monkeypatch):
    image, liver = body_and_liver()
    scan = save(root / "a_orig.nii.gz", image)
    (root / "a_liver.nii.gz").write_bytes(b"of an earlier run")
    before = written(root)

    def disk_full(image, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(nib, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        data.write_mask(root / "a_liver.nii.gz", liver, scan)
    assert written(root) == before


def save_slope(root, shape=(40, 48, 30), affine=None, axes="LPS"):
    """Write a patient whose HU are -160 + x + 2 y + 3 z mm to the left, back and head.

    Counted from the first voxel; the liver is the voxels within 12 mm of the middle.
    """
    affine = np.diag([-1.0, -1.0, 2.0, 1.0]) if affine is None else affine
    x, y, z = (np.indices(shape).T * np.abs(np.diag(affine)[:3])).T
    middle_mm = (np.array(shape) - 1) / 2 * np.abs(np.diag(affine)[:3])
    liver = sum((a - m) ** 2 for a, m in zip((x, y, z), middle_mm, strict=True)) < 12**2
    slope = np.rint(-160 + x + 2 * y + 3 * z).astype(np.int16)
    save(root / TRAIN_IMAGE, slope, affine, axes)
    save(root / TRAIN_MASK, liver, affine, axes, np.uint8)


def lean(tilt):
    """Return the tilt's axis, rows and columns in mm along the patient's L, P and S."""
    cos, sin = np.cos(np.pi / 9), np.sin(np.pi / 9)
    return {
        1: ([0, sin, cos], [0, cos, -sin], [1, 0, 0]),  # towards the back
        2: ([sin, 0, cos], [0, 1, 0], [cos, 0, -sin]),  # towards the left
        3: ([0, -sin, cos], [0, cos, sin], [1, 0, 0]),
        4: ([-sin, 0, cos], [0, 1, 0], [cos, 0, sin]),
    }[tilt]


@pytest.mark.parametrize("tilt", [1, 2, 3, 4])
@pytest.mark.parametrize("spacing_mm", [(1, 1, 2), (0.5, 1.5, 3)])
def test_tilted_slices_hold_what_lies_there_in_mm(root, tilt, spacing_mm):
    save_slope(root, (48, 48, 30), np.diag([-spacing_mm[0], -spacing_mm[1], spacing_mm[2], 1]))
    hu = np.asarray(nib.load(root / TRAIN_IMAGE).dataobj)
    slices = list(data.cut(hu, root / TRAIN_IMAGE, [tilt], outside=-1000))
    numbers = data.slice_numbers(root / TRAIN_IMAGE, tilt)
    assert len(slices) == len(numbers) > 20
    upwards, back, left = (np.array(axis) for axis in lean(tilt))
    sides_mm = np.array(hu.shape) - 1
    for number, pixels in zip(numbers, slices, strict=True):
        row, column = np.indices(pixels.shape).astype(float)[..., None] - 23.5
        offset_mm = (number - 14.5) * spacing_mm[2] * upwards
        place_mm = offset_mm + row * spacing_mm[1] * back + column * spacing_mm[0] * left
        voxel = place_mm / spacing_mm + sides_mm / 2
        expected = -160 + (voxel * spacing_mm) @ [1, 2, 3]
        inside = ((voxel >= 0) & (voxel <= sides_mm)).all(axis=-1)
        assert np.abs(pixels - expected)[inside].max() < 1  # HU are stored rounded
        assert (pixels[((voxel < -0.5) | (voxel > sides_mm + 0.5)).any(axis=-1)] == -1000).all()


@pytest.mark.parametrize("axes", ALL_AXES)
def test_every_storage_order_gives_the_same_tilted_slices(root, axes):
    found = []
    for stored in ("LPS", axes):
        save_slope(root, axes=stored)
        imgs, masks, slices = sliced("train", 32, "--oblique=2")
        assert slices.tilt.unique().tolist() == [0, 1, 2]
        found.append((imgs[slices.tilt > 0].copy(), masks[slices.tilt > 0].copy()))
    np.testing.assert_array_equal(found[0][1], found[1][1])
    np.testing.assert_allclose(found[0][0].astype(int), found[1][0], atol=1)


def test_tilted_slices_of_a_ball_hold_the_same_ball(root):
    save_slope(root)
    _, masks, slices = sliced("train", 48, "--oblique=4")
    assert set(np.unique(masks)) == {0, 1}
    pixels = masks.sum(axis=(1, 2)).astype(int)
    for tilt in range(1, 5):
        axial = pixels[slices.tilt == 0].sum()
        assert pixels[slices.tilt == tilt].sum() == pytest.approx(axial, rel=0.03)
    middle = slices[(slices.slice == 15) & (slices.liver == 1)]
    assert sorted(middle.tilt) == [0, 1, 2, 3, 4]
    places = np.array([np.argwhere(masks[n]).mean(axis=0) for n in middle.index])
    np.testing.assert_allclose(places, 23.5, atol=1)  # the middle stays in the middle


def test_only_training_scans_are_cut_obliquely_and_the_table_says_so(root, capsys):
    save_slope(root)
    save_patient(root / "raw/test", "t")
    train, test = sliced("train", 32, "--oblique=1").slices, data.load_test_data().slices
    oblique = (train.tilt == 1).sum()
    assert len(train) == 30 + oblique and (test.tilt == 0).all()
    assert train.slice[train.tilt == 1].is_monotonic_increasing
    assert f"{oblique} oblique" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("height", "numbers"),
    [
        (200, range(5, 195)),  # worked out by hand: the ends leave it at the back
        (17, []),  # a plane of 100 mm that leans by 20 degrees takes 34 mm of height
        (18, range(18)),
    ],
)
def test_slices_that_leave_the_volume_for_the_larger_part_are_dropped(root, height, numbers):
    volume = np.full((100, 100, height), 40, np.uint8)
    path = save(root / "a_orig.nii", volume, np.diag([-1, -1, 1, 1]))
    for tilt in (1, 2, 3, 4):
        assert data.slice_numbers(path, tilt) == list(numbers)
        assert len(list(data.cut(volume, path, [tilt], outside=0))) == len(numbers)


def test_scans_with_and_without_masks_can_lie_side_by_side(root):
    save_patient(root / "raw/train")
    save_patient(root / "raw/test", "a")
    save_patient(root / "raw/test", "b", mask=False)
    imgs, masks, slices = sliced("test")
    np.testing.assert_array_equal(imgs[6:], upright_pictures()[0])
    np.testing.assert_array_equal(masks[:6], upright_pictures()[1])
    assert not masks[6:].any()
    assert slices.liver.tolist()[:6] == [0, 0, 1, 1, 1, 0] and slices.liver[6:].isna().all()
    assert slices["mask"].tolist() == [root / "raw/test/a_liver.nii.gz"] * 6 + [None] * 6


def test_only_test_needs_no_training_scans_and_no_masks(root):
    save_patient(root / "raw/test", "new", mask=False)
    imgs, _, slices = sliced("test", 32, "--only=test")
    assert len(imgs) == 6 and slices.liver.isna().all() and set(slices["mask"]) == {None}
    assert not (root / "imgs_train.npy").exists()


def test_no_test_scans_give_empty_arrays(root):
    save_patient(root / "raw/train")
    assert sliced("test").imgs.shape == (0, 32, 32)


def test_arrays_are_read_from_disk_and_not_into_memory(root):
    save_patient(root / "raw/train")
    imgs, masks, _ = sliced()
    assert isinstance(imgs, np.memmap) and isinstance(masks, np.memmap)


SPOILED = {  # a case for each step; all that a file can have is in test_volumes.py
    "no image": (
        lambda r: (r / TRAIN_IMAGE).unlink(),
        "raw/train/p1_liver.nii.gz has no image",
    ),
    "2-D image": (
        lambda r: save(r / TRAIN_IMAGE, body_and_liver()[0][..., 0]),
        "raw/train/p1_orig.nii.gz has the shape 32 x 32,",
    ),
    "mask of another scan": (
        lambda r: save(r / TRAIN_MASK, body_and_liver((32, 32, 5))[1]),
        "raw/train/p1_orig.nii.gz is 32 x 32 x 6 but its mask p1_liver.nii.gz is 32 x 32 x 5",
    ),
    "test image cut short": (
        lambda r: (r / "raw/test/t_orig.nii").write_bytes((r / TRAIN_IMAGE).read_bytes()[:-9]),
        "raw/test/t_orig.nii cannot be read as a whole file",
    ),
    "gray values for HU": (
        lambda r: save(r / TRAIN_IMAGE, body_and_liver()[0].clip(0, 255)),
        "raw/train/p1_orig.nii.gz holds values from 0 to 255, wanted Hounsfield units",
    ),
    "CT as mask": (
        lambda r: save(r / TRAIN_MASK, body_and_liver()[0]),
        "raw/train/p1_liver.nii.gz is no label mask",
    ),
    "organs for liver": (
        lambda r: save(r / TRAIN_MASK, organs()),
        "raw/train/p1_liver.nii.gz holds 3 labels (5: 0.6 ml, 1: 0.1 ml, 6: 0.1 ml), wanted 0 and",
    ),
    "mask moved": (
        lambda r: save(r / TRAIN_MASK, body_and_liver()[1], np.eye(4)),
        "raw/train/p1_orig.nii.gz and its mask p1_liver.nii.gz have affines that put one voxel",
    ),
    "a training scan for testing": (
        lambda r: save(r / "raw/test/x_orig.nii", body_and_liver()[0], axes="SRA"),
        "raw/test holds with x the voxels of p1 in raw/train, and a test on training patients",
    ),
    "a training patient for testing": (
        lambda r: (
            save_patient(r / "raw/test", "p2"),
            (r / "raw/patients.csv").write_text("scan,patient\np1,Ada\np2,Ada\n"),
        ),
        "raw/test/p2_orig.nii.gz and raw/train/p1_orig.nii.gz are of one patient, Ada, and a test",
    ),
    "patients without names": (
        lambda r: (r / "raw/patients.csv").write_text("scan,patient\np1,\n"),
        "raw/patients.csv says p1, in row 2, wanted a scan and its patient",
    ),
}


def organs():
    """Return a mask in which the liver is 5, with a slice each of two others beside it."""
    mask = body_and_liver()[1] * 5
    mask[16:20, 4:8, 2:5], mask[16:20, 12:16, 2:5] = 1, 6  # 48 voxels each
    return mask


@pytest.mark.parametrize(("label", "liver"), [("5", 300), ("6", 48), ("all", 396)])
def test_a_label_of_several_is_liver_when_it_is_said_which(root, label, liver):
    save_volumes(root, body_and_liver()[0], organs())
    _, masks, slices = sliced("train", 32, f"--label={label}")
    assert masks.sum() == liver and slices.label.unique().tolist() == [label]
    mask = volumes.read_mask(root / TRAIN_MASK, slices.label[0])
    assert mask.sum() == liver


def test_a_label_that_no_mask_holds_is_refused(root):
    save_volumes(root, body_and_liver()[0], organs())
    with pytest.raises(SystemExit, match="^data.py: raw/train holds no liver .* --label N$"):
        data.main(["--label", "2"])
    assert not (root / "imgs_train.npy").exists()


@pytest.mark.parametrize("axes", ["RAS", "LPI", "SRA"])
def test_a_mask_stored_along_other_axes_lies_where_its_affine_says(root, axes):
    image, liver = body_and_liver()
    save(root / TRAIN_IMAGE, image)
    save(root / TRAIN_MASK, liver, axes=axes)
    _, masks, slices = sliced("train", 32, "--mask-on-image-grid")  # which changes nothing here
    np.testing.assert_array_equal(masks, upright_pictures()[1])
    again = volumes.read_mask(root / TRAIN_MASK, "", slices.image[0])
    np.testing.assert_array_equal(again, liver)


def test_a_mask_lies_on_its_image_when_it_is_said_so(root, capsys):
    save_volumes(root, *body_and_liver(), liver_affine=np.eye(4))
    masks = sliced("train", 32, "--mask-on-image-grid").masks
    np.testing.assert_array_equal(masks, upright_pictures()[1])
    assert "p1: the mask's affine, 62 mm off, is set aside\n" in capsys.readouterr().out


def test_a_training_scan_without_liver_is_taken_and_said(root, capsys):
    save_patient(root / "raw/train", "a")
    save(root / TRAIN_IMAGE, body_and_liver()[0] - 1)
    save(root / TRAIN_MASK, body_and_liver()[1] * 0)
    _, masks, slices = sliced()
    assert slices.liver.tolist() == [0, 0, 1, 1, 1, 0] + [0] * 6 and not masks[6:].any()
    assert (
        "p1: no liver in its mask of labels 0, so all of its slices count as none\n"
        in capsys.readouterr().out
    )


def test_voxels_without_a_number_are_sliced_as_air(root, capsys):
    image, liver = body_and_liver()
    holes = image.astype(np.float32)
    holes[image == -1000] = np.nan
    save_volumes(root, holes, liver)
    np.testing.assert_array_equal(sliced().imgs, upright_pictures()[0])
    gaps = np.count_nonzero(image == -1000)
    assert f"p1: {gaps} voxels hold no number, they are air now\n" in capsys.readouterr().out


def test_each_scan_is_a_line_that_is_printed_and_kept(root, capsys):
    save_patient(root / "raw/train", "p1", affine=np.diag([-10.0, -10.0, 20.0, 1.0]))
    save_patient(root / "raw/train", "p22", axes="RSA")
    save_patient(root / "raw/test", "t", mask=False)
    data.main(["--size=32"])
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "raw/train",
        "scan  voxels       spacing_mm    axes  labels  liver_ml  liver_hu  side",
        "p1    32 x 32 x 6  10 x 10 x 20  LPS   0 1     600.0     100       right",
        "p22   32 x 6 x 32  1 x 2 x 1     RSA   0 1     0.6       100       right",
        "p22: a liver of 0.6 ml, wanted 200 to 4000",
        "p22: the voxels of p1 under another name, give both one patient in raw/patients.csv",
        "train: 2 scans, 12 slices of 32 x 32, 6 with liver",
        "raw/test",
        "scan  voxels       spacing_mm  axes  labels  liver_ml  liver_hu  side",
        "t     32 x 32 x 6  1 x 1 x 2   LPS   -       -         -         -",
        "test: 1 scans, 6 slices of 32 x 32, 0 with liver",
    ]
    table = pd.read_csv(root / "scans_train.csv", keep_default_na=False).set_index("scan")
    assert table.liver_ml.tolist() == [600, 0.6] and table.labels.tolist() == ["0 1", "0 1"]
    assert table.with_liver.tolist() == [3, 3]
    assert table.odd["p1"] == "" and table.odd["p22"].count("; ") == 1


def test_a_test_scan_is_compared_with_training_scans_that_were_sliced_before(root):
    save_patient(root / "raw/train")
    sliced()
    save(root / "raw/test/x_orig.nii", body_and_liver()[0])
    with pytest.raises(SystemExit, match="raw/test holds with x the voxels of p1 in raw/train"):
        data.main(["--only=test"])
    (root / TRAIN_IMAGE).unlink(), (root / TRAIN_MASK).unlink()
    data.main(["--only=test"])  # no longer a training scan


def test_all_scans_that_cannot_be_used_are_named_in_one_run(root):
    for name in "abcdef":
        save_patient(root / "raw/train", name)
    save(root / "raw/train/b_liver.nii.gz", body_and_liver()[1], np.eye(4))
    save(root / "raw/train/c_orig.nii.gz", body_and_liver((32, 32, 5))[0])
    save(root / "raw/train/d_orig.nii.gz", body_and_liver()[0] / 1000)
    (root / "raw/train/e_liver.nii.gz").unlink()
    save(root / "raw/train/f_orig.nii", body_and_liver()[0])
    save(root / "raw/test/t_orig.nii", body_and_liver()[0][..., 0])
    with pytest.raises(SystemExit) as stop:
        data.main(["--size=32"])
    lines = stop.value.code.splitlines()
    assert all(line.startswith("data.py: raw/t") for line in lines)
    faulty = sorted(line.split()[1].split("/")[2][0] for line in lines)
    assert faulty == ["b", "c", "d", "e", "f", "t"] and not written(root)


def test_a_name_that_the_terminal_cannot_print_does_not_stop_the_run(root):
    for name in ("data.py", "raw/volumes.py", "raw/scans.py"):
        (root / name).write_bytes((REPO / name).read_bytes())
    save_patient(root / "raw/train", "\u60a3\u8005")
    (root / "raw/train/\u60a3.txt").touch()
    run = subprocess.run(
        [sys.executable, "data.py", "--size=32"],
        cwd=root,
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0 and b"raw/train/\\u60a3.txt is left out" in run.stdout
    assert data.load_train_data().slices.scan.unique().tolist() == ["\u60a3\u8005"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_name_that_is_no_text_comes_back_from_the_table(root):
    name = os.fsdecode(b"M\xfcller")
    save_patient(root / "raw/train", name)
    slices = sliced().slices
    assert set(slices.scan) == {name} and slices.image[0].exists()


@pytest.mark.parametrize("case", SPOILED)
def test_bad_input_is_one_clear_sentence_and_leaves_the_last_arrays_alone(root, case):
    save_patient(root / "raw/train")
    sliced()
    before = written(root)
    spoil, sentence = SPOILED[case]
    spoil(root)
    with pytest.raises(SystemExit) as stop:
        data.main(["--size=16"])
    assert stop.value.code.startswith(f"data.py: {sentence}") and "\n" not in stop.value.code
    assert written(root) == before


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (KeyboardInterrupt(), "data.py: interrupted, the arrays of the last complete run are"),
        (MemoryError(), "data.py: out of memory: slice one volume at a time with --workers 1"),
        (OSError("No space left on device"), "data.py: No space left on device"),
    ],
)
@pytest.mark.parametrize("at", ["slice_mask", "list_slices"])
def test_a_run_that_fails_says_so_and_leaves_the_last_arrays_alone(
    root, monkeypatch, at, error, sentence
):
    save_patient(root / "raw/train")
    sliced()
    before = written(root)

    def fail(*_):
        raise error

    monkeypatch.setattr(data, at, fail)
    with pytest.raises(SystemExit, match=f"^{sentence}"):
        data.main(["--size=16"])
    assert written(root) == before


def test_the_command_line_fails_with_one_sentence_and_no_traceback(tmp_path):
    (tmp_path / "raw").mkdir()
    for name in ("data.py", "raw/volumes.py", "raw/scans.py"):
        (tmp_path / name).write_bytes((REPO / name).read_bytes())
    run = subprocess.run(
        [sys.executable, "data.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr.startswith("data.py: raw/train holds no volumes")
    assert run.stderr.count("\n") == 1 and "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        *((f"--size={size}", "no multiple of 16") for size in (100, 0, -16)),
        ("--size=large", "--size: invalid int value: 'large'"),
        *((f"--workers={number}", f"--workers {number}: wanted 1 or more") for number in (0, -1)),
        ("--workers=two", "--workers: invalid int value: 'two'"),
        *((f"--label={label}", f"--label {label}: wanted a number above 0") for label in "0x"),
        *((f"--oblique={number}", "--oblique: invalid") for number in ("-1", "5", "two")),
    ],
)
def test_an_option_that_cannot_be_is_refused(root, option, sentence, capsys):
    with pytest.raises(SystemExit):
        data.main([option])
    assert sentence in capsys.readouterr().err


def test_loading_before_slicing_says_what_to_run(root):
    with pytest.raises(FileNotFoundError, match=r"imgs_train.npy is missing: run `python data.py`"):
        data.load_train_data()


def test_a_table_of_an_earlier_version_is_refused(root):
    save_patient(root / "raw/train")
    sliced()
    table = root / "slices_train.csv"
    table.write_text(table.read_text().replace("tilt", "family"))
    with pytest.raises(ValueError, match="slice, family, liver.*, wanted .*: run `python data.py`"):
        data.load_train_data()


def test_arrays_that_do_not_belong_together_are_refused(root):
    save_patient(root / "raw/train")
    sliced()
    np.save(root / "masks_train.npy", np.zeros((5, 32, 32), np.uint8))
    with pytest.raises(ValueError, match="hold 6, 5 and 6 slices"):
        data.load_train_data()


def test_files_that_changed_or_came_after_they_were_sliced_are_named(root, capsys):
    save_patient(root / "raw/train")
    save_patient(root / "raw/test", "t1", mask=False)
    sliced()
    sliced_s = (root / "slices_test.csv").stat().st_mtime

    def said_when(path, modified_s):
        os.utime(path, (modified_s, modified_s))
        capsys.readouterr()
        data.load_train_data(), data.load_test_data()
        return capsys.readouterr().out

    image = root / "raw/test/t1_orig.nii.gz"
    assert said_when(image, sliced_s - 60) == ""
    newer = "raw/test/t1_orig.nii.gz is newer than its slices: run `python data.py` again\n"
    assert said_when(image, sliced_s + 60) == newer
    mask = save(root / "raw/test/t1_liver.nii.gz", body_and_liver()[1])
    more = "raw/test/t1_liver.nii.gz is not among the slices: run `python data.py` again\n"
    assert said_when(mask, sliced_s - 60) == more + newer


def test_a_test_scan_that_is_gone_is_refused_and_a_training_scan_is_not_missed(root):
    save_patient(root / "raw/train")
    save_patient(root / "raw/test", "t1")
    sliced()
    (root / TRAIN_IMAGE).unlink()
    assert len(data.load_train_data().imgs) == 6  # its slices are all that training needs
    (root / "raw/test/t1_orig.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="raw/test/t1_orig.nii.gz was sliced and is gone"):
        data.load_test_data()
