"""Slice the CT volumes in raw/ into axial 2-D arrays that train.ipynb learns from.

    python data.py                 256 x 256 pixels a slice
    python data.py --size 128      smaller and faster
    python data.py --only test     new scans for a trained model, raw/train may be empty
    python data.py --oblique 4     four tilted stacks of each training scan as well
    python data.py --label 6       masks of several organs, in which the liver is 6, as in AMOS

It reads `NAME_orig.nii.gz` with `NAME_liver.nii.gz`, or another of the LAYOUTS in raw/scans.py,
from raw/train and raw/test and writes, next to itself and for each split:

    imgs_train.npy     (slices, rows, columns) uint8, gray values of the HU window
    masks_train.npy    (slices, rows, columns) uint8, 1 in the liver and 0 elsewhere
    slices_train.csv   a line a slice: scan, patient, slice index in the file, tilt, liver, files
    scans_train.csv    a line a scan, printed too: what was read, and what is odd about it

Slices are axial and upright: the patient's right on the left of the picture, front at the top. A
slice is (rows, columns) as in the scan, a picture is a slice resized and padded to size x size.
With --oblique each training scan is cut in addition along axes that lean; tilt says how, 0 is
axial, and the slice index then counts along the tilted axis.
`restore` is the way back, from slices to the voxels of the file they came from.
"""

import csv
import os
import re
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from PIL import Image
from tqdm import tqdm

from raw import scans, volumes
from raw.scans import Files
from raw.volumes import AIR_HU, ROOT, Volume, grid, named, upright, upright_orientation

WORKERS = min(os.cpu_count() or 1, 8)  # threads; a volume each takes memory
SIZE = 256  # pixels a side as in the tutorial; four poolings want a multiple of 16
BYTES_A_VOXEL = 3, 12  # beside twice the larger file's: axial, oblique
WINDOW_HU = (-160.0, 240.0)  # the abdominal soft-tissue window: level 40, width 400
# How the stacks of tilt 0, 1, 2, ... lean, (towards, degrees): their axis, from the head towards
# 1 the back or 2 the patient's left, so that they turn about the left-right or front-back axis.
TILTS = ((1, 0), (1, 20), (2, 20), (1, -20), (2, -20))
AXIAL = range(1)  # the tilts that are cut without --oblique
FILES = ("imgs_{}.npy", "masks_{}.npy", "slices_{}.csv", "scans_{}.csv")  # of a split
COLUMNS = ("scan", "patient", "slice", "tilt", "liver", "image", "mask", "label")


class Slices(NamedTuple):
    """The slices of a split, as `load_train_data` and `load_test_data` return them."""

    imgs: np.ndarray
    masks: np.ndarray
    slices: object  # pandas.DataFrame, a row a slice


def slice_all(found: dict[str, list[Files]], faults: list[str], options: Namespace) -> None:
    """Write the arrays and tables of the splits that are asked for, all or nothing.

    Prints what they hold. Raises ValueError with a line for each scan that cannot be used, `faults`
    being what was wrong with their names.
    """
    splits = [options.only] if options.only else [*found]
    paths = {split: [ROOT / name.format(split) for name in FILES] for split in found}
    rows = {split: scans.read_table(paths[split][-1], found[split]) for split in found}
    with volumes.whole(*(path for split in splits for path in paths[split])) as drafts:
        for n, split in enumerate(splits):
            files = drafts[len(FILES) * n :][: len(FILES)]
            rows[split] = slice_split(split, found[split], files, faults, options)
        faults += scans.find_copies(rows) + scans.find_no_liver(rows, splits)
        if faults:
            raise ValueError("\ndata.py: ".join(faults))
        for split, table in zip(splits, drafts[len(FILES) - 1 :: len(FILES)], strict=True):
            scans.write_table(table, rows[split])
    for split in splits:
        scans.report(split, rows[split], options.size)


