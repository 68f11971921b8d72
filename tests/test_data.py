"""data.py on volumes small enough to work out by hand."""

import gzip
import itertools
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from conftest import REPO, body_and_liver, save, save_patient

import data

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


def dice(a, b):
    return 2 * np.logical_and(a, b).sum() / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.mark.parametrize("axes", ALL_AXES)
def test_every_storage_order_gives_the_same_upright_slices(root, axes):
    save_patient(root / "raw/train", axes=axes)
    data.main(["--size", "32"])
    imgs, masks, _ = data.load_train_data()
    expected_imgs, expected_masks = upright_pictures()
    np.testing.assert_array_equal(imgs, expected_imgs)
    np.testing.assert_array_equal(masks, expected_masks)


@pytest.mark.parametrize("axes", ALL_AXES)
def test_slices_go_back_onto_the_very_voxels_they_came_from(root, axes):
    path = save(root / "raw/train/p1_liver.nii.gz", body_and_liver()[1], OBLIQUE, axes)
    restored = data.restore(upright_pictures()[1], path)
    np.testing.assert_array_equal(restored, np.asarray(nib.load(path).dataobj))


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SRP"])
def test_an_oblique_volume_is_sliced_along_its_closest_axes(root, axes):
    save_patient(root / "raw/train", affine=OBLIQUE, axes=axes)
    data.main(["--size", "32"])
    np.testing.assert_array_equal(data.load_train_data().masks, upright_pictures()[1])


def test_the_table_names_patient_slice_liver_and_files(root):
    save_patient(root / "raw/train", "p1")
    save_patient(root / "raw/train", "p2", axes="LPI")
    data.main(["--size", "32"])
    slices = data.load_train_data().slices
    assert list(slices.columns) == ["patient", "slice", "family", "liver", "image", "mask"]
    assert slices.patient.tolist() == ["p1"] * 6 + ["p2"] * 6
    assert slices.slice.tolist() == [0, 1, 2, 3, 4, 5] + [5, 4, 3, 2, 1, 0]
    assert slices.liver.tolist() == [0, 0, 1, 1, 1, 0] * 2
    assert slices.image.unique().tolist() == [f"raw/train/p{n}_orig.nii.gz" for n in (1, 2)]
    assert slices["mask"].unique().tolist() == [f"raw/train/p{n}_liver.nii.gz" for n in (1, 2)]


def test_hounsfield_units_are_windowed_and_never_wrap():
    hu = np.array([-32768, -1000, -160, -100, 40, 240, 256, 3000, 32767], np.float32)
    assert data.to_gray(hu).tolist() == [0, 0, 0, 38, 128, 255, 255, 255, 255]


