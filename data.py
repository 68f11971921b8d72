"""Slice the CT volumes in raw/ into axial 2-D arrays that train.ipynb learns from.

    python data.py                 256 x 256 pixels a slice
    python data.py --size 128      smaller and faster
    python data.py --only test     new scans for a trained model, raw/train may be empty
    python data.py --oblique 4     four tilted stacks of each training scan as well

It reads `NAME_orig.nii.gz` with `NAME_liver.nii.gz` (or LiTS's `volume-N` with `segmentation-N`,
`.nii` or `.nii.gz`) from raw/train and raw/test and writes, next to itself and for each split:

    imgs_train.npy     (slices, rows, columns) uint8, gray values of the HU window
    masks_train.npy    (slices, rows, columns) uint8, 1 in the liver and 0 elsewhere
    slices_train.csv   a line a slice: patient, slice index in the file, tilt, liver or not, files

Slices are axial and upright: the patient's right on the left of the picture, front at the top. A
slice is (rows, columns) as in the scan, a picture is a slice resized and padded to size x size.
With --oblique each training scan is cut in addition along axes that lean; tilt says how, 0 is
axial, and the slice index then counts along the tilted axis.
`restore` is the way back, from slices to the voxels of the file they came from.
"""

import argparse
import csv
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel import orientations
from PIL import Image
from tqdm import tqdm

from raw import volumes
from raw.volumes import ROOT, Patient, named

WORKERS = min(os.cpu_count() or 1, 8)  # threads; a volume each takes memory
SIZE = 256  # pixels a side as in the tutorial; four poolings want a multiple of 16
WINDOW_HU = (-160.0, 240.0)  # the abdominal soft-tissue window: level 40, width 400
# How the stacks of tilt 0, 1, 2, ... lean, (towards, degrees): their axis, from the head towards
# 1 the back or 2 the patient's left, so that they turn about the left-right or front-back axis.
TILTS = ((1, 0), (1, 20), (2, 20), (1, -20), (2, -20))
AXIAL = range(1)  # the tilts that are cut without --oblique
AIR_HU = -1000.0  # what lies beyond a volume
FILES = ("imgs_{}.npy", "masks_{}.npy", "slices_{}.csv")  # what a split is written to
COLUMNS = ("patient", "slice", "tilt", "liver", "image", "mask")


class Slices(NamedTuple):
    """The slices of a split, as `load_train_data` and `load_test_data` return them."""

    imgs: np.ndarray
    masks: np.ndarray
    slices: object  # pandas.DataFrame, a row a slice


def slice_all(splits: dict[str, list[Patient]], size: int, oblique: int, workers: int) -> list[str]:
    """Write the arrays and tables of all splits, all or nothing; oblique slices for training only.

    Returns what was written, a line a split.
    """
    for patient in sum(splits.values(), []):
        volumes.check_patient(patient)
    paths = [ROOT / name.format(split) for split in splits for name in FILES]
    written = []
    with volumes.whole(*paths) as drafts:
        for n, (split, patients) in enumerate(splits.items()):
            tilts = range(1 + oblique * (split == "train"))
            files = drafts[3 * n : 3 * n + 3]
            written.append(slice_split(split, patients, files, size, tilts, workers))
    return written


def slice_split(
    split: str, patients: list[Patient], paths: list[Path], size: int, tilts: range, workers: int
) -> str:
    """Write the two arrays and the table of a split to three paths, patients in parallel.

    Returns a line that says what was written.
    """
    imgs, masks, table = paths
    counts = [len(list_slices(patient.image, tilts)) for patient in patients]
    starts = np.cumsum([0, *counts]).tolist()
    for path in (imgs, masks):  # all of it, so that a full disk is an error now
        np.save(path, np.broadcast_to(np.uint8(0), (starts[-1], size, size)))
    pool = ThreadPoolExecutor(workers)  # unzipping and resizing release Python's lock
    try:
        jobs = [
            pool.submit(slice_patient, patient, split, imgs, masks, start, size, tilts)
            for patient, start in zip(patients, starts[:-1], strict=True)
        ]
        for job in tqdm(as_completed(jobs), f"raw/{split}", len(jobs), unit=" volumes"):
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)
    lines = [line for job in jobs for line in job.result()]
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *lines])
    with_liver = sum(line[COLUMNS.index("liver")] == 1 for line in lines)
    oblique = sum(line[COLUMNS.index("tilt")] > 0 for line in lines)
    return (
        f"{split}: {len(patients)} patients, {len(lines)} slices of {size} x {size}, "
        f"{with_liver} with liver" + (f", {oblique} oblique" if oblique else "")
    )


