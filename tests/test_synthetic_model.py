"""Is preds/synthetic.keras, which has learned from synthetic patients alone, worth passing on?"""

import sys

import keras
import nibabel as nib
import pytest
from conftest import REPO, SHARED_SCANS, dice

import data
from raw import volumes

sys.path.insert(0, str(REPO / "raw"))
import phantom  # noqa: E402  raw/ has to be on the path first

MODEL = REPO / "preds" / "synthetic.keras"
NEVER_USED = 4711  # a seed of the synthetic patients


def dice_of_slices(model, scan, mask, every):
    """Return the Dice of every so many slices, pooled."""
    imgs = data.slice_image(volumes.read_image(scan), scan, 256)[::every]
    masks = data.slice_mask(volumes.read_mask(mask), scan, 256)[::every]
    return dice(model.predict(imgs[..., None], batch_size=8, verbose=0)[..., 0] >= 0.5, masks)


@pytest.fixture(scope="module")
def model():
    return keras.models.load_model(MODEL)  # without custom objects


def test_it_is_small_enough_to_be_cloned_and_takes_slices_of_the_default_size(model):
    assert MODEL.stat().st_size < 10e6
    assert model.input_shape == (None, data.SIZE, data.SIZE, 1)
    assert {str(weight.dtype) for weight in model.weights} == {"float32"}


@pytest.mark.parametrize("number", [1, 2])
def test_it_finds_the_livers_of_synthetic_patients_that_it_has_never_seen(model, tmp_path, number):
    files = tmp_path / "p_orig.nii.gz", tmp_path / "p_liver.nii.gz"
    for image, file in zip(phantom.make_patient(number, 256, NEVER_USED), files, strict=True):
        nib.save(image, file)
    assert dice_of_slices(model, *files, every=3) >= 0.90


def test_it_finds_the_liver_of_a_real_patient(model):
    scan = SHARED_SCANS / "train" / "ircad_e01_orig.nii.gz"
    if not scan.exists():
        pytest.skip("needs real CT scans in ../shared/scans, which may not be redistributed")
    mask = scan.with_name("ircad_e01_liver.nii.gz")
    assert dice_of_slices(model, scan, mask, every=4) >= 0.92
