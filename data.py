"""Slice the CT volumes in raw/ into axial 2-D arrays that train.ipynb learns from.

    python data.py                 256 x 256 pixels a slice
    python data.py --size 128      smaller and faster
    python data.py --only test     new scans for a trained model, raw/train may be empty
    python data.py --oblique 4     four tilted stacks of each training scan as well

It reads `NAME_orig.nii.gz` with `NAME_liver.nii.gz` (or LiTS's `volume-N` with `segmentation-N`,
`.nii` or `.nii.gz`) from raw/train and raw/test and writes, next to itself and for each split:

    imgs_train.npy     (slices, rows, columns) uint8, gray values of the HU window
    masks_train.npy    (slices, rows, columns) uint8, 1 in the liver and 0 elsewhere
    slices_train.csv   a line a slice: patient, slice index in the file, family, liver or not, the
                       files

Slices are axial and upright: the patient's right on the left of the picture, front at the top.
With --oblique each training scan is cut in addition along axes that lean; family says how, 0 is
axial, and the slice index then counts along the tilted axis.
`restore` is the way back, from slices to the voxel grid of the file they came from.
"""

import argparse
import csv
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import BinaryIO, NamedTuple

import nibabel as nib
import numpy as np
from isal import igzip  # gzip, decompressed more than twice as fast
from nibabel import orientations
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
SIZE = 256  # pixels a side as in the tutorial; four poolings want a multiple of 16
WINDOW_HU = (-160.0, 240.0)  # the abdominal soft-tissue window: level 40, width 400
UPRIGHT = ("L", "P", "S")  # where the columns, rows and slices of a stack count up to
TILTS = ((1, 0), (1, 20), (2, 20), (1, -20), (2, -20))
# Slices of family 0, 1, 2, ... follow an axis that leans by so many degrees from the head towards 1
# the back or 2 the patient's left: they tilt about the scan's left-right or front-back axis.
MAX_LABELS = 5  # a liver mask holds 0 and 1, or 0 and 255, or a few tumour labels beside
AFFINE_TOLERANCE = 0.1  # voxels by which an image and its mask may lie apart: header rounding
MIN_ORTHOGONALITY = 0.99  # a voxel's volume over that of a box with its sides; 8 degrees off
OTHER_UNITS = {1: "metres", 3: "micrometres"}  # NIfTI's xyzt_units; 2 is mm, 0 does not say
CHUNK = 2**20  # bytes that are unzipped at a time
PARTNERS = {"orig": "liver", "liver": "orig", "volume": "segmentation", "segmentation": "volume"}
Nifti = nib.spatialimages.SpatialImage  # Nifti1Image or Nifti2Image
COLUMNS = ("patient", "slice", "family", "liver", "image", "mask")
NAMES = re.compile(
    r"((?P<name>.+)_(?P<kind>orig|liver)|(?P<lits>volume|segmentation)-(?P<number>\d+))"
    r"\.nii(\.gz)?",
    re.IGNORECASE,
)


class Slices(NamedTuple):
    """The slices of a split, as `load_train_data` and `load_test_data` return them."""

    imgs: np.ndarray
    masks: np.ndarray
    slices: object  # pandas.DataFrame, a row a slice


class Patient(NamedTuple):
    """The files of one patient; `mask` is None for a scan that is segmented but not scored."""

    name: str
    image: Path
    mask: Path | None


def named(path: Path) -> str:
    """Return a path as the user sees it, from the folder of data.py."""
    return Path(os.path.relpath(path, ROOT)).as_posix()


def identify(path: Path) -> tuple[str, str, Path] | None:
    """Return what a file name tells: patient, role ("image" or "mask") and the partner's path.

    None if the name is of no known form.
    """
    match = NAMES.fullmatch(path.name)
    if match is None:
        return None
    word = "kind" if match["kind"] else "lits"
    start, end = match.span(word)
    partner = path.with_name(path.name[:start] + PARTNERS[match[word].lower()] + path.name[end:])
    role = "image" if match[word].lower() in ("orig", "volume") else "mask"
    return match["name"] or f"volume-{match['number']}", role, partner


def find_files(folder: Path) -> dict[str, dict[str, Path]]:
    """Return {patient in lower case: {"image": path, "mask": path}} by name, never by order.

    Raises ValueError for two files that claim to be the same thing of one patient.
    """
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.glob("[!.]*")):
        if identity := identify(path):
            name, role, _ = identity
            files = found.setdefault(name.lower(), {})
            if role in files:
                raise ValueError(
                    f"{named(path)} and {files[role].name} are both the {role} of patient {name}: "
                    "keep one of them"
                )
            files[role] = path
        else:
            print(f"{named(path)} is left out: wanted NAME_orig.nii.gz or NAME_liver.nii.gz")
    return found


