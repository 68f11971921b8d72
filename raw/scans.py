"""Which scans lie in raw/, whose they are, whether they can be used, and what is odd about them.

data.py uses it; it does nothing by itself. A scan is a CT image and its liver mask, in one of the
LAYOUTS. raw/patients.csv, with the columns scan and patient, may say which are of one patient.
"""

import csv
import hashlib
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby, repeat
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from nibabel.affines import obliquity, voxel_sizes

from raw.volumes import (
    ROOT,
    Liver,
    Volume,
    apart_mm,
    check_header,
    free_memory,
    named,
    open_volume,
    sample,
    sides,
    turn_onto,
    upright,
)

SUFFIX = re.compile(r"\.nii(\.gz)?", re.IGNORECASE)
# An image and its mask below raw/train or raw/test, and what the scan is called; * may be _0000.
LAYOUTS = (
    ("{}_orig", "{}_liver", "{}"),
    ("volume-{}", "segmentation-{}", "volume-{}"),  # LiTS
    ("test-volume-{}", "test-segmentation-{}", "test-volume-{}"),
    ("imagesTr/{}*", "labelsTr/{}*", "{}"),  # Medical Segmentation Decathlon, nnU-Net, AMOS
    ("imagesTs/{}*", "labelsTs/{}*", "{}"),
    ("imagesVa/{}*", "labelsVa/{}*", "{}"),
    ("{}/ct", "{}/segmentations/liver", "{}"),  # TotalSegmentator
)
OTHER_ORGANS = "segmentations"  # a folder of a scan's, whose other masks are passed over
FAT_HU = -100  # below it lie fat and air
BODY_HU = -300  # below it lie air and lungs
MOST_BODY_HU = 180  # the median of all but air and lungs: fat and soft tissue
LIVER_ML = (200, 4000)
FIELD_MM = (20, 2000)
LEAST_PIXEL_MM = 0.2
MOST_ASKEW = 25  # degrees
SQUARE = 1.5  # how many times as long as wide a pixel of a slice may be
MOST_FAT = 0.05  # of a liver's voxels, how many may be air or fat
SOFT_HU = (-99, 200)  # within any window that a copy may have been clipped to
SIGNATURE = 16  # slices by which a scan is known again
COPIED = 0.1  # of the signature; more in common makes two scans one, or one a part of the other
LIVER_HU = (0, 250)  # the median: from a fatty liver to one full of contrast medium
SIDE = 0.02  # of the width of the volume: what lies closer to the body's middle is on no side
COLUMNS = ("scan", "patient", "voxels", "spacing_mm", "axes", "labels", "liver_ml", "liver_hu")
COLUMNS += ("side", "slices", "with_liver", "oblique", "odd", "values")


class Files(NamedTuple):
    """The files of a scan and whose it is; `mask` is None if it is segmented but not scored.

    `image` is None for a mask alone, which `check` refuses.
    """

    scan: str
    patient: str
    image: Path | None = None
    mask: Path | None = None


