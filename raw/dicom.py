"""Bring a CT series from DICOM files to raw/test, and its liver mask back to DICOM.

    python raw/dicom.py FOLDER             a CD or an export, nested as it likes; its best series
    python raw/dicom.py FOLDER --series 3  another one of the table that is printed; --all takes all
    python raw/dicom.py FOLDER --mask preds/NAME_liver.nii.gz

The first two write raw/test/NAME_orig.nii.gz (int16, HU), the last preds/NAME_liver.dcm, a DICOM
segmentation that a viewer lays over its series. NAME is that of the folder or --name, never the
patient's; nothing that tells who he is gets into a file or is printed, and a slice is named by its
number in the series, not by its file.
"""

import argparse
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
from pydicom.filereader import read_file_meta_info
from pydicom.multival import MultiValue
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import JPEGExtended12Bit
from scipy import ndimage
from tqdm import tqdm
from volumes import ROOT, as_nifti, damaged, named, one_sentence, sides, whole

AGAIN = "get the data again from where it came"
JUNK = re.compile(r"(^|/)(\.[^/]*|__MACOSX|DICOMDIR|Thumbs\.db|desktop\.ini)(/|$)", re.IGNORECASE)
STORED_AXES = "LAS"  # nibabel's axis codes, those of the NIfTI files the tutorial used
STEP_TOLERANCE = 0.1  # of a slice distance: positions may be rounded, a missing slice is off by 1
GRID_TOLERANCE = 1e-4  # mm between pixels, or of a direction's cosine: noise of 32-bit floats
SAME_MM = 0.01  # between slices that are meant to be at one position
DRIFT_PIXELS = 0.5  # by which slices of an upright gantry may lie aside, the last from the first
AIR_HU = -1024  # what padding becomes, the lowest value of a 12-bit CT
UNITS = (None, "", "HU", "HU_MOD", "US")  # of rescaled values; US: unspecified

WHO = ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber")  # kept out of all
GRID = ("PixelSpacing", "ImageOrientationPatient")
FRAMES = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "NumberOfFrames")
STUDY = ("StudyDate", "StudyTime", "StudyInstanceUID")
COLUMNS = ("series", "study", "description", "slices", "spacing_mm", "kernel", "size")
SERIES = ("StudyInstanceUID", "SeriesInstanceUID", "SeriesNumber", "Modality", "ConvolutionKernel")
TIMES = ("TemporalPositionIdentifier", "TemporalPositionIndex", "AcquisitionNumber")
TIMES += ("AcquisitionDate", "AcquisitionTime")
KEYWORDS = {*WHO, *GRID, *FRAMES, *STUDY, *SERIES, *TIMES, "SpecificCharacterSet", "ImageType"}
KEYWORDS |= {"SOPInstanceUID", "InstanceNumber", "SeriesDescription", "ImagePositionPatient"}
KEYWORDS |= {"Rows", "Columns", "SamplesPerPixel", "BitsStored", "PhotometricInterpretation"}
KEYWORDS |= {"RescaleSlope", "RescaleIntercept", "RescaleType"}
# kernels for lung and bone as the makers write them: LUNG, BONEPLUS; B70f, Bl57; FC51; YA
SHARP = re.compile(
    r"lung|bone|edge|^[bhijqu][a-z]*(5[5-9]|[6-9]\d)|^fc[3-9]\d|^(l|y[a-c])$", re.IGNORECASE
)


class Slice(NamedTuple):
    """A slice: how it is named, its header, a function that reads its stored values, its file.

    The values are (rows, columns); `frame` counts from 0 in a file of several slices.
    """

    path: Path
    header: pydicom.Dataset
    read: Callable[[], np.ndarray]
    file: Path | None = None
    frame: int = 0