def find_patients(files_by_name: dict[str, dict[str, Path]], masks_needed: bool) -> list[Patient]:
    """Return the patients of `find_files` in the order of their names.

    Raises FileNotFoundError for an image without mask (if masks are needed), a mask without image.
    """
    patients = []
    for _, files in sorted(files_by_name.items()):
        name, _, partner = identify(files.get("image") or files["mask"])
        if "image" not in files:
            raise FileNotFoundError(
                f"{named(files['mask'])} has no image: put {partner.name} beside it, or take it "
                "away"
            )
        if masks_needed and "mask" not in files:
            raise FileNotFoundError(
                f"{named(files['image'])} has no liver mask: put {partner.name} beside it, or "
                "move it to raw/test to segment it unscored"
            )
        patients.append(Patient(name, files["image"], files.get("mask")))
    return patients


def find_splits(only: str | None) -> dict[str, list[Patient]]:
    """Return {"train": patients, "test": patients}, or the one split that is asked for.

    Raises FileNotFoundError where scans are missing, ValueError for a patient in both splits.
    """
    found = {split: find_files(ROOT / "raw" / split) for split in ("train", "test")}
    for name in sorted(found["train"].keys() & found["test"].keys()):
        path = next(iter(found["test"][name].values()))
        raise ValueError(
            f"{named(path)} is of a patient that raw/train has too, and a test on training "
            "patients is no test: take the patient out of one of the two"
        )
    wanted = only or "train"
    if not found[wanted]:
        raise FileNotFoundError(
            f"raw/{wanted} holds no volumes named NAME_orig.nii or NAME_orig.nii.gz: put CT scans "
            "there, run `python raw/ircad.py` for 3D-IRCADb-01 or `python raw/phantom.py` for "
            "synthetic ones"
        )
    if not found["test"]:
        print("raw/test holds no scans: nothing will be segmented or scored")
    return {
        split: find_patients(files, masks_needed=split == "train")
        for split, files in found.items()
        if only in (None, split)
    }


def open_volume(path: Path) -> Nifti:
    """Return a NIfTI image whose header is read and whose voxels are not.

    Raises ValueError unless the file is NIfTI, 3-D (a fourth axis of length one is let through),
    in mm, and has an affine that can be inverted, with axes at right angles.
    """
    try:
        image = nib.load(path)
        shape, affine = image.shape, image.affine
    except FileNotFoundError:
        raise
    except Exception as error:  # nibabel has a class of error for each kind of damage
        raise read_error(path, error) from error
    if len(shape) < 3 or max(shape[3:], default=1) > 1 or min(shape) < 1:
        raise ValueError(
            f"{named(path)} has the shape {sides(shape)}, wanted one 3-D volume: export it as one"
        )
    if unit := OTHER_UNITS.get(int(image.header["xyzt_units"]) & 7):
        raise ValueError(
            f"{named(path)} gives its voxel sizes in {unit}, wanted mm: convert it again from DICOM"
        )
    scaled = affine[:3, :3] / np.maximum(np.linalg.norm(affine[:3, :3], axis=0), 1e-9)
    orthogonality = abs(np.linalg.det(scaled))
    if not orthogonality > 1e-3:  # also true of NaN
        raise ValueError(
            f"{named(path)} has an affine that cannot be inverted, {affine[:3, :3].tolist()}, so "
            "its axes have no direction or length: convert it again from DICOM"
        )
    if orthogonality < MIN_ORTHOGONALITY:
        raise ValueError(
            f"{named(path)} has axes that are not at right angles, {affine[:3, :3].tolist()}, as "
            "if the gantry had leaned, so distances in mm would be wrong: resample it first"
        )
    return image


