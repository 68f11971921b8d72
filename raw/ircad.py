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
"""

import argparse
import io
import os
import re
import signal
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import requests
from dicom import (
    JUNK,
    Slice,
    heights,
    make_affine,
    order_slices,
    reading,
    shape,
    to_hu,
    vector,
    write_volumes,
)
from pydicom.pixels import pixel_array
from scipy import ndimage
from tqdm import tqdm
from volumes import ROOT, damaged, named, one_sentence, sides, whole

RAW = ROOT / "raw"
WORK = RAW / ".ircad"  # the downloads
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
PAUSES_S = (2, 4, 8)  # before a download is tried again
TIMEOUT_S = (20, 90)  # to connect; between two pieces, since the server zips while it sends

SLICES = (129, 172, 200, 91, 139, 135, 151, 124, 111, 122)  # of patients 1 to 10
SLICES += (132, 260, 122, 113, 125, 155, 119, 74, 124, 225)  # and 11 to 20
NUMBERS = range(1, len(SLICES) + 1)
TEST = range(14, 21)  # seven patients, as many as the tutorial tests on
OTHER = {"train": "test", "test": "train"}

ZIP = re.compile(r".*ircad.*\.zip|(patient|masks)_dicom\.zip", re.IGNORECASE)
# a slice of the CT, the liver or a tumour: livertumor01, rightsurretumor, livercyst, liverkyste
STACK = re.compile(
    r".*/(patient_dicom|(?<=masks_dicom/)(?:liver|[^/]*(?:tum|cyst|kyst)[^/]*))/(.+)"
)

LIVER_ML = (200, 4000)
LIVER_HU = (0, 250)  # the median: from a fatty liver to one full of contrast medium
BODY_HU = -300  # below it lie air and lungs
COLUMNS = ("patient", "split", "slices", "with_liver", "spacing_mm", "liver_ml", "liver_hu")
COLUMNS += ("side", "verdict", "why")
Reader = Callable[[], bytes]


def fetch(url: str, number: int, path: Path) -> None:
    """Write the zip of a patient to a file and check it by its own CRCs.

    Raises ValueError for no zip, an error of requests or zipfile for a zip that came damaged.
    """
    query, headers = {"path": f"/3Dircadb1.{number}"}, {"Accept-Encoding": "identity"}
    with requests.get(url, query, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
        answer.raise_for_status()
        total = int(answer.headers.get("Content-Length", 0)) or None  # None while it is zipping
        bar = {"desc": f"patient {number}: download", "total": total}
        with open(path, "wb") as file, tqdm.wrapattr(file, "write", **bar) as counted:
            for piece in answer.iter_content(2**18):
                if file.tell() == 0 and not piece.startswith(b"PK"):
                    kind = answer.headers.get("Content-Type")
                    raise ValueError(f"{answer.url} answers with {kind}, no zip: {BY_HAND}")
                counted.write(piece)
    with zipfile.ZipFile(path) as archive:
        if name := archive.testzip():
            raise zipfile.BadZipFile(f"{name} came damaged")


def download(url: str, number: int, path: Path) -> None:
    """Write the zip of a patient to a file, unless an earlier run has left it.

    Raises ConnectionError if the server is out of reach, ValueError if it has no zip of this one.
    """
    for pause_s in (*PAUSES_S, None):
        if path.exists():
            return
        try:
            with whole(path) as (draft,):
                fetch(url, number, draft)
        except (requests.RequestException, zipfile.BadZipFile, zlib.error) as error:
            status = getattr(getattr(error, "response", None), "status_code", 0)
            reason = f"{status} {error.response.reason}" if status else type(error).__name__
            refused = 400 <= status < 500 and status != 429  # 429: too many requests, so wait
            if refused or pause_s is None:
                away = isinstance(error, requests.ConnectionError | requests.Timeout)
                kind = ConnectionError if away or status >= 500 else ValueError
                raise kind(f"{url} gives no whole zip ({reason}): {BY_HAND}") from error
            print(f"patient {number}: {reason}, trying again")
            time.sleep(pause_s)


def patient_number(path: Path) -> int | None:
    """Return N of the last 3Dircadb1.N in a path, None if there is none."""
    found = re.findall(r"3dircadb1\.(\d+)", str(path), re.IGNORECASE)
    return int(found[-1]) if found else None


def list_container(path: Path, read: Reader) -> Iterator[tuple[str, Reader]]:
    """Yield (name, function that reads it) of the files in a folder, zips first, or in a zip."""
    if path.is_dir():
        for file in sorted(path.rglob("*"), key=lambda file: (file.suffix.lower() != ".zip", file)):
            if file.is_file():
                yield file.relative_to(path).as_posix(), file.read_bytes
        return
    with reading(path):
        archive = zipfile.ZipFile(path if path.exists() else io.BytesIO(read()))
    with archive:
        for info in archive.infolist():
            if not info.is_dir():
                yield info.filename.replace("\\", "/").lstrip("/"), partial(archive.read, info)


def list_files(path: Path, number: int | None, read: Reader = bytes) -> Iterator:
    """Yield (path, function that reads it) of the files in a folder or zip, and in zips in it.

    Zips of other patients are not looked into. A zip counts as a folder of the paths; it is never
    unpacked on the disk. Raises ValueError if one is damaged.
    """
    for name, read_file in list_container(path, read):
        file = path / name
        if JUNK.search(name):
            continue
        if ZIP.fullmatch(file.name) and patient_number(file) in (None, number):
            yield from list_files(file, number, read_file)
        else:
            yield file, read_file


def find_patients(source: Path, asked: list[int] | None) -> set[int]:
    """Return the numbers of the patients in a zip or a folder.

    Raises FileNotFoundError if there is none, ValueError if nothing tells the number of one.
    """
    paths = [path for path, _ in list_files(source, None)]
    numbers = {patient_number(path) for path in paths} & set(NUMBERS)
    nameless = [p for p in paths if not patient_number(p) and "patient_dicom" in str(p).lower()]
    if not numbers and not nameless:
        raise FileNotFoundError(
            f"{source} holds no PATIENT_DICOM: wanted 3Dircadb1.zip, or a folder with 3Dircadb1.1, "
            "3Dircadb1.2 and so on, zipped or unpacked"
        )
    if nameless and (numbers or len(asked or NUMBERS) > 1):
        raise ValueError(
            f"{nameless[0]} does not tell which patient it is of: name a folder above it "
            "3Dircadb1.N, or give only this patient to --from and add --patients N"
        )
    return set(asked) if nameless else numbers


def read_slice(path: Path, read: Reader) -> Slice:
    """Return a DICOM file. Raises ValueError if it is damaged or of another kind."""
    with reading(path):
        header = pydicom.dcmread(io.BytesIO(read()))  # a zip compares the CRC
        pixels = pixel_array(header)
        del header.PixelData
    return Slice(path, header, lambda: pixels)


def read_stacks(source: Path, number: int) -> dict[str, list[Slice]]:
    """Return the slices of a patient, {"patient_dicom": [...], "liver": ..., "livertumor01": ...}.

    A slice that is there both unpacked and zipped is taken from the zip, which has a checksum.
    Raises FileNotFoundError if there are none of CT or liver, ValueError if a file is damaged.
    """
    stacks: dict[str, dict[str, Slice]] = {}
    for path, read in tqdm(list_files(source, number), f"patient {number}", unit=" files"):
        found = STACK.fullmatch(path.as_posix().lower().replace(".zip/", "/"))
        if found and patient_number(path) in (number, None):
            stack, name = found.groups()
            if name not in stacks.setdefault(stack, {}):
                stacks[stack][name] = read_slice(path, read)
    for stack, folder in (("patient_dicom", "PATIENT_DICOM"), ("liver", "MASKS_DICOM/liver")):
        if stack not in stacks:
            raise FileNotFoundError(f"{source} has no slices of this patient in {folder}: {AGAIN}")
    return {stack: list(slices.values()) for stack, slices in stacks.items()}


def places(slices: list[Slice], images: list[Slice], keyword: str) -> list[int]:
    """Return the place of each slice in the CT, by ImagePositionPatient or InstanceNumber."""
    if keyword == "InstanceNumber":
        numbers = np.array([vector(one, keyword, 1)[0] for one in slices])
        return (numbers - numbers.min()).tolist()
    images_mm = heights(images, images)
    step_mm = (images_mm[-1] - images_mm[0]) / (len(images) - 1)
    return np.rint((heights(slices, images) - images_mm[0]) / step_mm).tolist()


def match_slices(masks: list[Slice], images: list[Slice]) -> np.ndarray:
    """Return a mask as (columns, rows, slices) bool, in the order of the image slices.

    A mask slice belongs to the image slice at its position. If the headers of the mask have no
    positions, or not those of the image, InstanceNumber decides, and that is printed; names never.
    Raises ValueError if the numbers or sizes of slices differ, or if the headers tell nothing.
    """
    folder, size = masks[0].path.parent, shape(images[0])
    if len(masks) != len(images):
        raise ValueError(f"{folder} has {len(masks)} slices, but the CT {len(images)}: {AGAIN}")
    for one in masks:
        if shape(one) != size:
            found, wanted = sides(shape(one)), sides(size)
            raise ValueError(f"{one.path} is {found} pixels, but the CT {wanted}: {AGAIN}")
    for keyword in ("ImagePositionPatient", "InstanceNumber"):
        with suppress(ValueError):  # the headers do not have it
            wanted = places(images, images, keyword)
            at = dict(zip(places(masks, images, keyword), masks, strict=True))
            if len(at) == len(images) and at.keys() == set(wanted):
                if keyword == "InstanceNumber":
                    print(f"{folder} lacks the CT's positions: it is matched by InstanceNumber")
                return np.stack([at[place].read().T > 0 for place in wanted], axis=-1)
    raise ValueError(f"{folder} has neither positions nor InstanceNumbers of the CT: {AGAIN}")


def add_tumour(liver: np.ndarray, tumour: np.ndarray) -> int:
    """Add those pieces of a tumour that are in the liver to it, in place; return how many voxels.

    A piece is in the liver if most of the voxels that share a face with it are liver: all around a
    hole in the mask, more than half at a notch in its surface, but few where a tumour of the
    adrenal gland leans on the liver.
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