@contextmanager
def noting(faults: list[str]) -> Iterator[None]:
    """Keep what is wrong with one scan for later, so that the others are looked at too."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        faults.append(str(error))


def same(name: str) -> str:
    """Return what two spellings of a name have in common: lower case, accents in one form."""
    return unicodedata.normalize("NFC", name).lower()


def identify(path: Path, folder: Path) -> tuple[str, str, Path] | None:
    """Return what a path below raw/train or raw/test tells: scan, role and the partner's path.

    The role is "image" or "mask". None if the path is of no known form.
    """
    suffix = SUFFIX.search(path.name)
    if suffix is None or suffix.end() != len(path.name):
        return None
    stem = path.relative_to(folder).as_posix()[: -len(suffix[0])]
    for *pair, name in LAYOUTS:
        for role, own, other in zip(("image", "mask"), pair, reversed(pair), strict=True):
            pattern = own.replace("*", "(?:_0000)*").replace("{}", "([^/]+?)")
            if match := re.fullmatch(pattern, stem, re.IGNORECASE):
                partner = folder / (other.replace("*", "").format(match[1]) + suffix[0])
                return unicodedata.normalize("NFC", name.format(match[1])), role, partner
    return None


def list_files(folder: Path) -> list[Path]:
    """Return the files in a folder and, six levels deep, in those below it, less hidden ones."""
    depths = ["/".join("*" * depth) for depth in range(1, 7)]  # this follows links to folders
    paths = [path for depth in depths for path in sorted(folder.glob(depth))]
    visible = [p for p in paths if not re.search(r"(^|/)\.", p.relative_to(folder).as_posix())]
    return [path for path in visible if not path.is_dir()]


def find_files(split: str, owners: dict[str, str]) -> tuple[list[Files], list[str]]:
    """Return the scans of a split by name, never by order, and a sentence for each file too many.

    What is of no known form is left out, and that is printed.
    """
    folder, found, faults, others = ROOT / "raw" / split, {}, [], []
    for path in list_files(folder):
        if identity := identify(path, folder):
            name, role, _ = identity
            files = found.setdefault(same(name), Files(name, owners.get(same(name), name)))
            if earlier := getattr(files, role):
                faults.append(
                    f"{named(path)} and {earlier.name} are both the {role} of scan {name}: keep "
                    "one of them"
                )
            else:
                found[same(name)] = files._replace(**{role: path})
        elif path.parent.name != OTHER_ORGANS or path.parent.parent == folder:
            others.append(path)
    say_left_out(others, f"raw/{split}/NAME_orig.nii.gz or raw/{split}/NAME_liver.nii.gz")
    return [files for _, files in sorted(found.items())], faults


def say_left_out(paths: Iterable[Path], wanted: str) -> None:
    """Print which files are passed over, a line a folder."""
    for parent, group in groupby(sorted(paths, key=lambda path: path.parent), lambda p: p.parent):
        first, *more = (path.name for path in group)
        names = ", ".join([named(parent / first), *more[:9]])
        print(
            f"{names}{f' and {len(more) - 9} more' if more[9:] else ''} "
            f"{'are' if more else 'is'} left out: wanted {wanted}"
        )


def is_stray(path: Path) -> bool:
    """Return whether a file below raw/ is a volume or a table of patients in the wrong place."""
    place = path.relative_to(ROOT / "raw").as_posix()
    known = place.startswith(("train/", "test/")) or place == "patients.csv"
    return not known and bool(SUFFIX.search(path.name) or path.stem.lower().startswith("patients"))


def read_patients() -> dict[str, str]:
    """Return {scan: patient} of raw/patients.csv, empty if there is none.

    A scan may be named as its file. Raises ValueError for a table without the two columns, an empty
    field or a scan named twice.
    """
    path = ROOT / "raw" / "patients.csv"
    if not path.exists():
        return {}
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", "replace")  # as Excel saves it on Windows
    lines = text.splitlines() or [""]
    comma = ";" if ";" in lines[0] else ","  # Excel's in much of Europe
    table = csv.reader(lines, delimiter=comma)
    rows = [[field.strip() for field in row] for row in table if any(row)] or [[]]
    if not {"scan", "patient"} <= {*rows[0]}:
        raise ValueError(f"{named(path)} begins with {rows[0]}, wanted the line scan,patient")
    owners, spelled = {}, {}
    for number, row in enumerate(rows[1:], 2):
        fields = dict(zip(rows[0], row, strict=False))
        scan, patient = (fields.get(name, "") for name in ("scan", "patient"))
        scan = re.sub(r"(_orig|_liver)?\.nii(\.gz)?$", "", scan, flags=re.IGNORECASE)
        if not (scan and patient) or same(scan) in owners:
            raise ValueError(
                f"{named(path)} says {','.join(row)} in row {number}, wanted a scan and its "
                "patient, each scan once"
            )
        owners[same(scan)] = spelled.setdefault(same(patient), patient)
    return owners


def find_scans(only: str | None) -> tuple[dict[str, list[Files]], list[str]]:
    """Return {"train": scans, "test": scans}, and what is wrong with their names.

    Raises FileNotFoundError if the split that is asked for, or else raw/train, holds no scans,
    ValueError if raw/patients.csv cannot be used.
    """
    owners, found, faults = read_patients(), {}, []
    for split in ("train", "test"):
        found[split], wrong = find_files(split, owners)
        faults += wrong
    train, test = ({same(files.patient): files for files in found[split]} for split in found)
    for patient in sorted(train.keys() & test.keys()):
        here, there = (files.image or files.mask for files in (test[patient], train[patient]))
        faults.append(
            f"{named(here)} and {named(there)} are of one patient, {test[patient].patient}, and a "
            "test on training patients is no test: take the patient out of one of the two"
        )
    names = {same(files.scan) for files in (*found["train"], *found["test"])}
    if unknown := sorted(owners.keys() - names):
        said = f"raw/patients.csv names scans that are not in raw/: {', '.join(unknown)}"
        if owners.keys() <= set(unknown):  # then it is of no use, or meant otherwise
            faults.append(f"{said}; wanted names like {', '.join(sorted(names)[:2])}")
        else:
            print(said)
    strays = (path for path in list_files(ROOT / "raw") if is_stray(path))
    say_left_out(strays, "volumes in raw/train or raw/test, and patients in raw/patients.csv")
    wanted = only or "train"
    if not found[wanted]:
        raise FileNotFoundError(
            f"raw/{wanted} holds no volumes named NAME_orig.nii or NAME_orig.nii.gz: put CT scans "
            "there, from DICOM with `python raw/dicom.py FOLDER`, or run `python raw/ircad.py` for "
            "3D-IRCADb-01, `python raw/phantom.py` for synthetic ones"
        )
    if not found["test"]:
        print("raw/test holds no scans: nothing will be segmented or scored")
    return found, faults


def check_complete(files: Files, split: str) -> None:
    """Raise FileNotFoundError for a mask without image, or a training image without mask."""
    _, _, partner = identify(files.image or files.mask, ROOT / "raw" / split)
    if files.image is None:
        raise FileNotFoundError(
            f"{named(files.mask)} has no image: add {named(partner)}, or take the mask away"
        )
    if split == "train" and files.mask is None:
        raise FileNotFoundError(
            f"{named(files.image)} has no liver mask: add {named(partner)}, or move it to raw/test "
            "to segment it unscored"
        )


def check(files: Files, split: str, on_image_grid: bool) -> list[str]:
    """Return what is odd about the headers of a scan.

    on_image_grid : whether a mask of the image's shape lies on its voxels, whatever its affine
    Raises FileNotFoundError for a file that is missing, ValueError for a header that is not usable,
    or if image and mask are not on one grid.
    """
    check_complete(files, split)
    check_header(files.image)
    odd = odd_header(open_volume(files.image))
    if files.mask is None:
        return odd
    check_header(files.mask)
    image, mask = open_volume(files.image), open_volume(files.mask)
    if turn_onto(mask, image) is not None:
        return odd
    if image.shape[:3] != mask.shape[:3]:
        raise ValueError(
            f"{named(files.image)} is {sides(image.shape[:3])} but its mask {files.mask.name} is "
            f"{sides(mask.shape[:3])}: export the mask on the image's grid"
        )
    apart = apart_mm(image, mask.affine)
    if not on_image_grid:
        raise ValueError(
            f"{named(files.image)} and its mask {files.mask.name} have affines that put one voxel "
            f"{apart:.3g} mm apart: export the mask on the image's grid, or add "
            "--mask-on-image-grid if only its header is wrong"
        )
    return [*odd, f"the mask's affine, {apart:.3g} mm off, is set aside"]


def check_all(
    found: list[Files], split: str, on_image_grid: bool, faults: list[str]
) -> dict[Files, list[str]]:
    """Return {scan: what is odd about it} of those that `check` passes; add to faults why not."""
    odd = {}
    for files in found:
        with noting(faults):
            odd[files] = check(files, split, on_image_grid)
    return odd


def fitting_workers(found: Iterable[Files], bytes_a_voxel: int, most: int) -> int:
    """Return how many scans, at most `most`, can be sliced at a time in the memory that is free.

    bytes_a_voxel : what slicing takes beside the file's own, which are there twice
    """
    needed = [1]
    for files in found:
        images = [open_volume(path) for path in (files.image, files.mask) if path]
        stored = max(image.dataobj.dtype.itemsize for image in images)
        needed.append(math.prod(images[0].shape) * (bytes_a_voxel + 2 * stored))
    fitting = max(1, free_memory() // max(needed))
    if fitting < most:
        print(f"{fitting} at a time: the memory that is free does for no more")
    return min(fitting, most)


def odd_header(image: nib.Nifti1Image) -> list[str]:
    """Return what is odd about where a header says that an image lies."""
    header, qform = image.header, None
    codes = {name: int(header[f"{name}_code"]) for name in ("sform", "qform")}
    with suppress(ValueError):  # a quaternion that is none
        qform = image.get_qform() if all(codes.values()) else None
    parted = 0 if qform is None else apart_mm(image, qform)
    unit, placed = np.abs(image.affine) == np.eye(4), any(codes.values())
    pixdim, sizes = np.array(header.get_zooms()[:3]), voxel_sizes(image.affine)
    field_mm = sorted(image.shape[:3] * sizes)[1]  # of slices, however long the scan is
    askew = np.degrees(obliquity(image.affine).max())
    pixel = np.sort(sizes[nib.io_orientation(image.affine)[:, 0] < 2])  # along left and front
    (least, most), most_askew = FIELD_MM, MOST_ASKEW
    rules = {
        "its header does not say how it lies, check left and right in preds/": not placed,
        "its header gives 1 x 1 x 1 mm and no orientation, as LiTS 28 to 47 do, so that mm, ml, "
        "left and right may be wrong": unit[:3, : 4 if placed else 3].all(),
        f"its sform and qform put a voxel {parted:.3g} mm apart, the sform is taken": parted,
        f"its header gives voxels of {as_mm(pixdim)} mm and its sform of {as_mm(sizes)}, the sform "
        "is taken": not (parted or np.allclose(pixdim, sizes, rtol=0.01)),
        f"its slices are {field_mm:.3g} mm wide, wanted {least} to {most}, as if its header were "
        "not in mm": not least <= field_mm <= most,
        f"its pixels are {pixel[0]:.2g} mm wide, wanted {LEAST_PIXEL_MM} or more, as if its header "
        "were not in mm": pixel[0] < LEAST_PIXEL_MM and least <= field_mm,
        f"its axial slices have pixels of {as_mm(pixel)} mm, as if its axes were in another "
        "order": pixel[1] > SQUARE * pixel[0],
        f"it lies {askew:.0f} degrees askew, so that no slice is axial": askew > most_askew,
    }
    return [sentence for sentence, broken in rules.items() if broken]


def as_mm(sizes: np.ndarray) -> str:
    """Return voxel sizes as a person writes them: 0.7 x 0.7 x 5."""
    return " x ".join(f"{size:.4g}" for size in sizes)


def measure(files: Files, image: Volume, liver: Liver | None, odd: list[str]) -> dict[str, object]:
    """Return what a scan holds by the names of COLUMNS; `odd` is what is odd about its headers."""
    affine = open_volume(files.image).affine
    sizes = voxel_sizes(affine)
    everywhere, inside, slices, gaps = histograms(image, liver, files.image)
    everywhere[: 2**15 + BODY_HU] = 0  # air and lungs
    median = median_hu(everywhere)
    voxels, labels = int(inside.sum()), [] if liver is None else liver.labels
    labels = " ".join(f"{label:.4g}" for label in labels)
    row = {
        "scan": files.scan,
        "patient": files.patient,
        "voxels": sides(image.voxels.shape),
        "spacing_mm": as_mm(sizes),
        "axes": "".join(nib.aff2axcodes(affine)),
        "labels": labels,
        "odd": odd + [f"{image.gaps} voxels hold no number, they are air now"] * (image.gaps > 0),
        "values": " ".join(sorted(slices)[:SIGNATURE]),
    }
    if median > MOST_BODY_HU:
        row["odd"].append(
            f"a body of {median} HU, wanted at most {MOST_BODY_HU}, as if it were not in HU"
        )
    if liver is None:
        return row
    row["liver_ml"] = ml = round(voxels * sizes.prod() / 1000, 1)
    if voxels:
        row["liver_hu"] = median_hu(inside)
        row["side"] = side_of(image, liver.voxels, affine)
    hu, (least, most) = row.get("liver_hu", LIVER_HU[0]), LIVER_ML
    fat = inside[: 2**15 + FAT_HU].sum() / max(voxels, 1)
    rules = {
        f"{liver.gaps} voxels of its mask hold no number, they are background now": liver.gaps,
        f"no liver in its mask of labels {labels}, so all of its slices count as none": not voxels,
        f"a liver of {ml:g} ml, wanted {least} to {most}": voxels and not least <= ml <= most,
        f"a liver of {hu} HU, wanted {LIVER_HU[0]} to {LIVER_HU[1]}": (
            not LIVER_HU[0] <= hu <= LIVER_HU[1]
        ),
        f"{fat:.0%} of its liver are air or fat, as if the mask were not this scan's or lay on "
        "other axes": fat > MOST_FAT,
        f"{gaps} slices without liver between those with it, as if not all were marked": gaps > 1,
        "a liver on the patient's left, as if the scan were mirrored": row.get("side") == "left",
    }
    row["odd"] += [sentence for sentence, broken in rules.items() if broken]
    return row


def histograms(
    image: Volume, liver: Liver | None, scan: Path
) -> tuple[np.ndarray, np.ndarray, set[str], int]:
    """Return how often each HU from -32768 to 32767 is there, and in the liver, and two facts more.

    These are a name a slice, and how many slices without liver lie between those with it. The name,
    of an axial slice, follows from how often each HU of soft tissue is there, so that neither axes
    nor header, file type, padding or clipping can hide a copy.
    """
    everywhere, counts = np.zeros((2, 2**16), np.int64)
    names, with_liver = set(), []
    low, high = (2**15 + hu for hu in SOFT_HU)
    planes = upright(image.voxels, scan)  # slice by slice, for the memory
    livers = repeat(None) if liver is None else upright(liver.voxels, scan)
    for number, (plane, inside) in enumerate(zip(planes, livers, strict=False)):
        hu = np.rint(plane.astype(np.float32) * image.slope + image.inter)
        bins = (hu.clip(-(2**15), 2**15 - 1) + 2**15).astype(np.intp)
        found = np.bincount(bins.ravel(order="K"), minlength=2**16)
        everywhere += found
        soft = found[low:high]
        if np.count_nonzero(soft) > 1:  # blank slices are alike in all scans
            names.add(hashlib.blake2b(soft.tobytes(), digest_size=8).hexdigest())
        if inside is not None and inside.any():
            counts += np.bincount(bins[inside], minlength=2**16)
            with_liver.append(number)
    gaps = int(np.ptp(with_liver)) + 1 - len(with_liver) if with_liver else 0
    return everywhere, counts, names, gaps


def median_hu(counts: np.ndarray) -> int:
    """Return the median of what `histograms` counted, in HU."""
    return int(np.searchsorted(counts.cumsum(), (counts.sum() + 1) // 2)) - 2**15


def side_of(image: Volume, liver: np.ndarray, affine: np.ndarray) -> str:
    """Return on which side of the body's middle a liver lies: right, left, or "" for neither."""
    axis = int(np.flatnonzero(nib.io_orientation(affine)[:, 0] == 0)[0])  # along left and right
    body = sample(image.voxels) * image.slope + image.inter > BODY_HU
    places = [np.nonzero(part)[axis] for part in (sample(liver), body)]
    if not all(len(place) for place in places):
        return ""
    offset = (places[0].mean() - places[1].mean()) / body.shape[axis] * np.sign(affine[0, axis])
    return "" if abs(offset) < SIDE else "right" if offset > 0 else "left"  # NIfTI's x: right