class Series(NamedTuple):
    """The slices of a series in their order, and why it is no scan of a volume, if it is not."""

    slices: list[Slice]
    fault: str


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Let an error name the file that is read."""
    try:
        yield
    except Exception as error:  # zipfile and pydicom have a class of error for each kind of damage
        raise damaged(str(path), error, f"copy it again, or {AGAIN}") from error


def vector(one: Slice, keyword: str, length: int) -> np.ndarray:
    """Return the numbers of a header field, (length,). Raises ValueError if they are not there."""
    value = one.header.get(keyword)
    if value is None or np.size(value) != length:
        raise ValueError(f"{one.path} has no {keyword} in its header: {AGAIN}")
    return np.array(value, float).reshape(length)


def heights(slices: list[Slice], images: list[Slice]) -> np.ndarray:
    """Return where slices lie, (slices,) mm along the normal of the image slices."""
    across, down = vector(images[0], "ImageOrientationPatient", 6).reshape(2, 3)
    positions = [vector(one, "ImagePositionPatient", 3) for one in slices]  # (slices, xyz)
    return np.array(positions) @ np.cross(across, down)


def number(one: Slice, keyword: str) -> int:
    """Return a whole number of the header, 0 if there is none."""
    value = str(one.header.get(keyword)).strip()
    return int(value) if value.isdecimal() else 0


def shape(one: Slice) -> tuple[int, ...]:
    """Return (rows, columns) of a slice, or (frames, rows, columns) if its file holds several."""
    sizes = [number(one, keyword) for keyword in ("NumberOfFrames", "Rows", "Columns")]
    return tuple(sizes[sizes[0] < 2 :])


def grid(one: Slice) -> str:
    """Return what all slices of a scan have in common, as a person writes it."""
    spacing_mm = vector(one, "PixelSpacing", 2).round(4).tolist()
    axes = (vector(one, "ImageOrientationPatient", 6).round(4) + 0).tolist()  # no -0 but 0
    return f"{sides(shape(one))} pixels of {sides(spacing_mm)} mm along {axes}"


def on_one_grid(one: Slice, other: Slice) -> bool:
    """Say whether two slices have the same pixels and directions, be it none."""
    values = [
        np.hstack([shape(s), *(np.ravel(s.header.get(k) or []).astype(float) for k in GRID)])
        for s in (one, other)
    ]
    return values[0].shape == values[1].shape and np.allclose(*values, rtol=0, atol=GRID_TOLERANCE)


def order_slices(slices: list[Slice]) -> list[Slice]:
    """Return the slices of a CT by their position along the normal; names do not count.

    Raises ValueError if they are not one scan, or if a position is there twice or is missing.
    """
    first, wanted = slices[0], grid(slices[0])
    for one in slices:  # the SeriesInstanceUID is not asked: two series meet at the same positions
        if (found := grid(one)) != wanted and not on_one_grid(one, first):
            raise ValueError(f"{one.path} is {found}, but {first.path.name} {wanted}: {AGAIN}")
    if len(slices) < 2:
        raise ValueError(f"{first.path} is the only slice, wanted a whole scan: {AGAIN}")
    slices = [slices[k] for k in np.argsort(heights(slices, slices))]
    steps_mm = np.diff(heights(slices, slices))
    usual_mm = np.median(steps_mm)
    for (one, other), step_mm in zip(pairwise(slices), steps_mm, strict=True):
        if not abs(step_mm - usual_mm) < STEP_TOLERANCE * usual_mm:
            raise ValueError(
                f"{one.path} and {other.path.name} lie {step_mm:g} mm apart and other neighbours "
                f"{usual_mm:g} mm, as if a slice were missing or there twice: {AGAIN}"
            )
    return slices


def make_affine(slices: list[Slice]) -> np.ndarray:
    """Return the affine (4, 4) from voxel (column, row, slice) to NIfTI's world, mm.

    DICOM's world grows to the patient's left, back and head (LPS), NIfTI's to the right, front and
    head (RAS). ImageOrientationPatient has the direction along a row, across columns, first;
    PixelSpacing has the distance of the rows first. Noise of 32-bit floats is rounded away.
    """
    across, down = vector(slices[0], "ImageOrientationPatient", 6).reshape(2, 3)
    row_mm, column_mm = vector(slices[0], "PixelSpacing", 2).round(6)
    first, last = (vector(slices[k], "ImagePositionPatient", 3) for k in (0, -1))
    step = (last - first) / (len(slices) - 1)
    step *= np.linalg.norm(step).round(6) / np.linalg.norm(step)
    lps = np.eye(4)
    lps[:3] = np.column_stack([across * column_mm, down * row_mm, step, first.round(4)])
    return np.diag([-1, -1, 1, 1]) @ lps


def rescale(one: Slice) -> tuple[float, float]:
    """Return slope and intercept from stored values to HU."""
    slope, intercept = map(one.header.get, ("RescaleSlope", "RescaleIntercept"))
    return float(slope or 1), float(intercept or 0)


def to_hu(slices: list[Slice]) -> np.ndarray:
    """Return the CT as (columns, rows, slices) int16, HU. Raises ValueError for what overflows."""
    rows, columns = shape(slices[0])
    volume = np.empty((columns, rows, len(slices)), np.int16, order="F")
    for k, one in enumerate(slices):
        slope, intercept = rescale(one)
        hu = np.rint(one.read() * slope + intercept)
        low, high = hu.min(), hu.max()
        if low < -(2**15) or high >= 2**15:
            raise ValueError(f"{one.path} holds {low:g} to {high:g} HU, wanted 16 bits: {AGAIN}")
        volume[:, :, k] = hu.T  # (rows, columns) -> (columns, rows)
    return volume


def write_volumes(volumes: dict[Path, np.ndarray], affine: np.ndarray) -> None:
    """Write volumes on one affine, all or none. Raises ValueError if another file is there."""
    with whole(*volumes) as drafts:
        for (path, volume), draft in zip(volumes.items(), drafts, strict=True):
            nib.save(as_nifti(volume, affine, STORED_AXES), draft)  # gzipped without a date
            if path.exists() and path.read_bytes() != draft.read_bytes():
                raise ValueError(f"{named(path)} would be overwritten: take it away")


load = lru_cache(maxsize=1)(pydicom.dcmread)  # a file of many slices is asked for each of them


def read_frame(one: Slice, inverted: bool = False) -> np.ndarray:
    """Return the stored values of a slice, (rows, columns) int32, with air for padding."""
    with reading(one.path):
        header = load(one.file)
        pixels = pixel_array(header, index=one.frame)
    values = pixels.astype(np.int32)
    padding = header.get("PixelPaddingValue")
    limit = header.get("PixelPaddingRangeLimit", padding)
    if inverted:
        values = (-1 if header.PixelRepresentation else 2**header.BitsStored - 1) - values
    if padding is not None:
        # 63536 is -2000 where the header was written as unsigned and the pixels are not
        low, high = np.sort(np.array([padding, limit]).astype(pixels.dtype))
        slope, intercept = rescale(one)
        values[(pixels >= low) & (pixels <= high)] = round((AIR_HU - intercept) / slope)
    return values


def frames(header: pydicom.Dataset) -> Iterator[pydicom.Dataset]:
    """Yield the header of each slice in a file, as if it had a file of its own."""
    groups = header.get("PerFrameFunctionalGroupsSequence")
    if not groups:
        yield header
        return
    common = {e.tag: e for e in header if e.keyword in KEYWORDS and e.keyword not in FRAMES}
    shared = header.get("SharedFunctionalGroupsSequence") or [()]
    for count, group in enumerate(groups, 1):
        flat = pydicom.Dataset(dict(common))
        for sequence in (*shared[0], *group):
            if sequence.VR == "SQ" and sequence.value:
                flat.update({e.tag: e for e in sequence.value[0] if e.keyword in KEYWORDS})
        flat.InstanceNumber = count
        yield flat


def find_slices(folder: Path) -> list[Slice]:
    """Return the slices of all DICOM files below a folder, each once; their pixels are not read."""
    found: dict[tuple, Slice] = {}
    passed: Counter = Counter()
    for path in tqdm(sorted(folder.rglob("*")), "headers", unit=" files"):
        if not path.is_file() or JUNK.search(path.relative_to(folder).as_posix()):
            continue
        try:
            file = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(KEYWORDS))
            headers = [header for header in frames(file) if list(header)]  # decodes all fields
        except Exception as error:  # pydicom has a class of error for each kind of damage
            passed[f"not read ({type(error).__name__})"] += 1
            continue
        for frame, header in enumerate(headers):
            shown = Path(f"image {header.get('InstanceNumber', '?')}")
            one = Slice(shown, header, bytes, path, frame)
            place = str(header.get("ImagePositionPatient"))  # some have one UID for all their files
            key = file.get("SOPInstanceUID") or path, frame, place
            passed["there twice and taken once"] += key in found
            found.setdefault(key, one._replace(read=partial(read_frame, one)))
    print("".join(f"files or frames {what}: {n}\n" for what, n in passed.items() if n), end="")
    return list(found.values())


def split_series(slices: list[Slice]) -> list[list[Slice]]:
    """Return the slices of each series; a scout in the series of its scan is one of its own."""
    found: dict[tuple, list[list[Slice]]] = {}
    for one in slices:
        alike = found.setdefault(tuple(str(one.header.get(key)) for key in SERIES), [])
        for series in alike:
            if on_one_grid(one, series[0]):
                series.append(one)
                break
        else:
            alike.append([one])
    return [series for alike in found.values() for series in alike]


def split_times(slices: list[Slice]) -> list[list[Slice]]:
    """Return the time points of a series: acquisitions that lie over each other."""
    for keyword in TIMES:
        parts: dict[str, list[Slice]] = {}
        for one in slices:
            parts.setdefault(str(one.header.get(keyword)), []).append(one)
        places = [heights(part, slices) for part in parts.values()]
        spans = sorted((at.min(), at.max()) for at in places)
        if any(low < high - GRID_TOLERANCE for (_, high), (low, _) in pairwise(spans)):
            return [time for part in parts.values() for time in split_times(part)]
    return [slices]


def split_doubles(slices: list[Slice]) -> list[list[Slice]]:
    """Return a series without its copies, or the time points that are at the same positions."""
    places = heights(slices, slices)
    order = np.argsort(places)
    kept: list[list[Slice]] = []  # at each position
    for group in np.split(order, np.flatnonzero(np.diff(places[order]) > SAME_MM) + 1):
        kept.append([])
        for one in sorted(
            (slices[k] for k in group), key=lambda one: number(one, "InstanceNumber")
        ):
            if not any(np.array_equal(one.read(), other.read()) for other in kept[-1]):
                kept[-1].append(one)
    if copies := len(slices) - sum(map(len, kept)):
        print(f"slices that are there twice under two names and taken once: {copies}")
    if len({len(ones) for ones in kept}) == 1:
        return [list(time) for time in zip(*kept, strict=True)]
    return [[one for ones in kept for one in ones]]  # order_slices refuses them


def decodable(one: Slice) -> bool:
    """Say whether the pixels of a slice are stored in a way that can be read."""
    syntax = read_file_meta_info(one.file).get("TransferSyntaxUID", "")
    with suppress(NotImplementedError):  # a syntax that pydicom does not know
        deep = syntax == JPEGExtended12Bit and number(one, "BitsStored") > 8
        return get_decoder(syntax).is_available and not deep
    return False


def find_fault(slices: list[Slice]) -> str:
    """Return why a series is no CT of a volume, "" if nothing speaks against it."""
    header = slices[0].header
    positions = {str(one.header.get("ImagePositionPatient")) for one in slices}
    faults = {
        f"{text(slices[0], 'Modality') or 'of no kind'}, not CT": header.get("Modality") != "CT",
        "a scout": "LOCALIZER" in (header.get("ImageType") or ()),
        "pictures without positions in the patient": any(
            not one.header.get(key) for one in slices for key in ("ImagePositionPatient", *GRID)
        ),
        "in colour": header.get("SamplesPerPixel", 1) != 1,
        f"in {text(slices[0], 'RescaleType')}, not HU": header.get("RescaleType") not in UNITS,
        "at one position, a single slice or the timing of contrast medium": len(positions) == 1,
        "stored in a way that is not read here, export it uncompressed": not decodable(slices[0]),
    }
    return next((fault for fault, is_so in faults.items() if is_so), "")


def check_line(slices: list[Slice]) -> list[Slice]:
    """Return the slices. Raises ValueError if they are not on one line, so that no affine fits."""
    places_mm = np.array([vector(one, "ImagePositionPatient", 3) for one in slices])
    normal = np.cross(*vector(slices[0], "ImageOrientationPatient", 6).reshape(2, 3))
    line_mm = np.linspace(places_mm[0], places_mm[-1], len(slices))
    aside_mm = np.linalg.norm(np.cross(places_mm - line_mm, normal), axis=1)
    if aside_mm.max() > DRIFT_PIXELS * vector(slices[0], "PixelSpacing", 2).min():
        raise ValueError(
            f"{slices[aside_mm.argmax()].path} lies {aside_mm.max():.3g} mm aside of the line from "
            f"the first slice to the last, as if two scans were mixed: {AGAIN}"
        )
    return slices


def examine(slices: list[Slice]) -> Iterator[Series]:
    """Yield the time points of a series, in order, with what speaks against taking them."""
    fault = find_fault(slices)
    try:
        parts = [] if fault else split_times(slices)
        times = [time for part in parts for time in split_doubles(part)] or [slices]
    except ValueError as error:
        times, fault = [slices], str(error)
    for time in times:
        try:
            yield Series(time if fault else check_line(order_slices(time)), fault)
        except ValueError as error:
            yield Series(time, str(error))


def text(one: Slice, keyword: str) -> str:
    """Return a header field as text, in which the patient cannot be told."""
    value = one.header.get(keyword)
    joined = " ".join(map(str, value)) if isinstance(value, MultiValue) else str(value or "")
    return hide(joined, one.header).encode("ascii", "replace").decode()[:40]


def hide(told: str, header: pydicom.Dataset) -> str:
    """Return a text with *** for what its header calls the patient."""
    names = " ".join(str(header.get(keyword) or "") for keyword in WHO)
    for word in re.findall(r"[^\W_]+", names):
        if len(word) > 2 or not word.isascii():  # two letters are in any text
            told = re.sub(re.escape(word), "***", told, flags=re.IGNORECASE)
    return told


def preference(series: Series) -> tuple:
    """Return what the best series has most of: a kernel for soft tissue, axial, many slices."""
    one = series.slices[0]
    across, down = vector(one, "ImageOrientationPatient", 6).reshape(2, 3)
    axial = abs(np.cross(across, down)[2]) > np.sqrt(0.5)  # tilted by less than 45 degrees
    return not SHARP.search(text(one, "ConvolutionKernel")), axial, len(series.slices)


def find_series(folder: Path) -> list[Series]:
    """Return the series below a folder, oldest study first. Raises ValueError if there are none."""
    groups = split_series(find_slices(folder))
    if not groups:
        raise ValueError(f"{folder} holds no DICOM images")
    groups.sort(key=lambda slices: number(slices[0], "SeriesNumber"))
    groups.sort(key=lambda slices: [str(slices[0].header.get(keyword)) for keyword in STUDY])
    return [one for slices in groups for one in examine(slices)]


def describe(series: list[Series]) -> str:
    """Return the table of series, and a line for each that cannot be taken."""
    studies = list(dict.fromkeys(one.slices[0].header.get(STUDY[-1]) for one in series))
    rows, faults = [], []
    for n, (slices, fault) in enumerate(series, 1):
        one = slices[0]
        study = studies.index(one.header.get(STUDY[-1])) + 1
        mm = [] if fault else nib.affines.voxel_sizes(straight_grid(slices)[1]).round(3)
        told, kernel = text(one, "SeriesDescription"), text(one, "ConvolutionKernel")
        rows.append((n, study, told, len(slices), sides(mm), kernel, sides(shape(one)[::-1])))
        faults += [f"series {n} is passed over: {fault}"] if fault else []
    table = pd.DataFrame(rows, columns=COLUMNS).replace("", "-")
    return "\n".join([table.to_string(index=False), *faults])


def choose(series: list[Series], wanted: int | None, every: bool) -> list[int]:
    """Return the numbers of the series to take, from 1; without a wish that of the best.

    Raises ValueError if there is none, or if the one that is wanted cannot be taken.
    """
    sound = [n for n, one in enumerate(series, 1) if not one.fault]
    if not sound:
        raise ValueError("no CT series here can be taken")
    if wanted and wanted not in sound:
        raise ValueError(f"--series {wanted} cannot be taken, wanted one of {sound}")
    best = max(sound, key=lambda n: preference(series[n - 1]))
    return sound if every else [wanted or best]


def straight_grid(slices: list[Slice]) -> tuple[tuple[int, ...], np.ndarray]:
    """Return shape and affine of the slices' grid; if the gantry leaned, of one that holds it."""
    affine, (rows, columns), count = make_affine(slices), shape(slices[0]), len(slices)
    plane = affine[:3, :2]
    lean = affine[:3, 2] @ plane / (plane**2).sum(axis=0)  # columns and rows aside, a slice
    drift = (lean * (count - 1)).round(3)
    if np.abs(drift).max() < DRIFT_PIXELS:
        return (columns, rows, count), affine
    straight = affine.copy()
    straight[:3, 2] -= plane @ lean
    straight[:3, 3] += plane @ np.minimum(np.floor(drift), 0)
    size = np.array([columns, rows]) + np.ceil(np.abs(drift)).astype(int)
    return (*size.tolist(), count), straight