def join_liver(stacks: dict[str, list[Slice]], images: list[Slice]) -> np.ndarray:
    """Return the liver, (columns, rows, slices) bool, with tumours in it that its mask leaves out.

    Raises ValueError if a mask does not fit the image or no liver is marked.
    """
    liver = match_slices(stacks["liver"], images)
    if not liver.any():
        raise ValueError(f"{stacks['liver'][0].path.parent} marks no liver in any slice: {AGAIN}")
    for stack in sorted(stacks.keys() - {"patient_dicom", "liver"}):  # tumours and cysts
        if voxels := add_tumour(liver, match_slices(stacks[stack], images)):
            folder = stacks[stack][0].path.parent
            print(f"{folder} is in the liver: {voxels} voxels were added to it")
    return liver


def pair(number: int, split: str) -> list[Path]:
    """Return the paths of a patient's mask and image; data.py refuses a mask without an image."""
    return [RAW / split / f"ircad_e{number:02d}_{kind}.nii.gz" for kind in ("liver", "orig")]


def convert(source: Path, number: int, split: str) -> None:
    """Write the mask and the image of a patient.

    Raises FileNotFoundError or ValueError if the DICOM files are not all there or do not fit, or
    if another file than a stopped run leaves would be overwritten.
    """
    stacks = read_stacks(source, number)
    images = order_slices(stacks["patient_dicom"])
    affine = make_affine(images)
    volumes = join_liver(stacks, images).astype(np.uint8), to_hu(images)
    paths = pair(number, split)
    write_volumes(dict(zip(paths, volumes, strict=True)), affine)