def test_rescale_slope_and_intercept_of_the_header_are_applied(root):
    image, liver = body_and_liver()
    stored = nib.Nifti1Image(((image.astype(np.int32) + 1024) // 2).astype(np.uint16), np.eye(4))
    stored.header.set_slope_inter(2, -1024)
    nib.save(stored, root / "raw/train/p1_orig.nii.gz")
    save(root / "raw/train/p1_liver.nii.gz", liver, np.eye(4))
    data.main(["--size", "32"])
    assert set(np.unique(data.load_train_data().imgs)) == {0, 128, 166, 255}


def test_shrinking_averages_and_does_not_skip_pixels(root):
    image, liver = body_and_liver((64, 64, 6))
    image[::2], image[1::2] = 0, 80  # HU in stripes of one pixel; their mean is 40 HU, gray 128
    image[0, 0] = -1000
    save(root / "raw/train/p1_orig.nii.gz", image)
    save(root / "raw/train/p1_liver.nii.gz", liver)
    data.main(["--size", "32"])
    imgs = data.load_train_data().imgs
    assert (np.abs(imgs[:, 4:-4, 4:-4].astype(int) - 128) <= 1).all()


def test_masks_stay_binary_when_shrunk_and_keep_their_size(root):
    save_patient(root / "raw/train", shape=(64, 64, 6))
    data.main(["--size", "32"])
    masks = data.load_train_data().masks
    assert set(np.unique(masks)) == {0, 1}
    assert masks.sum() == 3 * 5 * 5  # 10 x 10 voxels in three slices, at half the size


@pytest.mark.parametrize("labels", [(1,), (255,), (1, 2)])
def test_every_label_above_zero_is_liver(root, labels):
    image, liver = body_and_liver()
    values = liver * labels[0]
    values[6, 8, 3] = labels[-1]
    save(root / "raw/train/p1_orig.nii.gz", image)
    save(root / "raw/train/p1_liver.nii.gz", values)
    data.main(["--size", "32"])
    np.testing.assert_array_equal(data.load_train_data().masks, upright_pictures()[1])


def test_a_slice_that_is_not_square_is_centred_between_padding(root):
    save_patient(root / "raw/train", shape=(32, 24, 6))  # 32 columns, 24 rows
    data.main(["--size", "32"])
    imgs, masks, _ = data.load_train_data()
    assert not imgs[:, :4].any() and not imgs[:, 28:].any()
    np.testing.assert_array_equal(np.argwhere(masks[3])[[0, -1]], [[4 + 6, 4], [4 + 15, 13]])


def test_pixels_that_are_not_square_keep_their_proportions_in_mm(root):
    image, liver = body_and_liver((32, 16, 6))
    flat = np.diag([-1.0, -2.0, 2.0, 1.0])  # rows of 2 mm: 32 x 32 mm in all
    save(root / "raw/train/p1_orig.nii.gz", image, flat)
    save(root / "raw/train/p1_liver.nii.gz", liver, flat)
    data.main(["--size", "32"])
    rows, columns = np.nonzero(data.load_train_data().masks[3])
    assert (rows.min(), rows.max()) == (12, 31)  # rows 6 to 15 of 2 mm
    assert (columns.min(), columns.max()) == (4, 13)


@pytest.mark.parametrize("shape", [(100, 100, 9), (90, 64, 9), (40, 52, 9)])
@pytest.mark.parametrize("axes", ["LAS", "PSR"])
def test_a_resampled_mask_comes_back_nearly_whole(root, shape, axes):
    grid = np.indices(shape).T - (np.array(shape) - 1) / 2
    ball = ((grid / (np.array(shape) * 0.4)) ** 2).sum(axis=-1).T < 1
    path = save(root / "raw/train/p1_liver.nii.gz", ball.astype(np.uint8), axes=axes)
    restored = data.restore(data.slice_mask(path, nib.load(path), 64), path)
    assert restored.dtype == np.uint8
    assert dice(restored, data.read_mask(path)) > 0.98


def test_probabilities_are_cut_at_one_half_on_the_way_back(root):
    path = save(root / "raw/train/p1_liver.nii.gz", body_and_liver()[1])
    masks = upright_pictures()[1]
    np.testing.assert_array_equal(
        data.restore(masks * np.float16(0.9), path), data.restore(masks, path)
    )
    assert not data.restore(masks * np.float32(0.4), path).any()


def test_probabilities_are_interpolated_before_they_are_cut(root):
    path = save(root / "raw/train/p1_liver.nii.gz", np.zeros((16, 16, 1), np.uint8))
    stack = np.tile(np.float32([0.9, 0.9, 0.9, 0.2, 0.2, 0.2, 0.2, 0.2]), (1, 8, 1))
    # two voxels a pixel: the fourth pixel begins at voxel 6. The voxels beside that border have
    # 0.725 and 0.375, with 0.4 for 0.2 they have 0.775 and 0.525
    assert data.restore(stack, path)[:, 0, 0].tolist() == 6 * [1] + 10 * [0]
    stack[stack < 0.5] = 0.4
    assert data.restore(stack, path)[:, 0, 0].tolist() == 7 * [1] + 9 * [0]


def test_a_stack_of_another_scan_is_not_put_back(root):
    path = save(root / "raw/train/p1_liver.nii.gz", body_and_liver()[1])
    with pytest.raises(ValueError, match="p1_liver.nii.gz has 6 slices but 5"):
        data.restore(np.zeros((5, 32, 32)), path)


def test_pairs_are_made_by_name_whatever_case_and_order(root):
    image, liver = body_and_liver()
    other = np.roll(liver, 8, axis=0)
    save(root / "raw/train/B_ORIG.nii", image)
    save(root / "raw/train/b_Liver.nii.gz", liver)
    save(root / "raw/train/a_orig.nii.gz", image)
    save(root / "raw/train/A_LIVER.NII.GZ", other)
    data.main(["--size", "32"])
    _, masks, slices = data.load_train_data()
    assert slices.patient.tolist() == ["a"] * 6 + ["B"] * 6
    np.testing.assert_array_equal(masks[6:], upright_pictures()[1])
    np.testing.assert_array_equal(masks[:6], np.roll(upright_pictures()[1], 8, axis=2))


def test_lits_names_are_paired_too(root):
    image, liver = body_and_liver()
    save(root / "raw/train/volume-10.nii", image)
    save(root / "raw/train/segmentation-10.nii", liver)
    data.main(["--size", "32"])
    assert set(data.load_train_data().slices.patient) == {"volume-10"}


def test_a_test_scan_without_mask_is_sliced_and_unknown(root):
    save_patient(root / "raw/train")
    save_patient(root / "raw/test", "new", mask=False)
    data.main(["--size", "32"])
    imgs, masks, slices = data.load_test_data()
    np.testing.assert_array_equal(imgs, upright_pictures()[0])
    assert not masks.any()
    assert slices.liver.isna().all() and set(slices["mask"]) == {""}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numerical_dust_in_a_mask_is_not_liver(root, dtype):
    dusty = body_and_liver()[1].astype(dtype)
    dusty[dusty == 0] = 3e-4
    save(root / "p1_liver.nii.gz", dusty)
    np.testing.assert_array_equal(data.read_mask(root / "p1_liver.nii.gz"), body_and_liver()[1] > 0)


def test_scans_with_and_without_masks_can_lie_side_by_side(root):
    save_patient(root / "raw/train")
    save_patient(root / "raw/test", "a")
    save_patient(root / "raw/test", "b", mask=False)
    data.main(["--size", "32"])
    slices = data.load_test_data().slices
    assert slices.liver.tolist()[:6] == [0, 0, 1, 1, 1, 0] and slices.liver[6:].isna().all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32])
