"""What is known of a file: how it is opened, checked, read and written.

Used by the scripts beside it and by data.py; it does nothing by itself. A scan is a CT volume in
Hounsfield units and its liver mask, both NIfTI. A volume is (x, y, z) as NIfTI stores it.
"""

import errno
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import psutil
from isal import igzip  # gzip, decompressed more than twice as fast
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.orientations import (
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)

ROOT = Path(__file__).resolve().parents[1]  # the folder of data.py
CGROUP = Path("/sys/fs/cgroup")  # what a container may use
AFFINE_TOLERANCE = 0.1  # voxels by which an image and its mask may lie apart: header rounding
MIN_ORTHOGONALITY = 0.99  # a voxel's volume over that of a box with its sides; 8 degrees off
OTHER_UNITS = {1: "metres", 3: "micrometres"}  # NIfTI's xyzt_units; 2 is mm, 0 does not say
GZIP = b"\x1f\x8b"  # how a zipped file begins, whatever it is called
AIR_HU = -1000.0  # what lies beyond a volume, and where it holds no number
# What a CT in HU holds: from, to, and the least and most of its voxels there. A box around the
# liver alone holds 14 % fat and air and 1 % bone; padding of -2000 or -3024 is no air.
HU_SHARES = {
    "fat and air": (-1500, -100, 0.01, 1),
    "organs": (-100, 300, 0.01, 1),
    "bone and metal": (600, np.inf, 0, 0.2),
}
MAX_LABELS = 256  # of a mask; what holds more values is none
MAX_BENT = 0.1  # how far scaling may have bent a label from its whole number
LITS = [0, 1, 2]  # background, liver and its tumours
SHOWN = 20  # labels, at most, in a sentence

nib.imageglobals.logger.setLevel("CRITICAL")  # a damaged header is said in our own sentence


class Volume(NamedTuple):
    """Voxels as stored, (x, y, z) in the file's type; times slope plus inter they have their unit.

    `gaps` is how many held no number and were filled.
    """

    voxels: np.ndarray
    slope: float
    inter: float
    gaps: int


class Liver(NamedTuple):
    """The liver of a mask, (x, y, z) bool; all labels of the mask; how many gaps were filled."""

    voxels: np.ndarray
    labels: list[float]
    gaps: int


def named(path: Path) -> str:
    """Return a path as the user sees it, from the folder of data.py."""
    return Path(os.path.relpath(path, ROOT)).as_posix()


def sides(shape: tuple) -> str:
    """Return a shape as a person writes it: 512 x 512 x 129."""
    return " x ".join(str(n) for n in shape)


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

    Its first bytes say whether it is zipped. Raises ValueError for a file that is no NIfTI, or
    whose header is damaged.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(len(GZIP)) == GZIP
        with igzip.open(path) if zipped else open(path, "rb") as file:
            second = nib.Nifti2Header.may_contain_header(file.read(nib.Nifti2Header.sizeof_hdr))
            return (nib.Nifti2Image if second else nib.Nifti1Image).from_stream(file)
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


def upright_orientation(scan: Path) -> np.ndarray:
    """Return nibabel's orientation transform from the axes of a scan to the closest of L, P, S."""
    stored = io_orientation(open_volume(scan).affine)
    return ornt_transform(stored, axcodes2ornt("LPS"))


def upright(volume: np.ndarray, scan: Path) -> np.ndarray:
    """Return a volume (x, y, z) on a scan's voxels as upright axial slices, a view.

    (slices, rows, columns): slices from the feet up, rows from front to back, columns from the
    patient's right to left.
    """
    lps = apply_orientation(volume, upright_orientation(scan))  # (L, P, S)
    return lps.transpose(2, 1, 0)  # (slices, rows, columns)


