"""Fill raw/train and raw/test with 3D-IRCADb-01: 20 CT scans with an expert's liver mask.

    python raw/ircad.py                        download and convert all patients
    python raw/ircad.py --from 3Dircadb1.zip   convert what you already have, zipped or unpacked
    python raw/ircad.py --test 3 8 14          other test patients: files that are there move

Writes ircad_e01_orig.nii.gz (int16, HU) and ircad_e01_liver.nii.gz (uint8, 0 or 1) and so on, and
raw/ircad.csv with a line of checks for each patient. A patient whose DICOM files do not fit is not
written; one who only looks odd in the table is written; either makes the exit code 1. A tumour in
the liver that its mask leaves out is added to it, and that is printed. Stop it when you like: files
get their names when they are whole, the next run goes on with what is missing, and nothing that is
there is overwritten (to convert a patient again, delete the two files).

`--from` takes the whole zip, zips of patients, or folders unpacked to any depth; zips in zips stay
packed. Only PATIENT_DICOM and MASKS_DICOM are read, and in them names that begin with a dot,
__MACOSX, DICOMDIR, Thumbs.db and desktop.ini are passed over.
"""

import argparse
import errno
import io
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import requests
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from pydicom.pixels import pixel_array
from scipy import ndimage
from tqdm import tqdm

RAW = Path(__file__).resolve().parent
WORK = RAW / ".ircad"  # downloads, and zips taken out of zips while they are read
URL = "https://cloud.ircad.fr/index.php/s/JN3z7EynBiwYyjy/download"
PAGE = "https://www.ircad.fr/research-and-development/data-sets/liver-segmentation-3d-ircadb-01/"
LICENCE = f"""\
3D-IRCADb-01 is under CC BY-NC-ND 4.0 (https://creativecommons.org/licenses/by-nc-nd/4.0/): no
commercial use, and neither the scans nor what is made of them may be passed on. Please cite
L. Soler et al., "3D image reconstruction for comparison of algorithm database: a patient specific
anatomical and medical image database", IRCAD, Strasbourg, France, Tech. Rep., 2010.
{PAGE}
"""
AGAIN = "get the data from IRCAD again"
BY_HAND = f"get it from {PAGE} in a browser, and use --from"
TRIES = 4  # a download
PAUSE_S = 2.0  # before the second try; it doubles before each further one
TIMEOUT_S = (20, 90)  # to connect; between two pieces, since the server zips while it sends
CHUNK = 2**18  # bytes

SLICES = (129, 172, 200, 91, 139, 135, 151, 124, 111, 122)  # of patients 1 to 10
SLICES += (132, 260, 122, 113, 125, 155, 119, 74, 124, 225)  # and 11 to 20
NUMBERS = range(1, len(SLICES) + 1)
TEST = range(14, 21)  # seven patients, as many as the tutorial tests on
KINDS = ("liver", "orig")  # named in this order: data.py refuses a mask without an image

IMAGES, MASKS = "patient_dicom", "masks_dicom"
TUMOUR = re.compile("tum|cyst|kyst")  # livertumor01, livercyst, liverkyste, tumor, rightsurretumor
JUNK = re.compile(r"(^|/)(\.[^/]*|__MACOSX|DICOMDIR|Thumbs\.db|desktop\.ini)(/|$)", re.IGNORECASE)
STORED_AXES = "LAS"  # nibabel's axis codes, those of the NIfTI files the tutorial used
STEP_TOLERANCE = 0.1  # of a slice distance: positions may be rounded, a missing slice is off by 1

LIVER_ML = (200, 4000)
LIVER_HU = (0, 250)  # the median: from a fatty liver to one full of contrast medium
BODY_HU = -300  # below it lie air and lungs
COLUMNS = ("patient", "split", "slices", "with_liver", "spacing_mm", "liver_ml", "liver_hu")
COLUMNS += ("side", "verdict", "why")


class Member(NamedTuple):
    """A file in a folder or in a zip, where the zip counts as a folder of the path."""

    path: PurePosixPath
    open: Callable[[], BinaryIO]


