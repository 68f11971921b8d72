"""What is known of a scan: its names, finding, checking, reading and writing it.

Used by the scripts beside it and by data.py; it does nothing by itself. A scan is a CT volume in
Hounsfield units, NAME_orig.nii.gz or LiTS's volume-N.nii, and its liver mask, NAME_liver.nii.gz or
segmentation-N.nii, with one label or LiTS's 1 and 2. A volume is (x, y, z) as NIfTI stores it.
"""

import errno
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from isal import igzip  # gzip, decompressed more than twice as fast
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

ROOT = Path(__file__).resolve().parents[1]  # the folder of data.py
PARTNERS = {"orig": "liver", "liver": "orig", "volume": "segmentation", "segmentation": "volume"}
NAMES = re.compile(
    r"((?P<name>.+)_(?P<kind>orig|liver)|(?P<lits>volume|segmentation)-(?P<number>\d+))"
    r"\.nii(\.gz)?",
    re.IGNORECASE,
)
MAX_LABELS = 5  # a liver mask holds 0 and 1, or 0 and 255, or a few tumour labels beside
MIN_AIR = 0.005  # of the voxels of a CT, below -100 HU
AFFINE_TOLERANCE = 0.1  # voxels by which an image and its mask may lie apart: header rounding
MIN_ORTHOGONALITY = 0.99  # a voxel's volume over that of a box with its sides; 8 degrees off
OTHER_UNITS = {1: "metres", 3: "micrometres"}  # NIfTI's xyzt_units; 2 is mm, 0 does not say


class Patient(NamedTuple):
    """The files of one patient; `mask` is None for a scan that is segmented but not scored."""

    name: str
    image: Path
    mask: Path | None


def named(path: Path) -> str:
    """Return a path as the user sees it, from the folder of data.py."""
    return Path(os.path.relpath(path, ROOT)).as_posix()


def sides(shape: tuple) -> str:
    """Return a shape as a person writes it: 512 x 512 x 129."""
    return " x ".join(str(n) for n in shape)


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


def pair_files(files: dict[str, Path], mask_needed: bool) -> Patient:
    """Return the patient of {"image": path, "mask": path}.

    Raises FileNotFoundError for a mask without image, or an image without a mask that is needed.
    """
    name, role, partner = identify(files.get("image") or files["mask"])
    if role == "mask":
        raise FileNotFoundError(
            f"{named(files['mask'])} has no image: put {partner.name} beside it, or take it away"
        )
    if mask_needed and "mask" not in files:
        raise FileNotFoundError(
            f"{named(files['image'])} has no liver mask: put {partner.name} beside it, or move it "
            "to raw/test to segment it unscored"
        )
    return Patient(name, files["image"], files.get("mask"))


def find_patients(only: str | None) -> dict[str, list[Patient]]:
    """Return {"train": patients, "test": patients} by name, or the one split that is asked for.

    Raises FileNotFoundError where scans are missing, ValueError for a patient in both splits.
    """
    found = {split: find_files(ROOT / "raw" / split) for split in ("train", "test")}
    if both := found["train"].keys() & found["test"].keys():
        path, *_ = found["test"][min(both)].values()
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
        split: [pair_files(files, split == "train") for _, files in sorted(by_name.items())]
        for split, by_name in found.items()
        if only in (None, split)
    }