def slice_split(
    split: str, found: list[Files], paths: list[Path], faults: list[str], options: Namespace
) -> list[dict]:
    """Write the two arrays and the table of slices of a split to paths, scans in parallel.

    Adds to faults what is wrong. Returns what the scans hold.
    """
    *arrays, table, _ = paths
    tilts = range(1 + options.oblique * (split == "train"))
    odd = scans.check_all(found, split, options.mask_on_image_grid, faults)
    starts = np.cumsum([0, *(len(list_slices(files.image, tilts)) for files in odd)]).tolist()
    for path in arrays:  # all of it, so that a full disk is an error now
        np.save(path, np.broadcast_to(np.uint8(0), (starts[-1], options.size, options.size)))
    workers = scans.fitting_workers(odd, BYTES_A_VOXEL[len(tilts) > 1], options.workers)
    pool = ThreadPoolExecutor(workers)  # unzipping and resizing release Python's lock
    try:
        jobs = [
            pool.submit(slice_scan, *scan, arrays, start, tilts, options)
            for scan, start in zip(odd.items(), starts[:-1], strict=True)
        ]
        sliced = finish(jobs, f"raw/{split}", faults)
    finally:
        pool.shutdown(cancel_futures=True)
    with open(table, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([COLUMNS, *(line for lines, _ in sliced for line in lines)])
    return [row for _, row in sliced]


def finish(jobs: list[Future], what: str, faults: list[str]) -> list:
    """Return the results of the jobs that could be done, and add to faults why others could not."""
    for job in tqdm(as_completed(jobs), what, len(jobs), unit=" volumes"):
        if not isinstance(error := job.exception(), ValueError | None):
            raise error
    results = []
    for job in jobs:
        with scans.noting(faults):
            results.append(job.result())
    return results


def slice_scan(
    files: Files, odd: list[str], arrays: list[Path], start: int, tilts: range, options: Namespace
) -> tuple[list[tuple], dict]:
    """Write a scan's pictures into two .npy files, from a slice on.

    Returns lines of the table of slices, and what the scan holds beside what is odd about its
    headers. Raises ValueError if a file cannot be used.
    """
    imgs, masks = (np.load(path, mmap_mode="r+")[start:] for path in arrays)
    places = list_slices(files.image, tilts)
    has_liver, liver, mask_name = [""] * len(places), None, ""  # unknown without a mask
    if files.mask:
        liver = volumes.read_liver(files.mask, options.label, files.image)
        mask_name = named(files.mask)
        pictures = slice_mask(liver.voxels, files.image, options.size, tilts)
        has_liver = pictures.any(axis=(1, 2)).astype(int).tolist()
        masks[: len(places)] = pictures
    image = volumes.read_image(files.image)
    row = scans.measure(files, image, liver, odd)
    del liver  # before tilted stacks take more
    imgs[: len(places)] = slice_image(image, files.image, options.size, tilts)
    row |= {"slices": len(places), "with_liver": has_liver.count(1)}
    row["oblique"] = sum(tilt > 0 for _, tilt in places)
    whose, rest = (files.scan, files.patient), (named(files.image), mask_name, options.label)
    return [(*whose, *at, has, *rest) for at, has in zip(places, has_liver, strict=True)], row


def slice_image(image: Volume, scan: Path, size: int, tilts: range = AXIAL) -> np.ndarray:
    """Return a CT volume as pictures, (slices, size, size) uint8, gray values of WINDOW_HU."""
    voxels, slope, inter, _ = image
    slices = cut(voxels, scan, tilts, outside=(AIR_HU - inter) / slope)
    grays = (to_gray(pixels.astype(np.float32) * slope + inter) for pixels in slices)
    return to_pictures(grays, scan, size, tilts)


def slice_mask(liver: np.ndarray, scan: Path, size: int, tilts: range = AXIAL) -> np.ndarray:
    """Return a liver, (x, y, z) bool, as pictures of 0 and 1, (slices, size, size) uint8.

    The scan's header rules for both, so that rounding in the mask's cannot part them.
    """
    slices = cut(liver, scan, tilts, outside=0)
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
    voxels, slope, inter, _ = volumes.read_image(scan)
    stack = upright(voxels, scan)
    return np.stack([to_gray(pixels.astype(np.float32) * slope + inter) for pixels in stack])


def load_data(split: str) -> Slices:
    """Return what `load_train_data` and `load_test_data` do, for a split by name."""
    import pandas  # here, because it takes as long to import as a volume takes to slice

    paths = [ROOT / name.format(split) for name in FILES[:3]]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{named(path)} is missing: run `python data.py` first")
    imgs, masks = (np.load(path, mmap_mode="r") for path in paths[:2])
    options = {
        "dtype": {"scan": str, "patient": str, "liver": "Int8", "label": str},
        "na_values": {"liver": [""]},  # and no other text means that a value is missing
        "encoding_errors": "surrogateescape",
    }
    slices = pandas.read_csv(paths[2], keep_default_na=False, **options)
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
    scans.check_files({*slices["image"], *slices["mask"]} - {None}, split, paths[2].stat().st_mtime)
    return Slices(imgs, masks, slices)


def load_train_data() -> Slices:
    """Return the training slices: imgs, masks and the table of slices.

    Returns
    -------
    imgs : (slices, rows, columns) uint8, 0..255 for WINDOW_HU, memory-mapped
    masks : (slices, rows, columns) uint8, 0 or 1, memory-mapped
    slices : pandas.DataFrame, a row a slice
        scan, patient (the scan, or what raw/patients.csv says), slice (index in the file, or along
        a tilted axis), tilt (0 is axial), liver (1, 0, or missing if the scan has no mask), image
        and mask (Path; mask None if there is none), label (of `volumes.read_mask`).

    Raises
    ------
    FileNotFoundError, ValueError
        If data.py was not run, or its files do not belong together.
    """
    return load_data("train")


def load_test_data() -> Slices:
    """Return the test slices like `load_train_data`; masks of a scan without mask are 0.

    Raises FileNotFoundError also for a scan or a mask that is gone: masks are put back on its grid.
    """
    return load_data("test")


def parse_options(arguments: list[str] | None) -> Namespace:
    """Return the command line's options."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", type=int, default=SIZE, help="pixels a side (%(default)s)")
    tilts = range(len(TILTS))
    add("--oblique", type=int, choices=tilts, default=0, help="tilted stacks of a training scan")
    add("--only", choices=("train", "test"), help="slice this split alone")
    add("--label", default="", help="which label of the masks is liver: a number, or all")
    add("--mask-on-image-grid", action="store_true", help="masks lie on their image's voxels")
    add("--workers", type=int, default=WORKERS, help="volumes at a time, at most (%(default)s)")
    options = parser.parse_args(arguments)
    if options.size < 16 or options.size % 16:
        parser.error(f"--size {options.size} is no multiple of 16, which four poolings need")
    if not re.fullmatch(r"|all|[1-9]\d*", options.label):
        parser.error(f"--label {options.label}: wanted a number above 0, or all")
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: wanted 1 or more")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Slice raw/ as the command line asks; errors leave in one sentence."""
    options = parse_options(arguments)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know a name's letters
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidy up as after Ctrl-C
    try:
        slice_all(*scans.find_scans(options.only), options)
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
    except MemoryError:
        sys.exit("data.py: out of memory: slice one volume at a time with --workers 1")
    except KeyboardInterrupt:
        sys.exit("data.py: interrupted, the arrays of the last complete run are as they were")


if __name__ == "__main__":
    main()