def is_whole(number: int, split: str) -> bool:
    """Say whether a patient is there with mask and image."""
    return all(path.exists() for path in pair(number, split))


def move_patients(splits: dict[int, str]) -> None:
    """Move who is in the wrong split. Raises ValueError, before that, for who is in both."""
    moves = [
        (here, there)
        for number, split in splits.items()
        for here, there in zip(pair(number, OTHER[split]), pair(number, split), strict=True)
        if here.exists()
    ]
    for here, there in moves:
        if there.exists():
            raise ValueError(f"{named(here)} is in raw/{there.parent.name} too: take one away")
    for here, there in moves:
        os.replace(here, there)
        print(f"{here.name} moves from raw/{here.parent.name} to raw/{there.parent.name}")


def get_patients(options: argparse.Namespace, splits: dict[int, str]) -> dict[int, str]:
    """Convert the patients who are not there yet; return {patient: why not} for those who fail.

    One who fails does not keep the others from going on, but a server out of reach does.
    """
    wanted = [n for n in options.patients or NUMBERS if not is_whole(n, splits[n])]
    found = find_patients(options.source, options.patients) if options.source and wanted else wanted
    absent = [n for n in wanted if n not in found]
    failures = {n: f"is not in {options.source}" for n in absent if options.patients}
    if absent and not options.patients:
        print(f"{options.source} does not hold patients {', '.join(map(str, absent))}")
    for number in (n for n in wanted if n in found):
        zipped = WORK / f"3Dircadb1.{number}.zip"
        try:
            if not options.source:
                download(options.url, number, zipped)
            convert(options.source or zipped, number, splits[number])
        except (ValueError, FileNotFoundError, ConnectionError) as error:
            failures[number] = str(error)
            if isinstance(error, ConnectionError):
                break
        if not options.source and not options.keep:
            zipped.unlink(missing_ok=True)
    return failures