@pytest.mark.parametrize("label", [1, 2, 255])
def test_a_mask_that_was_scaled_when_it_was_saved_is_still_a_mask(root, dtype, label):
    image = nib.Nifti1Image(body_and_liver()[1] * float(label), np.eye(4))
    image.set_data_dtype(dtype)  # nibabel then picks a slope that gives the labels back nearly
    nib.save(image, root / "p1_liver.nii.gz")
    np.testing.assert_array_equal(data.read_mask(root / "p1_liver.nii.gz"), body_and_liver()[1] > 0)


def test_rounding_in_the_masks_header_does_not_part_it_from_its_image(root):
    image, liver = body_and_liver((32, 24, 6))
    liver[:] = image == -1000
    affine = np.diag([-1, -1.0208, 2, 1])  # 24 rows fill 24 pixels, with 1.0209 they fill 25
    save(root / "raw/train/p1_orig.nii.gz", image, affine)
    save(root / "raw/train/p1_liver.nii.gz", liver, np.diag([-1, -1.0209, 2, 1]))
    data.main(["--size", "32"])
    imgs, masks, _ = data.load_train_data()
    assert (imgs[masks == 1] < 64).all()


def test_only_test_needs_no_training_scans(root):
    save_patient(root / "raw/test", "new", mask=False)
    data.main(["--size", "32", "--only", "test"])
    assert len(data.load_test_data().imgs) == 6
    assert not (root / "imgs_train.npy").exists()


def test_no_test_scans_is_said_and_gives_empty_arrays(root, capsys):
    save_patient(root / "raw/train")
    data.main(["--size", "32"])
    assert data.load_test_data().imgs.shape == (0, 32, 32)
    assert "raw/test holds no scans" in capsys.readouterr().out


def test_a_fourth_axis_of_one_frame_is_accepted(root):
    image, liver = body_and_liver()
    save(root / "raw/train/p1_orig.nii.gz", image[..., None])
    save(root / "raw/train/p1_liver.nii.gz", liver)
    data.main(["--size", "32"])
    np.testing.assert_array_equal(data.load_train_data().imgs, upright_pictures()[0])


