"""What only real CT with expert masks can show. Skipped where such scans are not at hand."""

import numpy as np
import pytest
from conftest import SHARED_SCANS, dice

import data
from raw import volumes

SCANS = sorted(SHARED_SCANS.glob("*/*_orig.nii.gz"))
pytestmark = pytest.mark.skipif(
    not SCANS, reason="needs real CT scans in ../shared/scans, which may not be redistributed"
)


def mask_of(path):
    return path.with_name(path.name.replace("_orig", "_liver"))


def slices_of(path):
    image, liver = volumes.read_image(path), volumes.read_mask(mask_of(path))
    return data.slice_image(image, path, 128), data.slice_mask(liver, path, 128)


@pytest.mark.parametrize("path", SCANS, ids=lambda path: path.name)
def test_a_real_liver_mask_survives_the_way_to_256_pixels_and_back(path):
    liver = volumes.read_mask(mask_of(path))
    restored = data.restore(data.slice_mask(liver, path, 256), path)
    assert dice(restored, liver) >= 0.985


@pytest.mark.parametrize("path", SCANS, ids=lambda path: path.name)
def test_a_real_patient_lies_upright_with_the_liver_on_the_left_of_the_picture(path):
    imgs, masks = slices_of(path)
    _, body_rows, body_columns = np.nonzero(imgs > 38)  # above -100 HU
    _, bone_rows, bone_columns = np.nonzero(imgs == 255)  # above 240 HU, or oral contrast
    spine_rows = bone_rows[np.abs(bone_columns - body_columns.mean()) < 8]
    assert np.nonzero(masks)[2].mean() < body_columns.mean() - 5
    assert np.median(spine_rows) > body_rows.mean()  # the back is at the bottom


@pytest.mark.parametrize("path", SCANS, ids=lambda path: path.name)
def test_the_livers_gray_values_lie_inside_the_window(path):
    imgs, masks = slices_of(path)
    liver = imgs[masks == 1]
    assert 110 < np.median(liver) < 240  # 12 to 216 HU
    assert np.isin(liver, (0, 255)).mean() < 0.02