def measure(number: int, split: str) -> dict[str, object]:
    """Return what the files of a patient hold, and what is odd about it, for the table."""
    mask, image = (nib.load(path) for path in pair(number, split))
    inside, hu = np.asarray(mask.dataobj) > 0, np.asarray(image.dataobj)
    slices, spacing_mm = image.shape[2], image.header.get_zooms()
    liver_ml = np.count_nonzero(inside) * np.prod(spacing_mm) / 1000
    liver_hu = np.median(hu[inside])
    voxels = [np.count_nonzero(part, axis=(1, 2)) for part in (inside, hu > BODY_HU)]
    liver_x, body_x = (np.average(np.arange(len(n)), weights=n) for n in voxels)
    side = "right" if (liver_x - body_x) * image.affine[0, 0] > 0 else "left"  # NIfTI's x: right
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


def check_patients(splits: dict[int, str], failures: dict[int, str]) -> pd.DataFrame:
    """Return the table, a row for each patient who is there or failed."""
    rows = []
    there = [n for n, split in splits.items() if n in failures or is_whole(n, split)]
    for number in tqdm(there, "checks", unit=" patients"):
        split, why = splits[number], failures.get(number)
        row = {"patient": number, "split": split, "verdict": "failed", "why": why}
        try:
            row |= {} if why else measure(number, split)
        except Exception as error:  # nibabel and numpy have one for each kind of damage
            image = named(pair(number, split)[1])
            row["why"] = str(damaged(f"{image} or its mask", error, "delete both and rerun"))
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS).convert_dtypes()


def report(table: pd.DataFrame) -> None:
    """Write the table to raw/ircad.csv, print it, and name those patients who are not ok."""
    with whole(RAW / "ircad.csv") as (draft,):
        table.to_csv(draft, index=False)
    shown = table.drop(columns="why").astype(object)
    print(shown.where(shown.notna(), "-").to_string(index=False))
    for row in table[table["verdict"] != "ok"].itertuples():
        print(f"patient {row.patient} {row.verdict}: {row.why}")
    for folder in (RAW / "train", RAW / "test"):
        if others := sorted({*folder.glob("[!.]*")} - {*folder.glob("ircad_e*")}):
            print(f"raw/{folder.name} also holds {others[0].name}: data.py will slice that too")


def prepare() -> None:
    """Make the folders, and clear away what a killed run left half-written."""
    for folder in (RAW / "train", RAW / "test", WORK):
        folder.mkdir(exist_ok=True)
        for path in folder.glob(".*ircad*"):
            path.unlink()


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    number = {"type": int, "choices": NUMBERS, "metavar": "N"}
    parser.add_argument("--from", dest="source", type=Path, metavar="PATH", help="zip or folder")
    parser.add_argument("--patients", nargs="+", help="these alone (1 to 20)", **number)
    parser.add_argument("--test", nargs="*", default=TEST, help="for raw/test (14-20)", **number)
    parser.add_argument("--url", default=URL, help="where to download from (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the downloads, in raw/.ircad")
    options = parser.parse_args(arguments)
    if options.source and not options.source.exists():
        parser.error(f"--from {options.source}: no such file or folder")
    options.source = options.source and options.source.resolve()  # it may tell a patient's number
    return options


def main(arguments: list[str] | None = None) -> None:
    """Get the patients, check them and say what comes next; errors leave in one sentence."""
    options = parse_options(arguments)
    splits = {n: "test" if n in options.test else "train" for n in NUMBERS}
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidy up as after Ctrl-C
    print(LICENCE, flush=True)
    try:
        prepare()
        move_patients(splits)
        table = check_patients(splits, get_patients(options, splits))
        report(table)
    except (ValueError, OSError) as error:
        sys.exit(f"raw/ircad.py: {one_sentence(error)}")
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