def find_copies(rows: dict[str, list[dict]]) -> list[str]:
    """Return a sentence for each scan whose slices are in both splits; one in its own is odd.

    rows : {split: what `measure` returned}
    """
    faults, seen = [], []
    for split, scans in rows.items():
        for row in scans:
            slices = {*row["values"].split()}
            for first_split, first, others in seen:
                if len(slices & others) <= COPIED * min(len(slices), len(others)):
                    continue
                if first_split != split:
                    faults.append(
                        f"raw/{split} holds with {row['scan']} the voxels of {first['scan']} in "
                        f"raw/{first_split}, and a test on training patients is no test: take one "
                        "away"
                    )
                elif first["patient"] != row["patient"]:
                    row["odd"].append(
                        f"the voxels of {first['scan']} under another name, give both one patient "
                        "in raw/patients.csv"
                    )
                break
            seen.append((split, row, slices))
    return faults


def find_no_liver(rows: dict[str, list[dict]], sliced: list[str]) -> list[str]:
    """Return a sentence if the training scans were sliced and not one of them holds liver."""
    train = rows["train"] if "train" in sliced else []
    if not train or any(row["with_liver"] for row in train):
        return []
    return [
        "raw/train holds no liver to learn: check its masks, or say which label it is: --label N"
    ]