def test_clipped_ct_is_accepted(root):
    image, liver = body_and_liver()
    save(root / "raw/train/p1_orig.nii.gz", np.clip(image, -160, 240))
    save(root / "raw/train/p1_liver.nii.gz", liver)
    data.main(["--size", "32"])
    np.testing.assert_array_equal(data.load_train_data().imgs, upright_pictures()[0])


def test_rounding_in_the_affines_is_let_through(root):
    image, liver = body_and_liver()
    save(root / "raw/train/p1_orig.nii.gz", image)
    save(root / "raw/train/p1_liver.nii.gz", liver, np.diag([-1.0001, -1, 2, 1]))
    data.main(["--size", "32"])


def test_arrays_are_read_from_disk_and_not_into_memory(root):
    save_patient(root / "raw/train")
    data.main(["--size", "32"])
    imgs, masks, _ = data.load_train_data()
    assert isinstance(imgs, np.memmap) and isinstance(masks, np.memmap)


def test_a_nifti_of_another_name_is_left_out_aloud(root, capsys):
    save_patient(root / "raw/train")
    save(root / "raw/train/p1_bone.nii.gz", body_and_liver()[1])
    data.main(["--size", "32"])
    assert "raw/train/p1_bone.nii.gz is left out" in capsys.readouterr().out


def test_a_file_that_is_no_nifti_is_left_out_aloud(root, capsys):
    save_patient(root / "raw/train")
    (root / "raw/train/p1_liver.nrrd").write_bytes(b"NRRD0004")
    (root / "raw/train/.hidden").write_bytes(b"")
    data.main(["--size", "32"])
    said = capsys.readouterr().out
    assert "raw/train/p1_liver.nrrd is left out: wanted NAME_orig.nii.gz" in said
    assert "hidden" not in said


def test_a_header_without_orientation_is_said(root, capsys):
    save_patient(root / "raw/train")
    image = nib.Nifti1Image(body_and_liver()[0], None)
    nib.save(image, root / "raw/test/t_orig.nii.gz")
    data.main(["--size", "32"])
    said = capsys.readouterr().out
    assert "raw/test/t_orig.nii.gz does not say how it lies" in said
    assert "p1_orig.nii.gz does not" not in said


def orig(root):
    return root / "raw/train/p1_orig.nii.gz"


def liver_of(root):
    return root / "raw/train/p1_liver.nii.gz"


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def flip_a_byte(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


def image_with(value, dtype=np.float32):
    image = body_and_liver()[0].astype(dtype)
    image[5, 5, 5] = value
    return image


def broken_affine(root):
    """Write a header whose rows of the affine are zero in one column."""
    path = root / "raw/train/p1_orig.nii"
    orig(root).unlink()
    image = nib.Nifti1Image(body_and_liver()[0], np.eye(4))
    image.header.set_sform(np.diag([1.0, 1.0, 0.0, 1.0]), code=1)
    image.header["qform_code"] = 0
    with open(path, "wb") as file:
        file.write(image.header.binaryblock + bytes(4) + image.get_fdata().astype("<i2").tobytes())


def in_units(path, unit):
    """Have a file say that its voxel sizes are in another unit than mm."""
    image = nib.load(path)
    image = nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)


def shifted(mm):
    """Return the affine of hand-made scans, moved along their columns."""
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    affine[0, 3] = mm
    return affine


def uncompressed_and_cut(root):
    orig(root).unlink()
    cut(save(root / "raw/train/p1_orig.nii", body_and_liver()[0]), 2000)