def slice_patient(
    patient: Patient, split: str, imgs: Path, masks: Path, start: int, size: int, tilts: range
) -> list[tuple]:
    """Write a patient's pictures into two .npy files, from a slice on; return lines of the table.

    Raises ValueError if a file cannot be used, or if a training mask is empty.
    """
    places = list_slices(patient.image, tilts)
    here = slice(start, start + len(places))
    np.load(imgs, mmap_mode="r+")[here] = slice_image(patient.image, size, tilts)
    liver, mask_name = [""] * len(places), ""  # unknown without a mask
    if patient.mask:
        pictures = slice_mask(patient.mask, patient.image, size, tilts)
        liver, mask_name = pictures.any(axis=(1, 2)).astype(int).tolist(), named(patient.mask)
        if split == "train" and not any(liver):
            raise ValueError(
                f"{mask_name} holds no liver at all, wanted voxels above 0: replace it, or take "
                "the patient out of raw/train"
            )
        np.load(masks, mmap_mode="r+")[here] = pictures
    files = named(patient.image), mask_name
    return [(patient.name, *place, has, *files) for place, has in zip(places, liver, strict=True)]


def slice_image(path: Path, size: int, tilts: range = AXIAL) -> np.ndarray:
    """Return a CT volume as pictures, (slices, size, size) uint8, gray values of WINDOW_HU."""
    voxels, slope, inter = volumes.read_image(path)
    slices = cut(voxels, path, tilts, outside=(AIR_HU - inter) / slope)
    grays = (to_gray(pixels.astype(np.float32) * slope + inter) for pixels in slices)
    return to_pictures(grays, path, size, tilts)


def slice_mask(path: Path, scan: Path, size: int, tilts: range = AXIAL) -> np.ndarray:
    """Return the liver mask of a scan as pictures of 0 and 1, (slices, size, size) uint8.

    The scan's header rules for both, so that rounding in the mask's cannot part them.
    """
    slices = cut(volumes.read_mask(path), scan, tilts, outside=0)
    grays = (pixels.astype(np.uint8) * 255 for pixels in slices)
    return (to_pictures(grays, scan, size, tilts) >= 128).astype(np.uint8)


def list_slices(scan: Path, tilts: range) -> list[tuple[int, int]]:
    """Return number and tilt of the slices of a scan, in the order that `cut` yields them."""
    return [(number, tilt) for tilt in tilts for number in slice_numbers(scan, tilt)]


def cut(volume: np.ndarray, scan: Path, tilts: range, outside: float) -> Iterator[np.ndarray]:
    """Yield the slices, (rows, columns), of a volume (x, y, z) on a scan's voxels.

    Tilted slices are interpolated, float32, or for a mask cut at one half; `outside` is the value
    beyond the volume.
    """
    stack = upright(volume, scan)
    for tilt in tilts:
        yield from tilted(stack, scan, tilt, outside) if tilt else stack


def to_gray(hu: np.ndarray) -> np.ndarray:
    """Return Hounsfield units as uint8, WINDOW_HU spread over 0..255, clipped at its ends."""
    low, high = WINDOW_HU
    return (np.clip((hu - low) * (255 / (high - low)), 0, 255) + 0.5).astype(np.uint8)


def to_pictures(cuts: Iterable[np.ndarray], scan: Path, size: int, tilts: range) -> np.ndarray:
    """Return slices (rows, columns) uint8 of a scan as pictures, (slices, size, size) uint8.

    The padding is 0 (air, background).
    """
    inside = frame(scan, size)
    pictures = np.zeros((len(list_slices(scan, tilts)), size, size), np.uint8)
    for picture, pixels in zip(pictures, map(np.ascontiguousarray, cuts), strict=True):
        if pixels.any():
            picture[inside] = resize(pixels, *picture[inside].shape)
    return pictures