class Slice(NamedTuple):
    """A DICOM file: its path, its header without the pixels, and these, (rows, columns)."""

    path: PurePosixPath
    header: pydicom.Dataset
    pixels: np.ndarray


def damaged(path: PurePosixPath, error: Exception) -> ValueError:
    """Return the error of a file that cannot be read to its end."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())  # on one line
    return ValueError(f"{path} cannot be read ({reason}): copy it again, or {AGAIN}")


def list_folder(folder: Path) -> list[Member]:
    """Return the files below a folder."""
    return [
        Member(PurePosixPath(path.as_posix()), partial(open, path, "rb"))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not JUNK.search(path.relative_to(folder).as_posix())
    ]


def list_zip(zipped: Member, opened: ExitStack) -> list[Member]:
    """Return the files in a zip, which stays packed and is open as long as `opened`.

    Raises ValueError if it is damaged or if a path leads out of it.
    """
    try:
        file = opened.enter_context(zipped.open())
        if isinstance(file, zipfile.ZipExtFile):  # in a zip one cannot jump about; `opened` closes
            packed = file
            file = opened.enter_context(tempfile.TemporaryFile(dir=WORK))  # noqa: SIM115
            shutil.copyfileobj(packed, file)
        archive = opened.enter_context(zipfile.ZipFile(file))
    except OSError:
        raise
    except Exception as error:  # zipfile and zlib have a class of error for each kind of damage
        raise damaged(zipped.path, error) from error
    members = []
    for info in archive.infolist():
        path = PurePosixPath(info.filename.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in info.filename[:2]:
            raise ValueError(f"{zipped.path} holds {path}, a path that leads out of it: {AGAIN}")
        if not info.is_dir() and not JUNK.search(str(path)):
            members.append(Member(zipped.path / path, partial(archive.open, info)))
    return members


def patient_number(path: PurePosixPath) -> int | None:
    """Return N of the last 3Dircadb1.N in a path, None if there is none."""
    found = re.findall(r"3dircadb1\.(\d+)", str(path), re.IGNORECASE)
    return int(found[-1]) if found else None


def unpack(members: Iterable[Member], number: int | None, opened: ExitStack) -> Iterator[Member]:
    """Yield members, and instead of a zip what is in it.

    Zips of other patients, of meshes and labels, and those that are not IRCAD's stay as they are.
    """
    for member in members:
        name = member.path.name.lower()
        known = "ircad" in name or name in (f"{IMAGES}.zip", f"{MASKS}.zip")
        if name.endswith(".zip") and known and patient_number(member.path) in (None, number):
            yield from unpack(list_zip(member, opened), number, opened)
        else:
            yield member


def find_files(source: Path, number: int | None, opened: ExitStack) -> list[Member]:
    """Return the files in a zip or a folder that are of a patient, or of nobody one could name."""
    source = source.resolve()  # the folder's own name may tell the number
    if source.is_dir():
        members = list_folder(source)
    else:
        path = PurePosixPath(source.as_posix())
        members = list_zip(Member(path, partial(open, source, "rb")), opened)
    return list(unpack(members, number, opened))


def plain_parts(path: PurePosixPath) -> list[str]:
    """Return the parts of a path in lower case, a zip named like a folder."""
    return [part.lower().removesuffix(".zip") for part in path.parts]


def find_patients(source: Path, asked: list[int] | None) -> set[int]:
    """Return the numbers of the patients in a zip or a folder.

    Raises FileNotFoundError if there is none, ValueError if nothing tells the number of one.
    """
    with ExitStack() as opened:
        paths = [member.path for member in find_files(source, None, opened)]
    named = {patient_number(path) for path in paths} & set(NUMBERS)
    nameless = [p for p in paths if patient_number(p) is None and IMAGES in plain_parts(p)]
    if not named and not nameless:
        raise FileNotFoundError(
            f"{source} holds no PATIENT_DICOM: wanted 3Dircadb1.zip, or a folder with 3Dircadb1.1, "
            "3Dircadb1.2 and so on, zipped or unpacked"
        )
    if nameless and (named or len(asked or NUMBERS) > 1):
        raise ValueError(
            f"{nameless[0]} does not tell which patient it is of: name a folder above it "
            "3Dircadb1.N, or give only this patient to --from and add --patients N"
        )
    return set(asked) if nameless else named


def find_stacks(source: Path, number: int, opened: ExitStack) -> dict[str, list[Member]]:
    """Return {"patient_dicom": the CT slices, "liver": those of its mask, ...} of a patient.

    A slice that is there both unpacked and zipped is taken from the zip, which has a checksum.
    Raises FileNotFoundError if there are no slices of the CT or of the liver.
    """
    stacks: dict[str, dict[str, Member]] = {}
    files = find_files(source, number, opened)
    for member in sorted(files, key=lambda member: ".zip" in str(member.path).lower()):
        parts = plain_parts(member.path)
        word = IMAGES if IMAGES in parts else MASKS
        if word in parts and patient_number(member.path) in (number, None):
            below = parts[len(parts) - parts[::-1].index(word) :]  # such as liver, image_0
            stack = below[0] if word == MASKS and len(below) > 1 else word
            stacks.setdefault(stack, {})["/".join(below)] = member
    for stack, folder in ((IMAGES, "PATIENT_DICOM"), ("liver", "MASKS_DICOM/liver")):
        if stack not in stacks:
            raise FileNotFoundError(f"{source} has no slices of this patient in {folder}: {AGAIN}")
    return {stack: list(members.values()) for stack, members in stacks.items()}


def read_slices(members: list[Member], bar: tqdm) -> list[Slice]:
    """Return the slices of a stack in no order. Raises ValueError for a file that is no slice."""
    slices = []
    for member in members:
        try:
            with member.open() as file:
                header = pydicom.dcmread(io.BytesIO(file.read()))  # a zip checks the CRC at the end
            pixels = pixel_array(header)
            del header.PixelData
        except OSError:
            raise
        except Exception as error:  # pydicom has a class of error for each kind of damage
            raise damaged(member.path, error) from error
        if pixels.ndim != 2:
            raise ValueError(f"{member.path} is {sides(pixels.shape)}, wanted one slice: {AGAIN}")
        slices.append(Slice(member.path, header, pixels))
        bar.update()
    return slices


def sides(shape: tuple) -> str:
    """Return a shape as a person writes it: 512 x 512."""
    return " x ".join(str(n) for n in shape)


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


def check_alike(slices: list[Slice]) -> None:
    """Raise ValueError unless the slices are of one size, orientation and spacing.

    Their SeriesInstanceUIDs are not asked: two series in one folder meet at the same positions.
    """
    orientations = (vector(one, "ImageOrientationPatient", 6) for one in slices)
    traits = {
        "size": [sides(one.pixels.shape) for one in slices],
        "orientation": [orientation.round(4).tolist() for orientation in orientations],
        "spacing": [vector(one, "PixelSpacing", 2).round(4).tolist() for one in slices],
    }
    for name, values in traits.items():
        for one, value in zip(slices, values, strict=True):
            if value != values[0]:
                raise ValueError(
                    f"{one.path} has the {name} {value} and {slices[0].path.name} {values[0]}, "
                    f"wanted one scan alone: {AGAIN}"
                )


def order_slices(slices: list[Slice]) -> list[Slice]:
    """Return the slices of a CT by their position along the normal; names do not count.

    Raises ValueError if they are not one scan, or if a position is there twice or is missing.
    """
    check_alike(slices)
    if len(slices) < 2:
        raise ValueError(f"{slices[0].path} is the only slice, wanted a whole scan: {AGAIN}")
    slices = [slices[k] for k in np.argsort(heights(slices, slices))]
    steps_mm = np.diff(heights(slices, slices))
    usual_mm = np.median(steps_mm)
    for (one, other), step_mm in zip(pairwise(slices), steps_mm, strict=True):
        if step_mm <= STEP_TOLERANCE * usual_mm:
            raise ValueError(f"{one.path} and {other.path.name} lie at the same position: {AGAIN}")
        if abs(step_mm - usual_mm) > STEP_TOLERANCE * usual_mm:
            raise ValueError(
                f"{one.path} and {other.path.name} lie {step_mm:g} mm apart and other neighbours "
                f"{usual_mm:g} mm, as if a slice were missing: {AGAIN}"
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


def to_hu(slices: list[Slice]) -> np.ndarray:
    """Return the CT as (columns, rows, slices) int16, HU. Raises ValueError for what overflows."""
    rows, columns = slices[0].pixels.shape
    volume = np.empty((columns, rows, len(slices)), np.int16, order="F")
    for k, one in enumerate(slices):
        slope = float(one.header.get("RescaleSlope") or 1)
        hu = np.rint(one.pixels * slope + float(one.header.get("RescaleIntercept") or 0))
        if hu.min() < -(2**15) or hu.max() >= 2**15:
            raise ValueError(
                f"{one.path} holds {hu.min():g} to {hu.max():g} HU, wanted 16 bits: {AGAIN}"
            )
        volume[:, :, k] = hu.T  # (rows, columns) -> (columns, rows)
    return volume


def by_position(slices: list[Slice], images: list[Slice]) -> list[int]:
    """Return the index of the image slice at the position of each slice."""
    images_mm = heights(images, images)
    step_mm = (images_mm[-1] - images_mm[0]) / (len(images) - 1)
    return np.rint((heights(slices, images) - images_mm[0]) / step_mm).tolist()


def by_instance_number(slices: list[Slice], _: list[Slice]) -> list[int]:
    """Return the InstanceNumber of each slice, counted from the lowest."""
    numbers = np.array([vector(one, "InstanceNumber", 1)[0] for one in slices])
    return (numbers - numbers.min()).tolist()


def match_slices(masks: list[Slice], images: list[Slice]) -> np.ndarray:
    """Return a mask as (columns, rows, slices) bool, in the order of the image slices.

    A mask slice belongs to the image slice at its position. If the headers of the mask have no
    positions, or not those of the image, InstanceNumber decides, and that is printed; names never.
    Raises ValueError if the numbers or sizes of slices differ, or if the headers tell nothing.
    """
    folder, shape = masks[0].path.parent, images[0].pixels.shape
    if len(masks) != len(images):
        raise ValueError(f"{folder} has {len(masks)} slices, but the CT {len(images)}: {AGAIN}")
    for one in masks:
        if one.pixels.shape != shape:
            found, wanted = sides(one.pixels.shape), sides(shape)
            raise ValueError(f"{one.path} is {found} pixels, but the CT {wanted}: {AGAIN}")
    for places in (by_position, by_instance_number):
        try:
            wanted, found = places(images, images), places(masks, images)
        except ValueError:  # a header has no such field
            continue
        if set(wanted) == set(found) and len(set(wanted)) == len(images):
            if places is by_instance_number:
                tqdm.write(f"{folder} lacks the CT's positions: it is matched by InstanceNumber")
            at = dict(zip(found, masks, strict=True))
            return np.stack([at[place].pixels.T > 0 for place in wanted], axis=-1)
    raise ValueError(
        f"{folder} has neither the positions nor the InstanceNumbers of the CT: {AGAIN}"
    )


def add_tumour(liver: np.ndarray, tumour: np.ndarray) -> int:
    """Add those pieces of a tumour that are in the liver to it, in place; return how many voxels.

    A piece is in the liver if most of the voxels around it, which share a face with it, are liver:
    all of them for a hole in the mask and more than half for a notch in its surface, but few for a
    tumour of the adrenal gland that leans on the liver.

    liver, tumour : (columns, rows, slices) bool
    """
    before = np.count_nonzero(liver)
    pieces, _ = ndimage.label(tumour)
    for number, box in enumerate(ndimage.find_objects(pieces), 1):
        box = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)
        piece = pieces[box] == number
        around = ndimage.binary_dilation(piece) & ~piece
        if np.count_nonzero(liver[box] & around) > np.count_nonzero(around) / 2:
            liver[box] |= piece
    return np.count_nonzero(liver) - before


def read_liver(stacks: dict[str, list[Member]], images: list[Slice], bar: tqdm) -> np.ndarray:
    """Return the liver, (columns, rows, slices) bool, with tumours in it that its mask leaves out.

    Which masks are of tumours their names tell; which tumours are in the liver, the voxels.
    Raises ValueError if a mask does not fit the image or no liver is marked.
    """
    liver = match_slices(read_slices(stacks["liver"], bar), images)
    if not liver.any():
        raise ValueError(f"{stacks['liver'][0].path.parent} marks no liver in any slice: {AGAIN}")
    for name in filter(TUMOUR.search, stacks):
        tumour = match_slices(read_slices(stacks[name], bar), images)
        if voxels := np.any(tumour & ~liver) and add_tumour(liver, tumour):
            tqdm.write(
                f"{stacks[name][0].path.parent} is in the liver: {voxels} voxels were added to it"
            )
    return liver


def as_nifti(volume: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    """Return a volume (columns, rows, slices) as NIfTI, its axes those closest to STORED_AXES."""
    change = ornt_transform(io_orientation(affine), axcodes2ornt(STORED_AXES))
    image = nib.Nifti1Image(volume, affine).as_reoriented(change)
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    image.header.set_xyzt_units("mm")
    return image


def pair(number: int, split: str) -> list[Path]:
    """Return the paths of a patient's mask and image."""
    return [RAW / split / f"ircad_e{number:02d}_{kind}.nii.gz" for kind in KINDS]