def read_error(path: Path, error: Exception) -> ValueError:
    """Return the error of a file that is no NIfTI, cut short or damaged."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())  # on one line
    return ValueError(
        f"{named(path)} cannot be read as a whole NIfTI file ({reason}): copy or convert it again"
    )


def sides(shape: tuple) -> str:
    """Return a shape as a person writes it: 512 x 512 x 129."""
    return " x ".join(str(n) for n in shape)


def fill_from(stream: BinaryIO, content: np.ndarray) -> None:
    """Read a stream into (bytes,) uint8, and on to its end. Raises EOFError if it is too short."""
    for start in range(0, len(content), CHUNK):
        piece = content[start : start + CHUNK]
        got = stream.readinto(piece)
        if got < len(piece):
            raise EOFError(f"wanted {len(content)} bytes of voxels, found {start + got}")
    while stream.read(CHUNK):
        pass


def read_voxels(path: Path) -> tuple[np.ndarray, float, float]:
    """Return the voxels as stored, (x, y, z) in the file's type, and slope and intercept to units.

    The file is read to its end, so that gzip's checksum is compared. Raises ValueError for a file
    that is cut short or damaged, holds no real numbers, or holds NaN or infinite values.
    """
    image = open_volume(path)
    stored = image.dataobj
    if stored.dtype.kind not in "iuf":
        raise ValueError(f"{named(path)} holds {stored.dtype}, wanted a number a voxel: convert it")
    raw = np.empty(image.shape[:3], stored.dtype, order="F")
    try:
        with (igzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as stream:
            stream.seek(stored.offset)
            fill_from(stream, raw.ravel(order="F").view(np.uint8))
    except Exception as error:
        raise read_error(path, error) from error
    if not np.isfinite([raw.min(), raw.max()]).all():
        raise ValueError(
            f"{named(path)} holds NaN or infinite values, wanted a number in every voxel: replace "
            "them, air is -1000 HU"
        )
    return raw, stored.slope, stored.inter


def read_image(path: Path) -> tuple[np.ndarray, float, float]:
    """Return what `read_voxels` does, for a CT image. Raises ValueError if it is not in HU."""
    raw, slope, inter = read_voxels(path)
    low, high = sorted((raw.min() * slope + inter, raw.max() * slope + inter))
    if low >= 0 or high < 0:
        raise ValueError(
            f"{named(path)} holds values from {low:g} to {high:g}, wanted Hounsfield units with "
            "air and fat below 0 and organs above: convert it with the DICOM's rescale slope and "
            "intercept"
        )
    return raw, slope, inter


def read_mask(path: Path | str) -> np.ndarray:
    """Return the liver on the file's own grid, (x, y, z) bool: every label above 0 is liver.

    path : absolute, or from the folder of data.py as in the table of slices

    Raises ValueError if the values are not labels: negative, fractions, or too many of them.
    """
    path = ROOT / path
    raw, slope, inter = read_voxels(path)
    labels: set[float] = set()
    for piece in np.moveaxis(raw, 2, 0):  # (z, x, y): the piece is one x-y plane
        flat = piece.ravel(order="K")
        changes = np.flatnonzero(flat[1:] != flat[:-1])  # labels are few runs of equal values
        found = np.unique(np.append(flat[changes], flat[-1])) * slope + inter
        labels.update(np.round(found, 3).tolist())  # scaled labels are whole but for rounding
        if len(labels) > MAX_LABELS or min(labels) < 0 or any(label % 1 for label in labels):
            raise ValueError(
                f"{named(path)} is no label mask, it holds values like "
                f"{', '.join(f'{label:g}' for label in sorted(labels)[:MAX_LABELS])}; wanted 0 for "
                "background and 1 for liver: export it as a binary label map"
            )
    half = (0.5 - inter) / slope  # as stored; scaling the voxels would take their memory again
    return raw > half if slope > 0 else raw < half


def check_headers(patient: Patient) -> None:
    """Raise ValueError if a header is not usable, or if image and mask are not on one grid."""
    image = open_volume(patient.image)
    if image.header["sform_code"] == image.header["qform_code"] == 0:
        print(f"{named(patient.image)} does not say how it lies: check left and right in preds/")
    if patient.mask is None:
        return
    mask = open_volume(patient.mask)
    if image.shape[:3] != mask.shape[:3]:
        raise ValueError(
            f"{named(patient.image)} is {sides(image.shape[:3])} but its mask "
            f"{patient.mask.name} is {sides(mask.shape[:3])}: export the mask on the image's grid"
        )
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    corners = (corners * (*np.array(image.shape[:3]) - 1, 1)).T  # (x y z 1, corner)
    apart = np.abs((image.affine - mask.affine) @ corners).max()
    if not apart <= AFFINE_TOLERANCE * nib.affines.voxel_sizes(image.affine).min():
        raise ValueError(
            f"{named(patient.image)} and its mask {patient.mask.name} have affines that put one "
            f"voxel {apart:.3g} mm apart: export the mask on the image's grid"
        )


def orientation(affine: np.ndarray, back: bool = False) -> np.ndarray:
    """Return nibabel's transform from a file's axes to the closest of (L, P, S), or back."""
    stored = orientations.io_orientation(affine)
    wanted = orientations.axcodes2ornt(UPRIGHT)
    return orientations.ornt_transform(*((wanted, stored) if back else (stored, wanted)))


def upright(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return the volume (x, y, z) as a view (slices, rows, columns) of upright axial slices.

    Slices run from the feet up, rows from front to back, columns from the patient's right to left.
    """
    lps = orientations.apply_orientation(volume, orientation(affine))  # (L, P, S)
    return lps.transpose(2, 1, 0)  # (slices, rows, columns)