def make_volume(slices: list[Slice]) -> tuple[np.ndarray, np.ndarray]:
    """Return the CT, (x, y, z) int16, HU, and its affine; what a straight grid adds is air."""
    size, affine = straight_grid(slices)
    volume = to_hu(slices)
    if volume.shape == size:
        return volume, affine
    to_straight = np.linalg.inv(affine) @ make_affine(slices)  # from (column, row, slice)
    print("the gantry leaned: each slice is moved in its plane onto a straight grid")
    straight = np.empty(size, np.int16, order="F")
    for k in range(size[2]):
        plane = np.full(size[:2], AIR_HU, np.float32)
        plane[: volume.shape[0], : volume.shape[1]] = volume[:, :, k]
        aside = (to_straight[:2, 2] * k + to_straight[:2, 3]).round(6)
        straight[:, :, k] = np.rint(ndimage.shift(plane, aside, order=1, cval=AIR_HU))
    return straight, affine


def turn_values(slices: list[Slice]) -> list[Slice]:
    """Return slices whose values are HU; some turn them round with MONOCHROME1, which is wrong."""
    if slices[0].header.get("PhotometricInterpretation") != "MONOCHROME1":
        return slices
    turned = [one._replace(read=partial(read_frame, one, inverted=True)) for one in slices]
    slope, intercept = rescale(slices[0])
    stacks = [stack[len(slices) // 2].read() * slope + intercept for stack in (slices, turned)]
    shares = [np.mean(hu < -100) for hu in stacks]  # of air and fat
    if shares[0] >= shares[1]:
        return slices
    print("air is white (MONOCHROME1) and its values are the highest: they are turned round")
    return turned


def scan_name(options: argparse.Namespace, series: list[Series]) -> str:
    """Return how the scan is to be called. Raises ValueError if that would tell the patient."""
    folder = options.folder.resolve().name
    told = any(hide(folder, one.slices[0].header) != folder for one in series)
    name = re.sub(r"[^\w-]+", "_", options.name or folder).strip("_")
    if not name or (told and not options.name):
        raise ValueError("the folder has the patient's name, or none: add --name NAME")
    return name


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="DICOM files, in folders of any depth")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--series", type=int, metavar="N", help="this one of the table")
    which.add_argument("--all", action="store_true", help="every series, as NAME_N")
    parser.add_argument("--name", help="of the scan (the folder's)")
    parser.add_argument("--mask", type=Path, help="a mask to write as DICOM segmentation")
    parser.add_argument("--identified", action="store_true", help="with the patient, for a PACS")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder}: no such folder")
    return options