def resize(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return a (rows, columns) picture, uint8 or float32, at another size.

    Linear interpolation; Pillow widens the filter when it shrinks, which is the low-pass.
    """
    resampling = Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(picture).resize((columns, rows), resampling))


def frame(scan: Path, size: int) -> tuple[slice, slice]:
    """Return the rows and columns that a slice of a scan fills in a picture of size x size pixels.

    Its longer side in mm fills the picture, the shorter one is centred: proportions are kept.
    """
    shape, spacing_mm = grid(scan)
    sides_mm = (shape * spacing_mm)[1:]
    pixels = np.maximum(np.rint(sides_mm / sides_mm.max() * size).astype(int), 1)
    return tuple(slice((size - n) // 2, (size - n) // 2 + n) for n in pixels)


def upright_orientation(scan: Path) -> np.ndarray:
    """Return nibabel's orientation transform from the axes of a scan to the closest of L, P, S."""
    stored = orientations.io_orientation(volumes.open_volume(scan).affine)
    return orientations.ornt_transform(stored, orientations.axcodes2ornt("LPS"))


def upright(volume: np.ndarray, scan: Path) -> np.ndarray:
    """Return a volume (x, y, z) on a scan's voxels as upright axial slices, a view.

    (slices, rows, columns): slices from the feet up, rows from front to back, columns from the
    patient's right to left.
    """
    lps = orientations.apply_orientation(volume, upright_orientation(scan))  # (L, P, S)
    return lps.transpose(2, 1, 0)  # (slices, rows, columns)


def grid(scan: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the shape of a scan's upright stack and its spacing in mm: slices, rows, columns."""
    image = volumes.open_volume(scan)
    axes = np.argsort(upright_orientation(scan)[:, 0])[::-1]  # the file's axes along S, P and L
    return np.array(image.shape)[axes], nib.affines.voxel_sizes(image.affine)[axes]


def tilt_transform(scan: Path, tilt: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrix (3, 3) and offset (3,) that lead from a tilted stack to the upright one.

    They map indices (slice, row, column). The tilted stack has the upright one's shape, spacing and
    middle, and is turned about it as TILTS says, in mm along the axes of the file.
    """
    shape, spacing_mm = grid(scan)
    towards, degrees = TILTS[tilt]
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.eye(3)
    turn[[0, 0, towards, towards], [0, towards, 0, towards]] = cos, -sin, sin, cos
    matrix = turn * spacing_mm / spacing_mm[:, None]
    return matrix, (shape - 1) / 2 - matrix @ (shape - 1) / 2


def tilted(stack: np.ndarray, scan: Path, tilt: int, outside: float) -> np.ndarray:
    """Return the tilted slices of an upright stack that are not dropped, interpolated linearly.

    (slices, rows, columns) float32, or for a mask bool, cut at one half.
    """
    from scipy import ndimage  # here, because importing it takes as long as slicing a volume

    matrix, offset = tilt_transform(scan, tilt)
    options = {"output": np.float32, "order": 1, "cval": outside}
    turned = ndimage.affine_transform(stack.astype(np.float32), matrix, offset, **options)
    return (turned >= 0.5 if stack.dtype == bool else turned)[slice_numbers(scan, tilt)]


def slice_numbers(scan: Path, tilt: int = 0) -> list[int]:
    """Return the numbers, from 0, of a tilt's slices: in the file, or along the tilted axis.

    They come in the order of the stack, from the feet up. A tilted slice is dropped if half of it
    or more lies outside the volume.
    """
    shape, _ = grid(scan)
    if tilt == 0:
        to_lps = upright_orientation(scan)
        upwards = int(to_lps[to_lps[:, 0] == 2, 1].item())  # -1 if the file's slices run down
        return list(range(shape[0]))[::upwards]
    matrix, offset = tilt_transform(scan, tilt)
    samples = [(np.arange(64) + 0.5) / 64 * n - 0.5 for n in shape[1:]]  # 64 rows and columns do
    places = np.stack(np.meshgrid(np.arange(shape[0]), *samples, indexing="ij"), axis=-1)
    places = places @ matrix.T + offset  # (slices, 64, 64, 3) in the upright stack
    inside = ((places >= -0.5) & (places <= shape - 0.5)).all(axis=-1).mean(axis=(1, 2))
    return np.flatnonzero(inside > 0.5).tolist()


def restore(stack: np.ndarray, scan: Path) -> np.ndarray:
    """Return predictions for the axial slices of a scan as a mask on its voxels.

    Parameters
    ----------
    stack : (slices, size, size) bool, uint8 or float, 0..1
        Masks or probabilities in the order of the arrays that data.py writes.
    scan : Path
        The NIfTI file that the slices come from; only its header is read.

    Returns
    -------
    (x, y, z) uint8, 0 or 1
        On the axes of the file. Probabilities are interpolated, then cut at 0.5.

    Raises
    ------
    ValueError
        If the number of slices is not the file's.
    """
    (slices, rows, columns), _ = grid(scan)
    if len(stack) != slices:
        raise ValueError(
            f"{named(scan)} has {slices} slices but {len(stack)} are to be put back: if it was "
            "changed, run `python data.py` again"
        )
    inside = frame(scan, stack.shape[1])
    mask = np.zeros(volumes.open_volume(scan).shape[:3], np.uint8, order="F")  # as files do

    def put_back(pixels: np.ndarray, picture: np.ndarray) -> None:
        if picture.max() >= 0.5:  # interpolation never goes above what it is given
            pixels[:] = resize(picture[inside].astype(np.float32), rows, columns) >= 0.5

    with ThreadPoolExecutor(WORKERS) as pool:  # Pillow releases Python's lock
        list(pool.map(put_back, upright(mask, scan), stack))
    return mask


def write_mask(path: Path, mask: np.ndarray, scan: Path) -> None:
    """Write a mask as gzipped NIfTI that any viewer lays over the scan it belongs to.

    The header is the scan's: shape, affine with its codes, units. The file appears whole or not at
    all.

    Parameters
    ----------
    path : Path
        Where to, a name that ends with .nii.gz.
    mask : (x, y, z) uint8 or bool, 0 or 1
        On the axes of the scan, as `restore` returns it.
    scan : Path
        Only its header is read.

    Raises
    ------
    ValueError
        If the mask does not have the scan's shape.
    """
    image = volumes.open_volume(scan)
    wanted, found = volumes.sides(image.shape[:3]), volumes.sides(mask.shape)
    if found != wanted:
        raise ValueError(f"{named(scan)} is {wanted} but its mask is {found}: make it with restore")
    header = image.header.copy()
    header.set_data_dtype(np.uint8)
    header["cal_min"], header["cal_max"] = 0, 1  # the gray values a viewer starts with
    header.extensions.clear()  # they describe the scan, sometimes with the patient's name
    for name in {"descrip", "aux_file", "db_name"} & set(header.keys()):  # so do these
        header[name] = b""
    with volumes.whole(path) as (draft,):
        voxels = mask.astype(np.uint8).reshape(image.shape)
        nib.save(type(image)(voxels, image.affine, header), draft)


def read_gray(scan: Path) -> np.ndarray:
    """Return a CT volume upright, (slices, rows, columns) uint8, WINDOW_HU spread over 0..255."""
    voxels, slope, inter = volumes.read_image(scan)
    stack = upright(voxels, scan)
    return np.stack([to_gray(pixels.astype(np.float32) * slope + inter) for pixels in stack])


def load_data(split: str) -> Slices:
    """Return what `load_train_data` and `load_test_data` do, for a split by name."""
    import pandas  # here, because it takes as long to import as a volume takes to slice

    paths = [ROOT / name.format(split) for name in FILES]
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
    for column in ("image", "mask"):
        slices[column] = [ROOT / name if name else None for name in slices[column]]
    check_files({*slices["image"], *slices["mask"]} - {None}, split, paths[2].stat().st_mtime)
    return Slices(imgs, masks, slices)


def check_files(paths: set[Path], split: str, sliced_s: float) -> None:
    """Print which files were changed or added after slicing, `sliced_s` in seconds since 1970.

    Raises FileNotFoundError for one of the test split that is gone.
    """
    there = {path for path in (ROOT / "raw" / split).glob("[!.]*") if volumes.identify(path)}
    for path in sorted(there - paths):
        print(f"{named(path)} is not among the slices: run `python data.py` again")
    for path in sorted(paths):
        if path.exists():
            if path.stat().st_mtime > sliced_s:
                print(f"{named(path)} is newer than its slices: run `python data.py` again")
        elif split == "test":
            raise FileNotFoundError(
                f"{named(path)} was sliced and is gone: put it back, or run `python data.py` again"
            )


def load_train_data() -> Slices:
    """Return the training slices: imgs, masks and the table of slices.

    Returns
    -------
    imgs : (slices, rows, columns) uint8, 0..255 for WINDOW_HU, memory-mapped
    masks : (slices, rows, columns) uint8, 0 or 1, memory-mapped
    slices : pandas.DataFrame, a row a slice
        patient, slice (index in the file, or along a tilted axis), tilt (0 is axial), liver (1, 0,
        or missing if the patient has no mask), image and mask (Path; mask None if there is none).

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


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", type=int, default=SIZE, help="pixels a side (%(default)s)")
    tilts = range(len(TILTS))
    add("--oblique", type=int, choices=tilts, default=0, help="tilted stacks of a training scan")
    add("--only", choices=("train", "test"), help="slice this split alone")
    add("--workers", type=int, default=WORKERS, help="volumes at a time (%(default)s)")
    options = parser.parse_args(arguments)
    if options.size < 16 or options.size % 16:
        parser.error(f"--size {options.size} is no multiple of 16, which four poolings need")
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: wanted 1 or more")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Slice raw/ as the command line asks; errors leave in one sentence."""
    options = parse_options(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidy up as after Ctrl-C
    try:
        splits = volumes.find_patients(options.only)
        print(*slice_all(splits, options.size, options.oblique, options.workers), sep="\n")
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
    except MemoryError:
        sys.exit("data.py: out of memory: slice one volume at a time with --workers 1")
    except KeyboardInterrupt:
        sys.exit("data.py: interrupted, the arrays of the last complete run are as they were")


if __name__ == "__main__":
    main()