def grid(image: Nifti) -> tuple[np.ndarray, np.ndarray]:
    """Return the shape of a file's upright stack and its spacing in mm: slices, rows, columns."""
    axes = np.argsort(orientation(image.affine)[:, 0])[::-1]  # the file's axes along S, P and L
    return np.array(image.shape)[axes], nib.affines.voxel_sizes(image.affine)[axes]


def tilt(image: Nifti, family: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrix (3, 3) and offset (3,) that lead from a tilted stack to the upright one.

    They map indices (slice, row, column). The tilted stack has the upright one's shape, spacing and
    middle, and is turned about it as TILTS says, in mm along the axes of the file.
    """
    shape, spacing_mm = grid(image)
    towards, degrees = TILTS[family]
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.eye(3)
    turn[[0, 0, towards, towards], [0, towards, 0, towards]] = cos, -sin, sin, cos
    matrix = turn * spacing_mm / spacing_mm[:, None]
    return matrix, (shape - 1) / 2 - matrix @ (shape - 1) / 2


def slice_numbers(image: Nifti, family: int = 0) -> list[int]:
    """Return the numbers, from 0, of a family's slices: in the file, or along the tilted axis.

    They come in the order of the stack, from the feet up. A tilted slice of which half or less lies
    inside the volume has no number.
    """
    shape, _ = grid(image)
    if family == 0:
        stored = orientations.io_orientation(image.affine)
        upwards = stored[stored[:, 0] == 2, 1] > 0  # along the file's axis closest to feet-head
        return list(range(shape[0]))[:: 1 if upwards else -1]
    matrix, offset = tilt(image, family)
    samples = [(np.arange(64) + 0.5) / 64 * n - 0.5 for n in shape[1:]]  # rows and columns
    places = np.stack(np.meshgrid(np.arange(shape[0]), *samples, indexing="ij"), axis=-1)
    places = places @ matrix.T + offset  # (slices, 64, 64, 3) in the upright stack
    inside = ((places >= -0.5) & (places <= shape - 0.5)).all(axis=-1).mean(axis=(1, 2))
    return np.flatnonzero(inside > 0.5).tolist()


def list_slices(image: Nifti, families: Sequence[int]) -> list[tuple[int, int]]:
    """Return number and family of the slices of families, in the order that `cut` yields them."""
    return [(number, family) for family in families for number in slice_numbers(image, family)]


def cut(
    volume: np.ndarray, image: Nifti, families: Sequence[int], outside: float
) -> Iterator[np.ndarray]:
    """Yield the slices, (rows, columns), of families of a volume (x, y, z) on an image's grid.

    Tilted slices are interpolated, float32, or for a mask cut at one half; `outside` is the value
    beyond the volume.
    """
    stack = upright(volume, image.affine)
    for family in families:
        if family == 0:
            yield from stack
            continue
        for number in slice_numbers(image, family):
            whole = tilted_slice(stack, image, family, number, outside)
            yield whole >= 0.5 if stack.dtype == bool else whole


def tilted_slice(
    stack: np.ndarray, image: Nifti, family: int, number: int, outside: float
) -> np.ndarray:
    """Return a tilted slice of an upright stack, (rows, columns) float32, by linear interpolation.

    A tilt leaves one axis alone, so each pixel lies between four voxels and not eight, the same
    way all along that axis: many times faster than scipy's affine_transform.
    """
    matrix, offset = tilt(image, family)
    pair = [0, TILTS[family][0]]  # the axes that turn
    turned = stack if pair[1] == 1 else stack.transpose(0, 2, 1)  # (slices, along, across)
    steps = np.stack([np.full(turned.shape[1], number), np.arange(turned.shape[1])])
    place = matrix[np.ix_(pair, pair)] @ steps + offset[pair][:, None]  # (2, along) in the stack
    last = np.array(turned.shape[:2])[:, None] - 1
    below = np.clip(np.floor(place).astype(int), 0, last - 1)
    upper = (place - below).astype(np.float32)  # weights of the voxels above
    whole = np.zeros(turned.shape[1:], np.float32)
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = np.prod([w if up else 1 - w for w, up in zip(upper, corner, strict=True)], axis=0)
        whole += weight[:, None] * turned[below[0] + corner[0], below[1] + corner[1]]
    whole[((place < 0) | (place > last)).any(axis=0)] = outside
    return whole if pair[1] == 1 else whole.T


def frame(image: Nifti, size: int) -> tuple[slice, slice]:
    """Return the rows and columns that a whole slice fills in a picture of size x size pixels.

    Its longer side in mm fills the picture, the shorter one is centred: proportions are kept.
    """
    shape, spacing_mm = grid(image)
    sides_mm = (shape * spacing_mm)[1:]
    pixels = np.maximum(np.rint(sides_mm / sides_mm.max() * size).astype(int), 1)
    return tuple(slice((size - n) // 2, (size - n) // 2 + n) for n in pixels)


def resize(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return a (rows, columns) picture, uint8 or float32, at another size.

    Linear interpolation; Pillow widens the filter when it shrinks, which is the low-pass.
    """
    resampling = Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(picture).resize((columns, rows), resampling))