def bring(options: argparse.Namespace) -> None:
    """List the series, and write those to be taken to raw/test."""
    series = find_series(options.folder)
    print(describe(series))
    for n in choose(series, options.series, options.all):
        print(f"series {n} is taken{'' if options.series else ', --series N takes another'}")
        name = scan_name(options, series) + (f"_{n}" if options.all else "")
        path = ROOT / "raw" / "test" / f"{name}_orig.nii.gz"
        volume, affine = make_volume(turn_values(series[n - 1].slices))
        write_volumes({path: volume}, affine)
        print(f"{named(path)} is written")


def bring_back(options: argparse.Namespace) -> None:
    """List the series, and write the mask as DICOM segmentation of the one that it fits."""
    from segmentation import export_mask, fits  # what it imports takes a second

    series = find_series(options.folder)
    for n, (slices, fault) in enumerate(series):
        if not fault and not fits(options.mask, *straight_grid(slices)):
            series[n] = Series(slices, "the mask lies on another grid")
    print(describe(series))
    for n in choose(series, options.series, every=False):
        slices = series[n - 1].slices
        places = [(one.file, one.frame) for one in slices]
        path = export_mask(options.mask, places, make_affine(slices), options.identified)
        print(f"{named(path)} is written, of series {n}")


def main(arguments: list[str] | None = None) -> None:
    """Bring a series or its mask, as the command line asks; errors leave in one sentence."""
    options = parse_options(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidy up as after Ctrl-C
    warnings.simplefilter("ignore")  # pydicom's would print what stands in the header
    pydicom.config.logger.setLevel("CRITICAL")
    try:
        bring_back(options) if options.mask else bring(options)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"raw/dicom.py: {one_sentence(error)}")
    except KeyboardInterrupt:
        sys.exit("raw/dicom.py: interrupted, nothing is half-written")


if __name__ == "__main__":
    main()