def write_pair(finals: list[Path], images: list[nib.Nifti1Image]) -> None:
    """Write mask and image under hidden names, and give them their names when both are whole.

    Raises ValueError if one of the names is taken by another file than a stopped run leaves.
    """
    drafts = [path.with_name(f".{path.name}") for path in finals]
    try:
        for image, draft, final in zip(images, drafts, finals, strict=True):
            nib.save(image, draft)  # gzipped at level 1 and without a date
            if final.exists() and final.read_bytes() != draft.read_bytes():
                raise ValueError(f"{final} has no partner and would be overwritten: take it away")
        for draft, final in zip(drafts, finals, strict=True):
            os.replace(draft, final)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)


def convert(source: Path, number: int, split: str) -> None:
    """Write the mask and the image of a patient.

    Raises FileNotFoundError or ValueError if the DICOM files are not all there or do not fit.
    """
    with ExitStack() as opened:
        stacks = find_stacks(source, number, opened)
        read = [IMAGES, "liver", *filter(TUMOUR.search, stacks)]
        total = sum(len(stacks[name]) for name in read)
        with tqdm(desc=f"patient {number}: conversion", total=total, unit=" slices") as bar:
            images = order_slices(read_slices(stacks[IMAGES], bar))
            liver = read_liver(stacks, images, bar)
    affine = make_affine(images)
    volumes = liver.astype(np.uint8), to_hu(images)
    write_pair(pair(number, split), [as_nifti(volume, affine) for volume in volumes])