def to_gray(hu: np.ndarray) -> np.ndarray:
    """Return Hounsfield units as uint8, WINDOW_HU spread over 0..255, clipped at its ends."""
    low, high = WINDOW_HU
    return (np.clip((hu - low) * (255 / (high - low)), 0, 255) + 0.5).astype(np.uint8)


def to_pictures(slices: Iterable[np.ndarray], count: int, image: Nifti, size: int) -> np.ndarray:
    """Return slices (rows, columns) uint8 of an image as pictures, (count, size, size) uint8.

    The padding is 0 (air, background).
    """
    rows, columns = frame(image, size)
    pictures = np.zeros((count, size, size), np.uint8)
    for picture, whole in zip(pictures, slices, strict=True):
        pixels = np.ascontiguousarray(whole)
        if pixels.any():
            height, width = rows.stop - rows.start, columns.stop - columns.start
            picture[rows, columns] = resize(pixels, height, width)
    return pictures


def slice_image(path: Path, image: Nifti, size: int, families: Sequence[int] = (0,)) -> np.ndarray:
    """Return a CT volume with its header `image` as pictures, (slices, size, size) uint8."""
    raw, slope, inter = read_image(path)
    wholes = cut(raw, image, families, outside=(-1000 - inter) / slope)
    grays = (to_gray(whole.astype(np.float32) * slope + inter) for whole in wholes)
    return to_pictures(grays, len(list_slices(image, families)), image, size)


def slice_mask(path: Path, image: Nifti, size: int, families: Sequence[int] = (0,)) -> np.ndarray:
    """Return the liver mask of a CT volume with header `image` as pictures of 0 and 1.

    The image's header rules for both, so that rounding in the mask's cannot part them.
    """
    wholes = cut(read_mask(path), image, families, outside=0)
    grays = (whole.astype(np.uint8) * 255 for whole in wholes)
    pictures = to_pictures(grays, len(list_slices(image, families)), image, size)
    return (pictures >= 128).astype(np.uint8)


def restore(stack: np.ndarray, path: Path | str) -> np.ndarray:
    """Return predictions for the slices of a file as a mask on the voxel grid of that file.

    Parameters
    ----------
    stack : (slices, size, size) bool, uint8 or float, 0..1
        Masks or probabilities in the order of the arrays that data.py writes.
    path : Path or str
        The NIfTI file that the slices come from, absolute or from the folder of data.py as in the
        table of slices; only its header is read.

    Returns
    -------
    (x, y, z) uint8, 0 or 1
        On the axes of the file. Probabilities are interpolated, then cut at 0.5.

    Raises
    ------
    ValueError
        If the number of slices is not the file's.
    """
    image = open_volume(ROOT / path)
    (slices, rows, columns), _ = grid(image)
    if len(stack) != slices:
        raise ValueError(
            f"{path} has {slices} slices but {len(stack)} are to be put back: if it was changed, "
            "run `python data.py` again"
        )
    inside = frame(image, stack.shape[1])
    full = np.zeros((slices, rows, columns), np.uint8)

    def put_back(whole: np.ndarray, picture: np.ndarray) -> None:
        if picture.max() >= 0.5:  # interpolation never goes above what it is given
            whole[:] = resize(picture[inside].astype(np.float32), rows, columns) >= 0.5

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:  # Pillow releases Python's lock
        list(pool.map(put_back, full, stack))
    lps = full.transpose(2, 1, 0)  # (L, P, S)
    return orientations.apply_orientation(lps, orientation(image.affine, back=True))