def report(split: str, rows: list[dict], size: int) -> None:
    """Print a line a scan, one for all that is odd about it, and what was sliced in all."""
    hidden = {"slices", "with_liver", "oblique", "odd", "values"}
    if all(row["scan"] == row["patient"] for row in rows):
        hidden.add("patient")
    shown = [name for name in COLUMNS if name not in hidden]
    lines = [shown, *([str(row.get(name, "")) or "-" for name in shown] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"raw/{split}")
    for line in lines if rows else ():
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
    for row in rows:
        for sentence in row["odd"]:
            print(f"{row['scan']}: {sentence}")
    slices, liver, oblique = (
        sum(row[name] for row in rows) for name in ("slices", "with_liver", "oblique")
    )
    print(
        f"{split}: {len(rows)} scans, {slices} slices of {size} x {size}, {liver} with liver"
        + (f", {oblique} oblique" if oblique else "")
    )


def write_table(path: Path, rows: list[dict]) -> None:
    """Write what `measure` returned as csv, a line a scan."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(row | {"odd": "; ".join(row["odd"])} for row in rows)


def read_table(path: Path, found: list[Files]) -> list[dict]:
    """Return what an earlier run wrote of the scans that are still there, [] if there is none."""
    if not path.exists():
        return []
    there = {files.scan for files in found}
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = [row for row in csv.DictReader(file) if row.keys() >= {*COLUMNS}]
    return [row | {"odd": []} for row in rows if row["scan"] in there]


def check_files(paths: set[Path], split: str, sliced_s: float) -> None:
    """Print which files were changed or added after slicing, `sliced_s` in seconds since 1970.

    Raises FileNotFoundError for one of the test split that is gone.
    """
    folder = ROOT / "raw" / split
    there = {path for path in list_files(folder) if identify(path, folder)}
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