def damaged(file: str, error: Exception, again: str = "copy or convert it again") -> ValueError:
    """Return the error of a file that is of another kind, cut short or damaged."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())  # on one line
    return ValueError(f"{file} cannot be read as a whole file ({reason}): {again}")


def one_sentence(error: Exception) -> str:
    """Return the sentence in which a script that writes files ends."""
    full = getattr(error, "errno", None) == errno.ENOSPC
    return "the disk is full, make room and run the same command again" if full else str(error)


def open_volume(path: Path) -> nib.Nifti1Image:
    """Return a NIfTI image whose header is read and whose voxels are not.

    Raises ValueError for a file that is no NIfTI, or whose header is damaged.
    """
    try:
        return nib.load(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # nibabel has a class of error for each kind of damage
        raise damaged(named(path), error) from error


def check_header(path: Path) -> None:
    """Raise ValueError unless a file is NIfTI, 3-D, in mm, and has axes at right angles.

    A fourth axis of length one is let through.
    """
    image = open_volume(path)
    shape, axes = image.shape, image.affine[:3, :3]
    unit = OTHER_UNITS.get(int(image.header["xyzt_units"]) & 7)
    orthogonality = abs(np.linalg.det(axes / np.maximum(np.linalg.norm(axes, axis=0), 1e-9)))
    rules = {
        f"has the shape {sides(shape)}, wanted one 3-D volume: export it as one": (
            len(shape) < 3 or max(shape[3:], default=1) > 1 or min(shape) < 1
        ),
        f"gives its voxel sizes in {unit}, wanted mm: convert it again from DICOM": unit,
        f"has an affine that cannot be inverted, {axes.tolist()}, so its axes have no direction or "
        "length: convert it again from DICOM": not orthogonality > 1e-3,  # also true of NaN
        f"has axes that are not at right angles, {axes.tolist()}, as if the gantry had leaned, so "
        "distances in mm would be wrong: resample it first": orthogonality < MIN_ORTHOGONALITY,
    }
    for sentence, broken in rules.items():
        if broken:
            raise ValueError(f"{named(path)} {sentence}")


def furthest_mm(shape: tuple, one: np.ndarray, other: np.ndarray) -> float:
    """Return how far two affines put a voxel of a volume apart at most, in mm along one axis."""
    corners = np.argwhere(np.ones((2, 2, 2))) * (np.array(shape[:3]) - 1)  # (8, x y z)
    places_mm = [nib.affines.apply_affine(affine, corners) for affine in (one, other)]
    return np.abs(np.subtract(*places_mm)).max()


def check_patient(patient: Patient) -> None:
    """Raise ValueError if a header is not usable, or if image and mask are not on one grid."""
    check_header(patient.image)
    image = open_volume(patient.image)
    codes = image.header["sform_code"], image.header["qform_code"]
    apart_mm = furthest_mm(image.shape, image.get_sform(), image.get_qform()) if all(codes) else 0
    warnings = {
        "does not say how it lies: check left and right in preds/": not any(codes),
        "has an identity affine, as if its own was lost: mm and ml may be wrong, and left and "
        "right": any(codes) and np.array_equal(image.affine, np.eye(4)),
        f"has an sform and a qform that put one voxel {apart_mm:.3g} mm apart: the sform is taken, "
        "check left and right in preds/": apart_mm > 0.1,
    }
    for sentence, odd in warnings.items():
        if odd:
            print(f"{named(patient.image)} {sentence}")
    if patient.mask is None:
        return
    check_header(patient.mask)
    mask = open_volume(patient.mask)
    if image.shape[:3] != mask.shape[:3]:
        raise ValueError(
            f"{named(patient.image)} is {sides(image.shape[:3])} but its mask {patient.mask.name} "
            f"is {sides(mask.shape[:3])}: export the mask on the image's grid"
        )
    apart = furthest_mm(image.shape, image.affine, mask.affine)
    if not apart <= AFFINE_TOLERANCE * nib.affines.voxel_sizes(image.affine).min():
        raise ValueError(
            f"{named(patient.image)} and its mask {patient.mask.name} have affines that put one "
            f"voxel {apart:.3g} mm apart: export the mask on the image's grid"
        )


def read_voxels(path: Path) -> tuple[np.ndarray, float, float]:
    """Return the voxels as stored, (x, y, z) in the file's type, and slope and intercept to units.

    The file is read to its end, so that gzip's checksum is compared. Raises ValueError for a file
    that is cut short or damaged, holds no real numbers, or holds NaN or infinite values.
    """
    image = open_volume(path)
    stored = image.dataobj
    if stored.dtype.kind not in "iuf":
        raise ValueError(f"{named(path)} holds {stored.dtype}, wanted a number a voxel: convert it")
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = igzip.decompress(content)
        flat = np.frombuffer(content, stored.dtype, math.prod(image.shape), stored.offset)
    except Exception as error:
        raise damaged(named(path), error) from error
    if not np.isfinite([flat.min(), flat.max()]).all():
        raise ValueError(
            f"{named(path)} holds NaN or infinite values, wanted a number in every voxel: replace "
            "them, air is -1000 HU"
        )
    return flat.reshape(image.shape[:3], order="F"), stored.slope, stored.inter


def read_image(path: Path) -> tuple[np.ndarray, float, float]:
    """Return what `read_voxels` does, for a CT image.

    Raises ValueError if it is not in HU: air and fat below -100 HU fill a part of every CT, be it
    clipped, and a part of it that one odd corner of another image does not.
    """
    voxels, slope, inter = read_voxels(path)
    low, high = sorted((voxels.min() * slope + inter, voxels.max() * slope + inter))
    fat = (-100 - inter) / slope  # as stored
    air = np.count_nonzero(voxels < fat if slope > 0 else voxels > fat) / voxels.size
    if air < MIN_AIR or high < 0:
        raise ValueError(
            f"{named(path)} holds values from {low:g} to {high:g}, {air:.2%} of them below "
            "-100, wanted Hounsfield units with air and fat below -100 and organs above 0: convert "
            "it with the DICOM's rescale slope and intercept"
        )
    return voxels, slope, inter


def read_mask(path: Path) -> np.ndarray:
    """Return the liver on the file's own grid, (x, y, z) bool.

    That is one label of any value, or LiTS's 1 and 2, liver and tumour. Raises ValueError if the
    values are not labels (negative, fractions, too many of them), or are those of several organs.
    """
    voxels, slope, inter = read_voxels(path)
    labels: set[float] = set()
    for plane in np.moveaxis(voxels, 2, 0):  # (x, y)
        flat = plane.ravel(order="K")
        changes = np.flatnonzero(flat[1:] != flat[:-1])  # labels are few runs of equal values
        found = np.unique(np.append(flat[changes], flat[-1])) * slope + inter
        near = np.rint(found)  # scaled labels are whole but for rounding
        labels.update(np.where(np.abs(found - near) < 0.01, near, found).tolist())
        if len(labels) > MAX_LABELS or min(labels) < 0 or any(label % 1 for label in labels):
            raise ValueError(
                f"{named(path)} is no label mask, it holds values like "
                f"{', '.join(f'{label:g}' for label in sorted(labels)[:MAX_LABELS])}; wanted 0 for "
                "background and 1 for liver: export it as a binary label map"
            )
    if len(labels - {0}) > 1 and not labels <= {0, 1, 2}:
        voxel_ml = np.prod(nib.affines.voxel_sizes(open_volume(path).affine)) / 1000
        sizes_ml = {
            int(label): np.count_nonzero(np.abs(voxels * slope + inter - label) < 0.5) * voxel_ml
            for label in sorted(labels - {0})
        }
        raise ValueError(
            f"{named(path)} holds several organs, label: ml "
            f"{', '.join(f'{label}: {ml:.3g}' for label, ml in sizes_ml.items())}; wanted one "
            "label, or LiTS's 1 and 2: keep the liver's label and set the others to 0"
        )
    half = (0.5 - inter) / slope  # as stored; scaling the voxels would take their memory again
    return voxels > half if slope > 0 else voxels < half


def as_nifti(volume: np.ndarray, affine: np.ndarray, axes: str) -> nib.Nifti1Image:
    """Return a volume as NIfTI, stored along other axes; what it shows keeps its place in mm.

    volume : (x, y, z) on the axes of the affine; axes : nibabel's axis codes, such as LAS
    """
    change = ornt_transform(io_orientation(affine), axcodes2ornt(axes))
    image = nib.Nifti1Image(volume, affine).as_reoriented(change)
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    image.header.set_xyzt_units("mm")
    return image


@contextmanager
def whole(*paths: Path) -> Iterator[list[Path]]:
    """Yield a hidden name for each path, to be written to; they get their names when all are whole.

    If anything goes wrong, Ctrl-C too, the files that stood there before stand there again, and
    nothing half-written is left.
    """
    drafts = [path.with_name(f".{path.name}") for path in paths]
    kept = [path.with_name(f".earlier-{path.name}") for path in paths]
    begun: list[tuple[Path, Path]] = []
    try:
        yield drafts
        away = [(path, place) for path, place in zip(paths, kept, strict=True) if path.exists()]
        for move in [*away, *zip(drafts, paths, strict=True)]:
            begun.append(move)
            os.replace(*move)
    except BaseException:
        for source, target in reversed(begun):
            if target.exists() and not source.exists():  # the last one may not have come to pass
                os.replace(target, source)
        raise
    else:
        for path in kept:
            path.unlink(missing_ok=True)
    finally:
        for path in drafts:
            path.unlink(missing_ok=True)