def slice_view(path: Path | str, size: int, family: int) -> np.ndarray:
    """Return a tilted stack of a scan as pictures, (slices, size, size) uint8, like imgs_test.npy.

    path : absolute, or from the folder of data.py as in the table of slices
    family : which of TILTS; ValueError if it has no such one
    """
    if not 0 < family < len(TILTS):
        raise ValueError(f"there is no tilted view {family}: data.py has 1 to {len(TILTS) - 1}")
    return slice_image(ROOT / path, open_volume(ROOT / path), size, [family])


def turn_back(stack: np.ndarray, path: Path | str, family: int) -> np.ndarray:
    """Return what was predicted for a tilted stack at the places of the axial slices.

    Parameters
    ----------
    stack : (tilted slices, size, size) float, 0..1
        Probabilities in the order of `slice_view`.
    path : Path or str
        The scan, absolute or from the folder of data.py; only its header is read.
    family : int
        Which of TILTS.

    Returns
    -------
    (axial slices, size, size) float32, 0..1
        Interpolated linearly; NaN where no tilted slice passes.
    """
    from scipy import ndimage  # here, because importing it takes as long as slicing a volume

    image, size = open_volume(ROOT / path), stack.shape[1]
    shape, _ = grid(image)
    pixels = np.array([[span.start, span.stop - span.start] for span in frame(image, size)])
    scale = np.append(1, shape[1:] / pixels[:, 1])  # voxels a pixel
    first = np.append(0, (0.5 - pixels[:, 0]) * scale[1:] - 0.5)  # the voxel at pixel 0
    matrix, offset = tilt(image, family)
    back = np.linalg.inv(matrix)
    start = (back @ (first - offset) - first) / scale
    start[0] -= slice_numbers(image, family)[0]
    return ndimage.affine_transform(
        stack.astype(np.float32),
        back * scale / scale[:, None],
        start,
        output_shape=(shape[0], size, size),
        order=1,
        cval=np.nan,
    )