def zip_of(number: int) -> Path:
    """Return where the download of a patient goes."""
    return WORK / f"3Dircadb1.{number}.zip"


def fetch(url: str, number: int, part: Path) -> None:
    """Write the zip of a patient to a file and check it by its own CRCs.

    Raises ValueError for an answer that is no zip, and an error of requests or zipfile for one that
    does not come or comes damaged.
    """
    query, headers = {"path": f"/3Dircadb1.{number}"}, {"Accept-Encoding": "identity"}
    with requests.get(url, query, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
        answer.raise_for_status()
        total = int(answer.headers.get("Content-Length", 0)) or None  # None while it is zipping
        units = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
        bar = tqdm(desc=f"patient {number}: download", total=total, **units)
        with bar, open(part, "wb") as file:
            for piece in answer.iter_content(CHUNK):
                if file.tell() == 0 and not piece.startswith(b"PK"):
                    kind = answer.headers.get("Content-Type")
                    raise ValueError(f"{answer.url} answers with {kind}, no zip: {BY_HAND}")
                bar.update(file.write(piece))
    with zipfile.ZipFile(part) as archive:
        if name := archive.testzip():
            raise zipfile.BadZipFile(f"{name} came damaged")


def download(url: str, number: int) -> Path:
    """Return the zip of a patient, fetched unless an earlier run has left it.

    Raises ConnectionError if the server is out of reach, ValueError if it has no zip of this one.
    """
    path = zip_of(number)
    part = path.with_suffix(".part")
    for attempt in range(TRIES):
        if path.exists():
            break
        try:
            fetch(url, number, part)
            os.replace(part, path)
        except (requests.RequestException, zipfile.BadZipFile, zlib.error) as error:
            answer = getattr(error, "response", None)
            status = 0 if answer is None else answer.status_code
            reason = f"{status} {answer.reason}" if status else type(error).__name__
            refused = 400 <= status < 500 and status != 429  # 429: too many requests, so wait
            if refused or attempt == TRIES - 1:
                away = isinstance(error, requests.ConnectionError | requests.Timeout)
                kind = ConnectionError if away or status >= 500 else ValueError
                raise kind(f"{url} gives no whole zip ({reason}): {BY_HAND}") from error
            print(f"patient {number}: {reason}, trying again")
            time.sleep(PAUSE_S * 2**attempt)
        finally:
            part.unlink(missing_ok=True)
    return path


def split_of(number: int, test: Iterable[int]) -> str:
    """Return the folder in raw/ that a patient belongs in."""
    return "test" if number in test else "train"


def move_patients(test: Iterable[int]) -> None:
    """Move the patients who are in the wrong one of raw/train and raw/test.

    Raises ValueError, before anything moves, for one who is in both.
    """
    moves = []
    for number in NUMBERS:
        split = split_of(number, test)
        other = "train" if split == "test" else "test"
        moves += zip(pair(number, other), pair(number, split), strict=True)
    moves = [(here, there) for here, there in moves if here.exists()]
    for here, there in moves:
        if there.exists():
            raise ValueError(f"{here} is in raw/{there.parent.name} too: take one of them away")
    for here, there in moves:
        os.replace(here, there)
        print(f"{here.name} moves from raw/{here.parent.name} to raw/{there.parent.name}")


def is_whole(number: int, test: Iterable[int]) -> bool:
    """Say whether a patient is there with mask and image."""
    return all(path.exists() for path in pair(number, split_of(number, test)))


def get_patients(options: argparse.Namespace) -> dict[int, str]:
    """Convert the patients who are not there yet; return {patient: why not} for those who fail.

    One who fails does not keep the others from going on, but a server out of reach does.
    """
    wanted = [n for n in options.patients or NUMBERS if not is_whole(n, options.test)]
    found = find_patients(options.source, options.patients) if options.source and wanted else wanted
    absent = [n for n in wanted if n not in found]
    failures = {n: f"is not in {options.source}" for n in absent if options.patients}
    if absent and not options.patients:
        print(f"{options.source} does not hold patients {', '.join(map(str, absent))}")
    for number in (n for n in wanted if n in found):
        try:
            source = options.source or download(options.url, number)
            convert(source, number, split_of(number, options.test))
        except ConnectionError as error:
            failures[number] = str(error)
            break
        except (ValueError, FileNotFoundError) as error:
            failures[number] = str(error)
        if not options.source and not options.keep:
            zip_of(number).unlink(missing_ok=True)
    return failures


def centre_mm(inside: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return the centroid of (x, y, z) bool in the world of its affine: mm right, front, up."""
    weights = [np.count_nonzero(inside, axis=axes) for axes in ((1, 2), (0, 2), (0, 1))]
    voxel = [np.average(np.arange(len(weight)), weights=weight) for weight in weights]
    return affine[:3] @ [*voxel, 1]


def check_patient(number: int, split: str) -> dict[str, object]:
    """Return a line of the table: what the files of a patient hold, and what is odd about it."""
    mask, image = (nib.load(path) for path in pair(number, split))
    inside, hu = np.asarray(mask.dataobj) > 0, np.asarray(image.dataobj)
    slices, spacing_mm = image.shape[2], image.header.get_zooms()
    liver_ml = np.count_nonzero(inside) * np.prod(spacing_mm) / 1000
    liver_hu = np.median(hu[inside])
    apart_mm = centre_mm(inside, image.affine) - centre_mm(hu > BODY_HU, image.affine)
    side = "right" if apart_mm[0] > 0 else "left"
    odd = {
        f"{slices} slices instead of {SLICES[number - 1]}": slices != SLICES[number - 1],
        f"a liver of {liver_ml:.0f} ml": not LIVER_ML[0] <= liver_ml <= LIVER_ML[1],
        f"a liver of {liver_hu:.0f} HU": not LIVER_HU[0] <= liver_hu <= LIVER_HU[1],
        "a liver on the left": side == "left",
    }
    return {
        "slices": slices,
        "with_liver": np.count_nonzero(inside.any(axis=(0, 1))),
        "spacing_mm": " x ".join(f"{mm:.4g}" for mm in spacing_mm),
        "liver_ml": round(liver_ml),
        "liver_hu": round(liver_hu),
        "side": side,
        "verdict": "odd" if any(odd.values()) else "ok",
        "why": ", ".join(what for what, is_odd in odd.items() if is_odd),
    }


def check_patients(test: Iterable[int], failures: dict[int, str]) -> pd.DataFrame:
    """Return the table, a row for each patient who is there or failed."""
    rows = []
    there = [number for number in NUMBERS if number in failures or is_whole(number, test)]
    for number in tqdm(there, "checks", unit=" patients"):
        row = {"patient": number, "split": split_of(number, test), "verdict": "failed"}
        try:
            why = failures.get(number)
            row |= {"why": why} if why else check_patient(number, row["split"])
        except Exception as error:  # nibabel and numpy have one for each kind of damage
            row["why"] = str(damaged(pair(number, row["split"])[1], error))
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS).convert_dtypes()


def report(table: pd.DataFrame) -> None:
    """Write the table to raw/ircad.csv, print it, and name those patients who are not ok."""
    table.to_csv(WORK / "ircad.csv", index=False)
    os.replace(WORK / "ircad.csv", RAW / "ircad.csv")
    shown = table.drop(columns="why").astype(object)
    print(shown.where(shown.notna(), "-").to_string(index=False))
    for row in table[table["verdict"] != "ok"].itertuples():
        print(f"patient {row.patient} {row.verdict}: {row.why}")
    for folder in (RAW / "train", RAW / "test"):
        if others := sorted({*folder.glob("[!.]*")} - {*folder.glob("ircad_e*")}):
            print(f"raw/{folder.name} also holds {others[0].name}: data.py will slice that too")


def prepare() -> None:
    """Make the folders, and clear away what a killed run left half-written."""
    halves = {RAW / "train": ".ircad_e*", RAW / "test": ".ircad_e*", WORK: "*.part"}
    for folder, names in halves.items():
        folder.mkdir(exist_ok=True)
        for path in folder.glob(names):
            path.unlink()


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    number = {"type": int, "choices": NUMBERS, "metavar": "N"}
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="PATH", help="a zip or folder you have"
    )
    parser.add_argument("--patients", nargs="+", help="these alone (1 to 20)", **number)
    parser.add_argument(
        "--test", nargs="*", default=TEST, help="for raw/test, not 14 to 20", **number
    )
    parser.add_argument("--url", default=URL, help="where to download from (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the downloads, in raw/.ircad")
    options = parser.parse_args(arguments)
    if options.source and not options.source.exists():
        parser.error(f"--from {options.source}: no such file or folder")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Get the patients, check them and say what comes next; errors leave in one sentence."""
    options = parse_options(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidy up as after Ctrl-C
    print(LICENCE, flush=True)
    try:
        prepare()
        move_patients(options.test)
        failures = get_patients(options)
        table = check_patients(options.test, failures)
        report(table)
    except (ValueError, OSError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC
        reason = "the disk is full, make room and run the same command again" if full else error
        sys.exit(f"raw/ircad.py: {reason}")
    except KeyboardInterrupt:
        sys.exit("raw/ircad.py: interrupted, the same command goes on with what is missing")
    finally:
        with suppress(OSError):  # it is not empty, or was never made
            WORK.rmdir()
    if (table["verdict"] != "ok").any():
        sys.exit(1)
    print("next: python data.py")


if __name__ == "__main__":
    main()