BROKEN = {
    "no scans": (
        lambda r: [orig(r).unlink(), liver_of(r).unlink()],
        ["raw/train holds no volumes", "python raw/phantom.py"],
    ),
    "no folder": (
        lambda r: (r / "raw/train").rename(r / "raw/other"),
        ["raw/train holds no volumes"],
    ),
    "image without mask": (
        lambda r: liver_of(r).unlink(),
        ["p1_orig.nii.gz has no liver mask", "put p1_liver.nii.gz"],
    ),
    "mask without image": (
        lambda r: orig(r).unlink(),
        ["p1_liver.nii.gz has no image", "put p1_orig.nii.gz"],
    ),
    "test mask without image": (
        lambda r: save(r / "raw/test/t_liver.nii.gz", body_and_liver()[1]),
        ["raw/test/t_liver.nii.gz has no image"],
    ),
    "two images of a patient": (
        lambda r: save(r / "raw/train/P1_orig.nii", body_and_liver()[0]),
        ["P1_orig.nii", "p1_orig.nii.gz", "both the image"],
    ),
    "two masks of a patient": (
        lambda r: save(r / "raw/train/p1_liver.nii", body_and_liver()[1]),
        ["p1_liver.nii.gz and p1_liver.nii are both the mask"],
    ),
    "a patient in both splits": (
        lambda r: save_patient(r / "raw/test", "P1"),
        ["raw/test/P1_", "is of a patient that raw/train has too"],
    ),
    "other shape": (
        lambda r: save(liver_of(r), body_and_liver((32, 32, 5))[1]),
        ["p1_orig.nii.gz is 32 x 32 x 6 but its mask p1_liver.nii.gz is 32 x 32 x 5"],
    ),
    "other affine": (
        lambda r: save(liver_of(r), body_and_liver()[1], np.diag([-1, -1, 2.5, 1])),
        ["p1_orig.nii.gz and its mask p1_liver.nii.gz have affines", "2.5 mm apart"],
    ),
    "mirrored affine": (
        lambda r: save(liver_of(r), body_and_liver()[1], np.diag([1, -1, 2, 1])),
        ["have affines"],
    ),
    "no NIfTI": (
        lambda r: orig(r).write_bytes(gzip.compress(b"<html>404 Not Found</html>" * 99)),
        ["p1_orig.nii.gz cannot be read as a whole NIfTI file"],
    ),
    "not gzip": (
        lambda r: orig(r).write_bytes(b"<html>404 Not Found</html>" * 99),
        ["p1_orig.nii.gz cannot be read as a whole NIfTI file"],
    ),
    "empty file": (lambda r: orig(r).write_bytes(b""), ["p1_orig.nii.gz cannot be read"]),
    "truncated": (lambda r: cut(orig(r), -40), ["p1_orig.nii.gz cannot be read"]),
    "truncated without gzip": (uncompressed_and_cut, ["p1_orig.nii cannot be read"]),
    "truncated mask": (lambda r: cut(liver_of(r), -40), ["p1_liver.nii.gz cannot be read"]),
    "broken gzip stream": (lambda r: flip_a_byte(orig(r), -60), ["p1_orig.nii.gz cannot be read"]),
    "wrong checksum": (lambda r: flip_a_byte(orig(r), -6), ["p1_orig.nii.gz cannot be read"]),
    "2-D": (lambda r: save(orig(r), body_and_liver()[0][..., 0]), ["has the shape 32 x 32,"]),
    "4-D": (
        lambda r: save(orig(r), np.stack([body_and_liver()[0]] * 2, axis=-1)),
        ["has the shape 32 x 32 x 6 x 2,", "one 3-D volume"],
    ),
    "NaN": (lambda r: save(orig(r), image_with(np.nan)), ["p1_orig.nii.gz holds NaN or infinite"]),
    "infinite": (lambda r: save(orig(r), image_with(np.inf)), ["holds NaN or infinite"]),
    "NaN in the mask": (
        lambda r: save(liver_of(r), np.where(body_and_liver()[1], 1.0, np.nan)),
        ["p1_liver.nii.gz holds NaN or infinite"],
    ),
    "empty mask": (
        lambda r: save(liver_of(r), body_and_liver()[1] * 0),
        ["p1_liver.nii.gz holds no liver at all"],
    ),
    "CT as mask": (
        lambda r: save(liver_of(r), np.arange(32 * 32 * 6, dtype=np.int16).reshape(32, 32, 6)),
        ["p1_liver.nii.gz is no label mask"],
    ),
    "fractions as mask": (
        lambda r: save(liver_of(r), body_and_liver()[1] * np.float32(0.5)),
        ["p1_liver.nii.gz is no label mask", "0.5"],
    ),
    "gray values for HU": (
        lambda r: save(orig(r), body_and_liver()[0].clip(0, 255)),
        ["p1_orig.nii.gz holds values from 0 to 255, wanted Hounsfield units"],
    ),
    "all below zero": (
        lambda r: save(orig(r), body_and_liver()[0] - 2000),
        ["holds values from -3000 to -1300, wanted Hounsfield units"],
    ),
    "leaning gantry": (  # 20 degrees from the feet towards the back, slices of 5 mm
        lambda r: save(
            orig(r),
            body_and_liver()[0],
            [[-1, 0, 0, 0], [0, -1, -1.82, 0], [0, 0, 5, 0], [0] * 3 + [1]],
        ),
        ["p1_orig.nii.gz has axes that are not at right angles", "resample it first"],
    ),
    "micrometres": (
        lambda r: in_units(orig(r), "micron"),
        ["p1_orig.nii.gz gives its voxel sizes in micrometres, wanted mm"],
    ),
    "metres": (lambda r: in_units(liver_of(r), "meter"), ["voxel sizes in metres, wanted mm"]),
    "half a voxel apart": (
        lambda r: save(liver_of(r), body_and_liver()[1], shifted(0.5)),
        ["have affines", "0.5 mm apart"],
    ),
    "affine": (broken_affine, ["p1_orig.nii has an affine that cannot be inverted"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_input_is_one_clear_sentence_and_leaves_the_last_arrays_alone(root, case):
    save_patient(root / "raw/train")
    data.main(["--size", "32"])
    before = {path.name: path.read_bytes() for path in root.glob("*.*") if path.is_file()}
    spoil, wanted = BROKEN[case]
    spoil(root)
    with pytest.raises(SystemExit) as stop:
        data.main(["--size", "32"])
    sentence = stop.value.code
    assert sentence.startswith("data.py: raw/") and "\n" not in sentence
    for words in wanted:
        assert words in sentence
    after = {path.name: path.read_bytes() for path in root.glob("*.*") if path.is_file()}
    assert after == before
    assert not (root / ".slicing").exists()


def test_an_interrupted_run_leaves_the_last_arrays_alone(root, monkeypatch):
    save_patient(root / "raw/train")
    data.main(["--size", "32"])
    before = (root / "imgs_train.npy").read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "slice_mask", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        data.main(["--size", "16"])
    assert (root / "imgs_train.npy").read_bytes() == before
    assert not (root / ".slicing").exists()


def test_arrays_that_cannot_all_be_replaced_are_all_left_alone(root):
    save_patient(root / "raw/train")
    data.main(["--size", "32"])
    before = (root / "imgs_test.npy").read_bytes(), (root / "imgs_train.npy").read_bytes()
    (root / ".slicing").mkdir()
    finished = [root / ".slicing" / name for name in ("imgs_test.npy", "imgs_train.npy")]
    for path in finished:
        path.write_bytes(b"new")
    with pytest.raises(OSError):
        data.put_in_place([*finished, root / ".slicing" / "never_written.npy"])
    assert ((root / "imgs_test.npy").read_bytes(), (root / "imgs_train.npy").read_bytes()) == before


def test_an_interrupt_while_arrays_are_replaced_brings_the_last_ones_back(root, monkeypatch):
    for name in ("a.npy", "new_a.npy"):
        (root / name).write_bytes(name.encode())
    (root / ".slicing").mkdir()
    finished = (root / "new_a.npy").rename(root / ".slicing" / "a.npy")
    replace = data.os.replace

    def interrupted_at_the_second(source, target):
        if source == finished:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(data.os, "replace", interrupted_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        data.put_in_place([finished])
    assert (root / "a.npy").read_bytes() == b"a.npy"


def test_a_patient_of_both_splits_is_refused_even_when_one_is_sliced(root):
    save_patient(root / "raw/train")
    save_patient(root / "raw/test")
    with pytest.raises(SystemExit, match="raw/train has too"):
        data.main(["--only", "test"])


def test_what_a_killed_run_left_is_cleared_by_the_next(root):
    save_patient(root / "raw/train")
    (root / ".slicing").mkdir()
    (root / ".slicing" / "imgs_train.npy").write_bytes(b"half")
    data.main(["--size", "32"])
    np.testing.assert_array_equal(data.load_train_data().imgs, upright_pictures()[0])


def test_the_command_line_fails_with_one_sentence_and_no_traceback(tmp_path):
    (tmp_path / "data.py").write_bytes((REPO / "data.py").read_bytes())
    run = subprocess.run(
        [sys.executable, "data.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr.startswith("data.py: raw/train holds no volumes")
    assert run.stderr.count("\n") == 1 and "Traceback" not in run.stderr


@pytest.mark.parametrize("size", ["100", "0", "-16", "large"])
def test_a_size_that_four_poolings_cannot_halve_is_refused(root, size, capsys):
    with pytest.raises(SystemExit):
        data.main([f"--size={size}"])
    assert "no multiple of 16" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "-1", "two"])
def test_a_number_of_workers_that_cannot_be_is_refused(root, workers, capsys):
    with pytest.raises(SystemExit):
        data.main([f"--workers={workers}"])
    assert "--workers" in capsys.readouterr().err


def test_loading_before_slicing_says_what_to_run(root):
    with pytest.raises(FileNotFoundError, match=r"imgs_train.npy is missing: run `python data.py`"):
        data.load_train_data()


def test_a_table_of_an_earlier_version_is_refused(root):
    save_patient(root / "raw/train")
    data.main(["--size", "32"])
    table = (root / "slices_train.csv").read_text().replace("family", "other")
    (root / "slices_train.csv").write_text(table)
    with pytest.raises(ValueError, match="slice, other, liver.*, wanted .*: run `python data.py`"):
        data.load_train_data()


def test_files_that_changed_after_they_were_sliced_are_named(root, capsys):
    save_patient(root / "raw/train")
    save_patient(root / "raw/test", "t1")
    data.main(["--size", "32"])
    sliced = (root / "slices_test.csv").stat().st_mtime
    capsys.readouterr()
    data.load_train_data(), data.load_test_data()
    assert capsys.readouterr().out == ""
    os.utime(root / "raw/test/t1_liver.nii.gz", (sliced + 60, sliced + 60))
    data.load_train_data(), data.load_test_data()
    said = "raw/test/t1_liver.nii.gz is newer than its slices: run `python data.py` again\n"
    assert capsys.readouterr().out == said


def test_a_scan_that_came_after_slicing_is_named(root, capsys):
    save_patient(root / "raw/train")
    save_patient(root / "raw/test", "t1", mask=False)
    data.main(["--size", "32"])
    save_patient(root / "raw/test", "t1")  # now with a mask
    past = (root / "slices_test.csv").stat().st_mtime - 60
    for path in (root / "raw/test").iterdir():
        os.utime(path, (past, past))
    capsys.readouterr()
    data.load_train_data(), data.load_test_data()
    said = "raw/test/t1_liver.nii.gz is not among the slices: run `python data.py` again\n"
    assert capsys.readouterr().out == said


def test_out_of_memory_is_a_sentence_and_leaves_the_last_arrays_alone(root, monkeypatch):
    save_patient(root / "raw/train")
    data.main(["--size", "32"])
    before = (root / "imgs_train.npy").read_bytes()

    def none_left(*_):
        raise MemoryError

    monkeypatch.setattr(data, "slice_image", none_left)
    with pytest.raises(SystemExit, match="^data.py: out of memory: .* --workers 1$"):
        data.main(["--size", "32"])
    assert (root / "imgs_train.npy").read_bytes() == before
    assert not (root / ".slicing").exists()


def test_a_test_scan_that_is_gone_is_refused_and_a_training_scan_is_not_missed(root):
    save_patient(root / "raw/train")
    save_patient(root / "raw/test", "t1")
    data.main(["--size", "32"])
    orig(root).unlink()
    assert len(data.load_train_data().imgs) == 6  # its slices are all that training needs
    (root / "raw/test/t1_orig.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="raw/test/t1_orig.nii.gz was sliced and is gone"):
        data.load_test_data()


def test_arrays_that_do_not_belong_together_are_refused(root):
    save_patient(root / "raw/train")
    data.main(["--size", "32"])
    np.save(root / "masks_train.npy", np.zeros((5, 32, 32), np.uint8))
    with pytest.raises(ValueError, match="hold 6, 5 and 6 slices"):
        data.load_train_data()