def write_mask(path: Path | str, mask: np.ndarray, source: Path | str) -> None:
    """Write a mask as gzipped NIfTI that any viewer lays over the file it belongs to.

    The header is the source's: shape, affine with its codes, units. The file appears whole or not
    at all.

    Parameters
    ----------
    path : Path or str
        Where to, a name that ends with .nii.gz.
    mask : (x, y, z) uint8 or bool, 0 or 1
        On the axes of the source, as `restore` returns it.
    source : Path or str
        The scan, absolute or from the folder of data.py; only its header is read.

    Raises
    ------
    ValueError
        If the mask does not have the source's shape.
    """
    image, path = open_volume(ROOT / source), Path(path)
    if mask.shape != image.shape[:3]:
        raise ValueError(
            f"{source} is {sides(image.shape[:3])} but its mask is {sides(mask.shape)}: make it "
            "with restore"
        )
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"], header["cal_max"] = 0, 1  # the gray values a viewer starts with
    header.extensions.clear()  # they describe the scan, sometimes with the patient's name
    for name in {"descrip", "aux_file", "db_name"} & set(header.keys()):  # so do these
        header[name] = b""
    written = type(image)(mask.astype(np.uint8).reshape(image.shape), image.affine, header)
    part = path.with_name(f".{path.name}")
    try:
        with igzip.open(part, "wb", compresslevel=1) as file:
            written.to_stream(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def stand_up(volume: np.ndarray, path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Return a volume on the grid of a file as `upright` does, and the size of its voxels.

    Parameters
    ----------
    volume : (x, y, z) of any type
        On the axes of the file.
    path : Path or str
        The file, absolute or from the folder of data.py; only its header is read.

    Returns
    -------
    stack : (slices, rows, columns), a view
    spacing_mm : (3,) float, from slice to slice, row to row, column to column
    """
    image = open_volume(ROOT / path)
    return upright(volume, image.affine), grid(image)[1]


def read_gray(path: Path | str) -> np.ndarray:
    """Return a CT volume upright, (slices, rows, columns) uint8, WINDOW_HU spread over 0..255.

    path : absolute, or from the folder of data.py as in the table of slices
    """
    raw, slope, inter = read_image(ROOT / path)
    stack, _ = stand_up(raw, path)
    return np.stack([to_gray(whole.astype(np.float32) * slope + inter) for whole in stack])


def create(path: Path, slices: int, size: int) -> None:
    """Make an .npy file for (slices, size, size) uint8 that `fill` fills patient by patient."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (slices, size, size)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + slices * size * size)


def fill(path: Path, start: int, pictures: np.ndarray) -> None:
    """Write pictures into an .npy file from slice `start` on, without holding the file in RAM."""
    with open(path, "r+b") as file:
        offset = np.load(path, mmap_mode="r").offset
        file.seek(offset + start * pictures[0].nbytes)
        file.write(pictures)


def slice_patient(
    patient: Patient, folder: Path, split: str, start: int, size: int, families: Sequence[int]
) -> list[tuple]:
    """Write a patient's pictures into the arrays and return its lines of the slices table.

    Raises ValueError if a file cannot be used, or if a training mask is empty.
    """
    image = open_volume(patient.image)
    places = list_slices(image, families)
    fill(folder / f"imgs_{split}.npy", start, slice_image(patient.image, image, size, families))
    liver, mask_name = [""] * len(places), ""  # unknown without a mask
    if patient.mask:
        masks = slice_mask(patient.mask, image, size, families)
        liver, mask_name = masks.any(axis=(1, 2)).astype(int).tolist(), named(patient.mask)
        if split == "train" and not any(liver):
            raise ValueError(
                f"{mask_name} holds no liver at all, wanted voxels above 0: replace it, or take "
                "the patient out of raw/train"
            )
        fill(folder / f"masks_{split}.npy", start, masks)
    files = named(patient.image), mask_name
    return [(patient.name, *place, has, *files) for place, has in zip(places, liver, strict=True)]


def slice_split(
    split: str,
    patients: list[Patient],
    folder: Path,
    size: int,
    families: Sequence[int],
    workers: int,
) -> str:
    """Write the two arrays and the table of a split into a folder, patients in parallel.

    Returns a line that says what was written.
    """
    for patient in patients:
        check_headers(patient)
    counts = [len(list_slices(open_volume(patient.image), families)) for patient in patients]
    starts = np.cumsum([0, *counts]).tolist()
    for name in ("imgs", "masks"):
        create(folder / f"{name}_{split}.npy", starts[-1], size)
    pool = ThreadPoolExecutor(workers)  # unzipping and resizing release Python's lock
    try:
        jobs = [
            pool.submit(slice_patient, patient, folder, split, start, size, families)
            for patient, start in zip(patients, starts[:-1], strict=True)
        ]
        for job in tqdm(as_completed(jobs), f"raw/{split}", len(jobs), unit=" volumes"):
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)
    lines = [line for job in jobs for line in job.result()]
    with open(folder / f"slices_{split}.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *lines])
    with_liver = sum(line[COLUMNS.index("liver")] == 1 for line in lines)
    oblique = sum(line[COLUMNS.index("family")] > 0 for line in lines)
    return (
        f"{split}: {len(patients)} patients, {len(lines)} slices of {size} x {size}, "
        f"{with_liver} with liver" + (f", {oblique} oblique" if oblique else "")
    )


def put_in_place(finished: list[Path]) -> None:
    """Move finished files next to data.py, over those of an earlier run, all or none of them."""
    begun: list[tuple[Path, Path]] = []
    try:
        for path in finished:
            final, earlier = ROOT / path.name, path.with_name(path.name + ".earlier")
            begun.append((earlier, final))
            if final.exists():
                os.replace(final, earlier)
            os.replace(path, final)
    except BaseException:  # Ctrl-C, or on Windows an array that another program holds open
        for earlier, final in begun:
            if earlier.exists():
                os.replace(earlier, final)
        raise


def slice_all(splits: dict[str, list[Patient]], size: int, oblique: int, workers: int) -> list[str]:
    """Write the arrays and tables of all splits, all or nothing; oblique slices for training only.

    They grow in a hidden folder and get their names when all are complete. Returns what was
    written, a line a split.
    """
    folder = ROOT / ".slicing"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir()
    try:
        written = [
            slice_split(
                split, patients, folder, size, range(1 + oblique * (split == "train")), workers
            )
            for split, patients in splits.items()
        ]
        put_in_place(sorted(folder.iterdir()))
        return written
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_files(paths: set[str], split: str, sliced_s: float) -> None:
    """Print which files were changed or added after slicing, `sliced_s` in seconds since 1970.

    paths : those that were sliced, from the folder of data.py. Raises FileNotFoundError for one of
    the test split that is gone.
    """
    there = {named(path) for path in (ROOT / "raw" / split).glob("[!.]*") if identify(path)}
    for path in sorted(there - paths):
        print(f"{path} is not among the slices: run `python data.py` again")
    for path in sorted(paths):
        if (ROOT / path).exists():
            if (ROOT / path).stat().st_mtime > sliced_s:
                print(f"{path} is newer than its slices: run `python data.py` again")
        elif split == "test":
            raise FileNotFoundError(
                f"{path} was sliced and is gone: put it back, or run `python data.py` again"
            )


def load_data(split: str) -> Slices:
    """Return what `load_train_data` and `load_test_data` do, for a split by name."""
    import pandas  # here, because it takes as long to import as a volume takes to slice

    paths = [ROOT / name.format(split) for name in ("imgs_{}.npy", "masks_{}.npy", "slices_{}.csv")]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{named(path)} is missing: run `python data.py` first")
    imgs, masks = (np.load(path, mmap_mode="r") for path in paths[:2])
    types = {"patient": str, "liver": "Int8"}
    unknown = {"liver": [""]}  # and no other text means that a value is missing
    slices = pandas.read_csv(paths[2], dtype=types, na_values=unknown, keep_default_na=False)
    if tuple(slices.columns) != COLUMNS:
        raise ValueError(
            f"{named(paths[2])} has the columns {', '.join(slices.columns)}, wanted "
            f"{', '.join(COLUMNS)}: run `python data.py` again"
        )
    if not len(imgs) == len(masks) == len(slices):
        raise ValueError(
            f"{named(paths[0])}, {paths[1].name} and {paths[2].name} hold {len(imgs)}, "
            f"{len(masks)} and {len(slices)} slices: run `python data.py` again"
        )
    files = {*slices["image"], *slices["mask"]} - {""}
    check_files(files, split, paths[2].stat().st_mtime)
    return Slices(imgs, masks, slices)


def load_train_data() -> Slices:
    """Return the training slices: imgs, masks and the table of slices.

    Returns
    -------
    imgs : (slices, rows, columns) uint8, 0..255 for WINDOW_HU, memory-mapped
    masks : (slices, rows, columns) uint8, 0 or 1, memory-mapped
    slices : pandas.DataFrame, a row a slice
        patient, slice (index in the file, or along a tilted axis), family (0 is axial), liver (1,
        0, or missing if the patient has no mask), image and mask (paths from the folder of data.py,
        mask "" if there is none).

    Raises
    ------
    FileNotFoundError, ValueError
        If data.py was not run, or its files do not belong together.
    """
    return load_data("train")


def load_test_data() -> Slices:
    """Return the test slices like `load_train_data`; masks of a patient without mask are 0.

    Raises FileNotFoundError also for a scan or a mask that is gone: masks are put back on its grid.
    """
    return load_data("test")


def multiple_of_16(text: str) -> int:
    """Return --size as a number. Raises argparse.ArgumentTypeError."""
    if not text.isdigit() or int(text) % 16 or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no multiple of 16, which four poolings need")
    return int(text)


def positive(text: str) -> int:
    """Return --workers as a number. Raises argparse.ArgumentTypeError."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size", type=multiple_of_16, default=SIZE, help="pixels a side (%(default)s)"
    )
    parser.add_argument(
        "--oblique",
        type=int,
        choices=range(len(TILTS)),
        default=0,
        help="tilted stacks of each training scan beside the axial one (%(default)s)",
    )
    parser.add_argument("--only", choices=("train", "test"), help="slice this split alone")
    parser.add_argument(
        "--workers", type=positive, default=min(os.cpu_count() or 1, 8), help="volumes at a time"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Slice raw/ as the command line asks; errors leave in one sentence."""
    options = parse_options(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidy up as after Ctrl-C
    try:
        splits = find_splits(options.only)
        print(*slice_all(splits, options.size, options.oblique, options.workers), sep="\n")
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
    except MemoryError:
        sys.exit("data.py: out of memory: slice one volume at a time with --workers 1")
    except KeyboardInterrupt:
        sys.exit("data.py: interrupted, the arrays of the last complete run are as they were")


if __name__ == "__main__":
    main()