def grid(scan: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the shape of a scan's upright stack and its spacing in mm: slices, rows, columns."""
    image = open_volume(scan)
    axes = np.argsort(upright_orientation(scan)[:, 0])[::-1]  # the file's axes along S, P and L
    return np.array(image.shape)[axes], nib.affines.voxel_sizes(image.affine)[axes]


def apart_mm(image: nib.Nifti1Image, affine: np.ndarray) -> float:
    """Return how far another affine puts a corner of an image off, 0 if it is but rounding."""
    corners = list(product(*((0, n - 1) for n in image.shape[:3])))  # (8, x y z)
    apart = np.abs(apply_affine(image.affine, corners) - apply_affine(affine, corners)).max()
    return float(apart * (apart > AFFINE_TOLERANCE * voxel_sizes(image.affine).min()))


def turn_onto(mask: nib.Nifti1Image, image: nib.Nifti1Image) -> np.ndarray | None:
    """Return the orientation transform from a mask's axes to an image's if they share voxels.

    None if they do not.
    """
    turn = ornt_transform(io_orientation(mask.affine), io_orientation(image.affine))
    shape = tuple(np.array(mask.shape[:3])[np.argsort(turn[:, 0])])
    turned = mask.affine @ inv_ornt_aff(turn, mask.shape[:3])
    return None if shape != image.shape[:3] or apart_mm(image, turned) else turn


def read_voxels(path: Path, fill: float) -> Volume:
    """Return a file's voxels; those that are NaN or infinite become `fill`, in the file's unit.

    The file is read to its end, so that gzip's checksum is compared. Raises ValueError for a file
    that is cut short or damaged, or holds no real numbers.
    """
    image = open_volume(path)
    stored = image.dataobj
    if stored.dtype.kind not in "iuf":
        raise ValueError(f"{named(path)} holds {stored.dtype}, wanted a number a voxel: convert it")
    try:
        content = path.read_bytes()
        if content.startswith(GZIP):
            content = igzip.decompress(content)
        flat = np.frombuffer(content, stored.dtype, math.prod(image.shape), stored.offset)
    except Exception as error:
        raise damaged(named(path), error) from error
    gaps = 0
    if not np.isfinite([flat.min(), flat.max()]).all():
        is_number = np.isfinite(flat)
        gaps = flat.size - int(np.count_nonzero(is_number))
        flat = np.where(is_number, flat, flat.dtype.type((fill - stored.inter) / stored.slope))
    return Volume(flat.reshape(image.shape[:3], order="F"), stored.slope, stored.inter, gaps)


def sample(volume: np.ndarray) -> np.ndarray:
    """Return about a million voxels of a volume, (x, y, z), evenly spread, a view."""
    step = max(1, round((volume.size / 1e6) ** (1 / 3)))
    return volume[::step, ::step, ::step]


def read_image(path: Path) -> Volume:
    """Return a CT image. Raises ValueError if it is not in HU, as a share of its voxels tells."""
    image = read_voxels(path, AIR_HU)
    voxels, slope, inter, _ = image
    if voxels.dtype.itemsize == 1 and slope == 1:
        raise ValueError(
            f"{named(path)} holds {voxels.dtype}, wanted Hounsfield units, which 8 bits cannot "
            "hold: convert it again from DICOM"
        )
    hu = sample(voxels) * slope + inter
    for what, (low, high, least, most) in HU_SHARES.items():
        share = np.count_nonzero((hu > low) & (hu <= high)) / hu.size
        if not least <= share <= most:
            lowest, highest = sorted(end * slope + inter for end in (voxels.min(), voxels.max()))
            raise ValueError(
                f"{named(path)} holds values from {lowest:g} to {highest:g}, wanted Hounsfield "
                f"units, of which {least:.0%} to {most:.0%} are {what} ({low} to {high}) and not "
                f"{100 * share:.2g}%: convert it with the DICOM's rescale slope and intercept"
            )
    return image


def read_liver(path: Path, label: str = "", scan: Path | None = None) -> Liver:
    """Return the liver on the file's own grid, or along the axes of a scan of the same voxels.

    label : which one is the liver, a number or "all"; "" is for masks of 0 and one other value and
        for LiTS's, where 2 is tumour and liver too
    Raises ValueError if the values are not labels, or are of several organs and `label` is "".
    """
    mask = read_voxels(path, 0)
    labels = find_labels(path, mask)
    wanted = liver_range(labels, label)
    if wanted is None:
        sizes = ", ".join(f"{label}: {ml:.1f} ml" for label, ml in label_sizes(path, mask)[:SHOWN])
        raise ValueError(
            f"{named(path)} holds {len(labels) - 1} labels ({sizes}), wanted 0 and the liver, or "
            "LiTS's 0, 1 and 2: run `python data.py --label N` with the liver's, or `--label all` "
            "if all are (the liver in eight segments)"
        )
    low, high = sorted((end - mask.inter) / mask.slope for end in wanted)  # as stored
    liver = mask.voxels > low
    if high < np.inf:
        liver &= mask.voxels < high
    turn = turn_onto(open_volume(path), open_volume(scan)) if scan else None
    return Liver(liver if turn is None else apply_orientation(liver, turn), labels, mask.gaps)


def read_mask(path: Path, label: str = "", scan: Path | None = None) -> np.ndarray:
    """Return the liver as `read_liver` does, (x, y, z) bool."""
    return read_liver(path, label, scan).voxels


def find_labels(path: Path, mask: Volume) -> list[float]:
    """Return the labels of a mask: whole numbers from 0 on, or any two values that are all it has.

    Raises ValueError for what is no mask.
    """
    values: set[float] = set()
    for plane in np.moveaxis(mask.voxels, 2, 0):  # (x, y)
        flat = plane.ravel(order="K")
        changes = np.flatnonzero(flat[1:] != flat[:-1])  # labels are few runs of equal values
        found = np.unique(np.append(flat[changes], flat[-1])) * mask.slope + mask.inter
        values.update(found.tolist())
        if len(values) > 2:
            values = set(np.round([*values], 3).tolist())  # less numerical dust
        if len(values) > MAX_LABELS:
            break
    whole_numbers = np.rint([*values]) + 0  # no -0 but 0
    bent = np.abs(whole_numbers - [*values]).max()
    if len(values) > 2 and (len(values) > MAX_LABELS or bent > MAX_BENT or min(whole_numbers) < 0):
        raise ValueError(
            f"{named(path)} is no label mask, it holds values like "
            f"{', '.join(f'{value:g}' for value in sorted(values)[:5])}; wanted 0 for background "
            "and 1 for liver: export it as a binary label map"
        )
    return sorted(values if len(values) <= 2 else set(whole_numbers.tolist()))


def liver_range(labels: list[float], label: str) -> tuple[float, float] | None:
    """Return between which values a mask is liver; None if they are of several organs."""
    if label not in ("", "all"):
        return int(label) - 0.5, int(label) + 0.5
    if label == "all" or labels == LITS or len(labels) < 2:
        return 0.5, np.inf
    if len(labels) == 2:  # 0 is background, or else the lower one is
        middle = sum(labels) / 2
        return (-np.inf, middle) if labels[1] == 0 else (middle, np.inf)
    return None


def label_sizes(path: Path, mask: Volume) -> list[tuple[int, float]]:
    """Return the labels above 0 of a mask with their volumes in ml, the largest first."""
    counts: Counter[int] = Counter()
    for plane in np.moveaxis(mask.voxels, 2, 0):
        found, voxels = np.unique(np.rint(plane * mask.slope + mask.inter), return_counts=True)
        counts.update(dict(zip(found.astype(int).tolist(), voxels.tolist(), strict=True)))
    voxel_ml = nib.affines.voxel_sizes(open_volume(path).affine).prod() / 1000
    return [(label, count * voxel_ml) for label, count in counts.most_common() if label]


def box_around(stack: np.ndarray, margins: Iterable[float] = (0, 0, 0)) -> tuple[slice, ...]:
    """Return the box around a mask as slices, of the whole volume if the mask is empty.

    stack : a 3-D mask, bool or uint8, 0 or 1; margins : (3,) voxels to add on either side
    """
    from scipy import ndimage  # here, because importing it takes as long as slicing a volume

    full = tuple(slice(0, n) for n in stack.shape)
    box = next(iter(ndimage.find_objects(stack.view(np.uint8))), full)
    return tuple(
        slice(max(0, axis.start - int(n)), axis.stop + int(n))
        for axis, n in zip(box, margins, strict=True)
    )


def surface_distances(
    one: np.ndarray, other: np.ndarray, spacing_mm: np.ndarray
) -> list[np.ndarray]:
    """Return the distances in mm of the surface voxels of one mask from the other's, and back.

    Two 1-D float arrays. A voxel lies on the surface if one of the 18 voxels that share a face or
    an edge with it is outside the mask; beyond the volume is outside. If one mask is empty its
    distance is inf, if both are it is 0.
    """
    from scipy import ndimage  # here, because importing it takes as long as slicing a volume

    if not (one.any() and other.any()):
        return [np.array([np.inf if one.any() or other.any() else 0.0])] * 2
    box, neighbours = box_around(one | other), ndimage.generate_binary_structure(3, 2)
    surfaces = [mask[box] & ~ndimage.binary_erosion(mask[box], neighbours) for mask in (one, other)]
    to_one, to_other = (
        ndimage.distance_transform_edt(~surface, spacing_mm) for surface in surfaces
    )
    return [to_other[surfaces[0]], to_one[surfaces[1]]]


def score_volume(
    predicted: np.ndarray, reference: np.ndarray, spacing_mm: np.ndarray
) -> dict[str, float]:
    """Return the scores of a mask against the reference, by name.

    predicted, reference : (slices, rows, columns) bool; spacing_mm : (3,) float, in the same order

    dice : 0..1. assd_mm : average symmetric surface distance, the mean over the surface voxels of
    both masks. hd95_mm : 95 % Hausdorff distance, the larger of the 95th percentiles from either
    side. Two empty masks agree: Dice 1, distances 0. If one alone is empty the distances are inf.
    """
    sizes = [np.count_nonzero(mask) for mask in (predicted, reference)]
    overlap = np.count_nonzero(predicted & reference)
    distances_mm = surface_distances(predicted, reference, spacing_mm)
    return {
        "dice": 2 * overlap / sum(sizes) if any(sizes) else 1.0,
        "assd_mm": np.concatenate(distances_mm).mean(),
        "hd95_mm": max(np.percentile(mm, 95, method="higher") for mm in distances_mm),
    }


def free_memory() -> int:
    """Return how many bytes are free to use, also in a container that has a limit of its own."""
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # there is no such file, or it says "max"
        limit = int((CGROUP / "memory.max").read_text())
        used = re.search(r"^anon (\d+)", (CGROUP / "memory.stat").read_text(), re.MULTILINE)
        free = min(free, limit - int(used[1]))
    return free


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
