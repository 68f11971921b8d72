"""Fill raw/train and raw/test with synthetic CT scans of the upper abdomen.

Writes phantom_01_orig.nii.gz (int16, HU) and phantom_01_liver.nii.gz (uint8, 0 or 1) and so on,
numbered on from train to test, so that `python data.py` and train.ipynb run without any download.
All is drawn by formula and by chance, nothing is taken from a patient's scan, so that a network may
learn from it and be passed on. Patients, diseases and scanners differ by more than they do in life.
Files that this script did not make are never touched.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count, pairwise, product, repeat
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter, label
from scipy.spatial.transform import Rotation
from tqdm import tqdm
from volumes import ROOT, as_nifti, named, open_volume, whole

MARK = b"synthetic liver phantom"  # NIfTI header field `descrip`: how a rerun knows its own files
OWN_NAME = re.compile(r"phantom_\d{2,}_(orig|liver)\.nii\.gz")

# One entry per patient, taken in turn, so that every default set holds some of each.
PHASES = ("portal venous", "delayed", "portal venous", "late arterial")
PHASES += ("portal venous", "unenhanced", "portal venous", "delayed")
LESIONS = ("tumour", "none", "cyst", "tumour", "none", "cyst", "tumour", "cyst")
STORED_AXES = ("LAS", "LAS", "LAS", "LPS", "LAS", "PSR", "LAS", "RAS")  # nibabel's axis codes
OBLIQUE_AXES = "PSR"  # patients stored like this also lie tilted in the scanner
TILT_DEGREES = (4.0, -3.0, 6.0)

# Mean HU. Unenhanced blood, liver, spleen, kidney, lung and fat lie in the ranges of
# http://radclass.mudr.org/content/hounsfield-units-scale-hu-ct-numbers (after Prokop 2003). That
# liver, spleen and muscle overlap with contrast too: Kreul 2021, In Vivo 35(6):3277-3287,
# https://www.zora.uzh.ch/id/eprint/210920/. The other values are typical ones, rounded. Lesions,
# bright spots and the content of gut and stomach get theirs in `draw_hu`.
PHASE_COLUMN = {"unenhanced": 0, "late arterial": 1, "portal venous": 2, "delayed": 3}
TISSUE_HU = {
    "air": (-1000, -1000, -1000, -1000),
    "table shell": (40, 40, 40, 40),
    "table foam": (-930, -930, -930, -930),
    "skin": (10, 10, 15, 15),
    "fat": (-100, -100, -100, -100),
    "muscle": (52, 62, 70, 70),
    "lung": (-860, -855, -850, -850),
    "lung vessel": (-250, -150, -150, -200),
    "spongy bone": (190, 195, 200, 200),
    "cortical bone": (520, 520, 520, 520),
    "cartilage": (95, 95, 100, 100),
    "spinal canal": (25, 27, 30, 30),
    "heart muscle": (45, 95, 108, 92),
    "heart blood": (46, 210, 145, 112),
    "aorta": (46, 270, 150, 114),
    "vena cava": (46, 85, 138, 112),
    "portal trunk": (46, 130, 162, 118),
    "portal branch": (46, 130, 162, 118),
    "hepatic vein": (46, 78, 155, 116),
    "liver": (58, 74, 102, 92),
    **{f"lesion {n}": (40, 52, 66, 70) for n in range(1, 7)},
    "bright spot": (400, 400, 400, 400),
    "gallbladder": (12, 12, 12, 12),
    "spleen": (48, 108, 114, 94),
    "kidney cortex": (34, 160, 172, 140),
    "kidney medulla": (33, 72, 138, 130),
    "pancreas": (42, 98, 92, 80),
    "gut wall": (42, 80, 92, 82),
    **dict.fromkeys(("gut content", "stomach content", "stool"), (30, 30, 30, 30)),
    "fluid": (12, 12, 12, 12),
    "collapsed lung": (40, 70, 80, 75),
    "gas": (-940, -940, -940, -940),
}
LABEL = {tissue: number for number, tissue in enumerate(TISSUE_HU)}
LESION_TISSUES = [f"lesion {n}" for n in range(1, 7)]
LIVER_TISSUES = ["liver", "portal branch", "hepatic vein", "bright spot", *LESION_TISSUES]
IN_LIVER = np.isin(list(LABEL), LIVER_TISSUES)

# Anatomy in reference millimetres: x to the patient's left, y to the front, z up from the top of
# the right diaphragm. Centre, radii, tilt in degrees about x, y and z, and by what factors the size
# differs from patient to patient.
ORGANS = {
    "heart fat": ((22, 32, 24), (72, 54, 62), (0, 0, 25), (0.85, 1.18)),
    "heart muscle": ((26, 30, 30), (58, 44, 54), (0, 0, 25), (0.85, 1.18)),
    "heart blood": ((32, 30, 32), (42, 32, 41), (0, 0, 25), (0.85, 1.18)),
    "spleen": ((97, -40, -72), (27, 46, 46), (20, 0, -20), (0.7, 1.6)),
    "gallbladder": ((-46, 40, -112), (14, 19, 26), (25, 0, 0), (0.5, 1.5)),
    "right kidney": ((-58, -46, -132), (27, 25, 52), (-8, -10, 0), (0.85, 1.18)),
    "left kidney": ((60, -46, -120), (27, 25, 54), (-8, 10, 0), (0.85, 1.18)),
    "stomach fundus": ((66, -12, -62), (38, 42, 42), (0, 0, 0), (0.5, 1.2)),
    "stomach body": ((50, 28, -92), (34, 28, 44), (25, 0, 0), (0.6, 1.3)),
    "stomach antrum": ((8, 44, -112), (46, 20, 20), (0, -15, 0), (0.6, 1.3)),
    "right lobe": ((-72, 0, -72), (76, 92, 92), (0, 0, 0), (0.85, 1.18)),
    "right tip": ((-98, -2, -122), (26, 46, 46), (0, 0, 0), (0.7, 1.4)),
    "left lobe": ((6, 44, -54), (84, 38, 42), (-10, 14, -6), (0.6, 1.5)),
    "left dome": ((20, 18, -35), (60, 50, 29), (0, 10, 0), (0.3, 1.4)),
    "caudate lobe": ((-14, 8, -62), (24, 20, 26), (0, 0, 0), (0.6, 1.8)),
    "fissure of the round ligament": ((0, 46, -98), (1.8, 28, 28), (0, 0, -12), (0.3, 1.6)),
    "fissure of the venous ligament": ((-2, 24, -68), (1.5, 24, 28), (0, 0, 65), (0.3, 1.4)),
    "hilum": ((-26, 4, -92), (30, 8, 9), (0, -12, -8), (0.4, 1.4)),
}
LOBES = ("right lobe", "right tip", "left lobe", "left dome", "caudate lobe")
FISSURES = ("fissure of the round ligament", "fissure of the venous ligament", "hilum")
LIVER_MIDDLE = np.array((-50, 5, -70))
MAY_BE_MISSING = {"spleen": 0.05, "gallbladder": 0.15, "right kidney": 0.06, "left kidney": 0.06}
MAY_BE_MISSING |= dict.fromkeys(FISSURES, 0.4)
SOLID_ORGANS = {  # organ: tissue, in the order of painting
    "heart fat": "fat",
    "heart muscle": "heart muscle",
    "heart blood": "heart blood",
    "spleen": "spleen",
    "gallbladder": "gallbladder",
    "right kidney": "kidney cortex",
    "left kidney": "kidney cortex",
}
TUBES = {  # radius, start and end of each piece
    "pancreas": [
        (12, (-22, 14, -118), (20, 8, -108)),
        (12, (20, 8, -108), (76, -22, -92)),
    ],
    "aorta": [(10.5, (14, -26, 60), (10, -22, -260))],
    "portal trunk": [(6.5, (-4, 2, -108), (-34, 6, -82))],
    "vena cava": [(12, (-24, -10, 20), (-23, -18, -260))],
}
LIVER_TUBES = {  # radius, then the points it runs through
    "portal branch": [
        (6, (-4, 2, -108), (-34, 6, -82), (-62, -4, -80)),
        (4, (-62, -4, -80), (-100, -30, -62), (-116, -36, -46)),
        (3, (-100, -30, -62), (-112, -36, -100)),
        (4, (-62, -4, -80), (-98, 28, -88), (-114, 22, -120)),
        (4, (-34, 6, -82), (-8, 44, -62), (38, 52, -48)),
    ],
    "hepatic vein": [
        (4, (-28, -12, -26), (-78, -22, -40), (-110, -8, -72)),
        (3.5, (-28, -10, -26), (-62, 34, -44), (-80, 52, -70)),
        (3, (-26, -8, -26), (4, 38, -38), (36, 56, -52)),
    ],
}


class Canvas:
    """A label volume that knows for each voxel its place in the reference anatomy.

    points : (3, x, y, z) float32, reference mm: the patient lies turned and is bent by two warps
    labels : (x, y, z) uint8, values of LABEL
    depth : (x, y, z) float32, mm to the inner face of the muscle wall, negative inside
    above : (x, y, z) float32, mm over the diaphragm
    organs : ORGANS, each moved, turned and resized
    """

    def __init__(self, axes_mm: list[np.ndarray], rng: np.random.Generator) -> None:
        self.axes, self.rng = axes_mm, rng
        angles = np.clip(rng.normal(0, (3, 3, 7)), -20, 20)
        self.turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix().astype(np.float32)
        grid = np.meshgrid(*axes_mm, indexing="ij", sparse=True)
        warps = (130, rng.uniform(2, 5)), (60, rng.uniform(0.3, 1.6))
        turned = (sum(t * g for t, g in zip(row, grid, strict=True)) for row in self.turn.T)
        self.points = np.stack(
            [x + sum(smooth_noise(axes_mm, *warp, rng) for warp in warps) for x in turned]
        )
        self.labels = np.zeros(self.points.shape[1:], np.uint8)
        self.wall_mm = np.float32(rng.uniform(5, 14))
        self.fat_mm, front = np.float32(rng.uniform(1.5, 6.5) ** 2), rng.uniform(-0.004, 0.006)
        self.fat = self.fat_mm * (1 + np.float32(front) * self.points[1]).clip(0.3, 2)
        self.trunk = rng.uniform((132, 85, 2.0), (162, 114, 2.8))
        self.domes = rng.uniform((-14, -16, -12, 0.88), (10, 14, 22, 1.15))
        self.depth = trunk_distance(self.points, *self.trunk) + self.wall_mm
        self.above = self.points[2] - diaphragm_height(self.points, *self.domes)
        self.organs = vary_organs(rng)

    def look(self, low, high) -> tuple[tuple[slice, ...], np.ndarray]:
        """Return the box between two corners, with room for the warp, and its points."""
        corners = self.turn @ np.array(list(product(*zip(low, high, strict=True)))).T
        low, high = corners.min(axis=1) - 20, corners.max(axis=1) + 20
        box = tuple(slice(*np.searchsorted(self.axes[i], (low[i], high[i]))) for i in range(3))
        return box, self.points[(slice(None), *box)]

    def look_at(self, centre, radii) -> tuple[tuple, np.ndarray]:
        """Return the box around an ellipsoid and its points."""
        return self.look(np.subtract(centre, max(radii)), np.add(centre, max(radii)))

    def paint(self, tissue: str, inside: np.ndarray, box: tuple = (...,)) -> None:
        """Label the voxels of the box where `inside` is true."""
        self.labels[box][inside] = LABEL[tissue]

    def paint_tubes(self, tissue: str, pieces: list, within: str | None = None) -> None:
        """Paint straight vessels, only over the tissue `within` if one is named."""
        for radius, start, end in pieces:
            box, points = self.look(*np.sort([start, end], axis=0))
            inside = tube(points, start, end) < radius
            if within:
                inside &= self.labels[box] == LABEL[within]
            self.paint(tissue, inside, box)


def vary_organs(rng: np.random.Generator) -> dict[str, tuple]:
    """Return ORGANS of one patient: moved, resized and turned; some are missing."""
    organs, liver, heart = {}, rng.uniform(0.88, 1.25), rng.uniform(0.85, 1.2)
    missing = [name for name, share in MAY_BE_MISSING.items() if rng.uniform() < share]
    moves = {"heart": rng.uniform(-8, 8, 3), "liver": rng.uniform(-6, 6, 3)}
    for name, (centre, radii, tilt, sizes) in ORGANS.items():
        size = rng.uniform(*sizes) * rng.uniform(0.92, 1.08, 3)
        move = rng.uniform(-7, 7, 3) * (2 if "stomach" in name else 1)
        if name in LOBES or name in FISSURES:
            centre = LIVER_MIDDLE + liver * (np.array(centre) - LIVER_MIDDLE)
            size, move = size * liver, 0.6 * move + moves["liver"]
        if "heart" in name:
            size, move = heart * rng.uniform(0.96, 1.04, 3), moves["heart"]
        if name == "right tip":  # it may reach far down: Riedel's lobe
            longer = rng.uniform(0, 50) * (rng.uniform() < 0.3)
            size, move = size * (1, 1, 1 + longer / 60), move - (0, 0, longer / 2)
        tilt = tilt + rng.uniform(-10, 10, 3)
        organs[name] = (centre + move, radii * size * (0.02 if name in missing else 1), tilt)
    if rng.uniform() < 0.08:
        for name in ("left lobe", "left dome"):
            organs[name] = (organs[name][0], organs[name][1] * 0.3, (0, 0, 0))
    return organs


def grow(rng: np.random.Generator, start, way, radius: float) -> Iterator[tuple]:
    """Yield the pieces (radius, start, end) of a vessel that branches and tapers."""
    if radius > 1.1:
        end = start + way * rng.uniform(12, 28)
        yield radius, start, end
        for share in (0.85, rng.uniform(0.5, 0.75)):
            bend = way + rng.normal(0, 0.4, 3)
            yield from grow(rng, end, bend / np.linalg.norm(bend), radius * share)


def smooth_noise(axes_mm: list, wavelength_mm: float, amplitude: float, rng) -> np.ndarray:
    """Return a random field as a sum of standing waves, (x, y, z) float32.

    axes_mm : three arrays, (x,), (y,) and (z,); amplitude : the field's standard deviation
    wavelength_mm : of the shortest wave
    """
    waves = []
    for axis in axes_mm:
        turns, start = rng.uniform(0.2, 1, (12, 1)), rng.uniform(0, 1, (12, 1))
        waves.append(np.cos(2 * np.pi * (turns * axis / wavelength_mm + start)))
    plane = waves[0][:, :, None] * waves[1][:, None, :]
    field = np.tensordot(plane.astype(np.float32), waves[2].astype(np.float32), (0, 0))
    return field * np.float32(amplitude * np.sqrt(8 / 12))  # three cosines multiplied vary by 1/8


def ellipsoid(points: np.ndarray, centre, radii, tilt=(0, 0, 0)) -> np.ndarray:
    """Return roughly the distance in mm to an ellipsoid, negative inside."""
    turn = Rotation.from_euler("xyz", tilt, degrees=True).as_matrix().T
    turn = (turn / np.reshape(radii, (3, 1))).astype(np.float32)
    scaled = np.tensordot(turn, points, 1)
    scaled -= (turn @ np.float32(centre))[:, None, None, None]
    return (np.sqrt(np.einsum("i...,i...->...", scaled, scaled)) - 1) * np.float32(min(radii))


def tube(points: np.ndarray, start, end) -> np.ndarray:
    """Return the distance in mm to the line from start to end."""
    along = np.float32(end) - np.float32(start)
    offset = points - np.float32(start)[:, None, None, None]
    share = np.clip(np.tensordot(along / (along @ along), offset, 1), 0, 1)
    offset -= along[:, None, None, None] * share
    return np.sqrt(np.einsum("i...,i...->...", offset, offset))


def join(a: np.ndarray, b: np.ndarray, blend_mm: float) -> np.ndarray:
    """Unite two shapes, each a distance that is negative inside, with a rounded seam."""
    share = np.maximum(blend_mm - np.abs(a - b), 0) / blend_mm
    return np.minimum(a, b) - share**2 * (blend_mm / 4)


def cut(a: np.ndarray, b: np.ndarray, blend_mm: float) -> np.ndarray:
    """Keep what lies inside both shapes, with a rounded edge."""
    return -join(-a, -b, blend_mm)


def diaphragm_height(points, right_mm=0, left_mm=0, middle_mm=0, width=1) -> np.ndarray:
    """Return the z in mm of the diaphragm over each point: two domes and the heart's bed."""
    x, y = points[0] / np.float32(width), points[1]
    right = right_mm - 80 * (((x + 62) / 74) ** 2 + ((y - 4) / 86) ** 2)
    left = left_mm - 14 - 80 * (((x - 70) / 68) ** 2 + ((y - 2) / 86) ** 2)
    middle = middle_mm - 26 - 60 * (((x - 8) / 70) ** 2 + ((y - 20) / 70) ** 2)
    return cut(cut(right, left, 12), middle, 12).astype(np.float32)


def trunk_distance(points, half_width=147, half_depth=97, power=2.3) -> np.ndarray:
    """Return the distance in mm to the outer face of the muscle wall, negative inside."""
    x, y = np.abs(points[0]), np.abs(points[1])
    power = np.float32(power)
    ratio = ((x / half_width) ** power + (y / half_depth) ** power) ** (1 / power) + 1e-3
    return (np.hypot(x, y) * (1 - 1 / ratio)).astype(np.float32)


def paint_trunk(canvas: Canvas) -> None:
    """Paint the table, skin, fat, muscle wall, diaphragm and lungs."""
    x, y = canvas.axes[0][:, None, None], canvas.axes[1][None, :, None]
    back = 14 + canvas.trunk[1] + canvas.fat_mm
    table = np.abs(y + back - (x / 150) ** 2 * 18) + 0 * canvas.depth
    canvas.paint("table shell", (table < 11) & (np.abs(x) < 200))
    canvas.paint("table foam", (table < 6) & (np.abs(x) < 197))
    canvas.paint("skin", canvas.depth < canvas.wall_mm + canvas.fat)
    canvas.paint("fat", canvas.depth < canvas.wall_mm + canvas.fat - 2.5)
    canvas.paint("muscle", canvas.depth < canvas.wall_mm)
    inside = canvas.depth < 0
    canvas.paint("fat", inside)
    canvas.paint("muscle", inside & (np.abs(canvas.above) < 2))
    x, y, _ = canvas.points
    lung = inside & (canvas.above > 2) & (np.hypot(x - 6, y + 34) > 30)
    canvas.paint("lung", lung)
    for side in (x < 6, x > 6):
        if canvas.rng.uniform() < 0.14:  # fluid behind the lung presses on it
            level = canvas.rng.uniform(-85, -10)
            canvas.paint("collapsed lung", lung & side & (y < level + canvas.rng.uniform(2, 25)))
            canvas.paint("fluid", lung & side & (y < level))


def paint_arms(canvas: Canvas) -> None:
    """Paint both arms beside the body of one patient in eight, who cannot lift them."""
    x, y = canvas.axes[0][:, None, None], canvas.axes[1][None, :, None]
    for side in (-1, 1) if canvas.rng.uniform() < 0.12 else ():
        middle = side * (canvas.trunk[0] + canvas.fat_mm + canvas.rng.uniform(40, 60))
        arm = np.hypot(x - middle, y + canvas.rng.uniform(-10, 40)) + 0 * canvas.depth
        for tissue, radius in {"skin": 42, "fat": 40, "muscle": 34, "cortical bone": 11}.items():
            canvas.paint(tissue, arm < radius)
        canvas.paint("spongy bone", arm < 7)


def paint_ribs(canvas: Canvas) -> None:
    """Paint the ribs: they run down to the front, so a slice cuts each into a spot."""
    x, y, z = canvas.points
    turn = (z + 0.55 * y + 0.12 * np.abs(x)) % 34 - 17  # 34 mm apart
    rib = np.hypot(turn / 8.5, (canvas.depth - canvas.wall_mm + 6.5) / 4.2)
    rib[(np.abs(x) < 14) | (z < -150 + 0.5 * np.abs(y + 60))] = 9
    canvas.paint("cortical bone", rib < 1)
    canvas.paint("spongy bone", rib < 0.62)
    canvas.paint("cartilage", (rib < 1) & (y > 40))


def paint_spine(canvas: Canvas) -> None:
    """Paint the muscles of the back and the vertebrae, one every 34 mm."""
    box, (x, y, z) = canvas.look((-60, -112, -400), (60, -25, 400))
    for side in (-1, 1):
        canvas.paint("muscle", np.hypot((x - side * 33) / 27, (y + 78) / 17) < 1, box)
        psoas = np.hypot((x - side * 36) / np.clip(-5 - 0.1 * z, 1, 16), (y + 52) / 14)
        canvas.paint("muscle", (psoas < 1) & (z < -90), box)
    body, level = np.hypot(x / 23, (y + 50) / 17), z % 34
    arch = np.hypot(x, y + 74) < 14
    spinous = (np.abs(x) < 4) & (np.abs(y + 94) < 12) & (level < 22)
    transverse = (np.abs(x) < 36) & (np.abs(y + 76) < 5) & (np.abs(level - 20) < 6)
    canvas.paint("cortical bone", (body < 1) | arch | spinous | transverse, box)
    canvas.paint("spongy bone", (body < 0.88) & (np.abs(level - 19) < 13), box)
    canvas.paint("cartilage", (body < 0.95) & (level < 4), box)  # the discs
    canvas.paint("spinal canal", np.hypot(x, y + 75) < 8.5, box)


def paint_bowel(canvas: Canvas) -> None:
    """Paint the small bowel and the colon; gas rises to the front."""
    rng = canvas.rng
    loops = [
        (rng.uniform((-74, -6, -260), (84, 64, -128)), rng.uniform(11, 17))
        for _ in range(rng.integers(35, 110))
    ]
    loops += [((x, 58, -128 - 0.0016 * x * x), 17) for x in range(-95, 96, 19)]  # transverse colon
    loops += [((-104, -4, z), 21) for z in range(-260, -165, 16)]  # ascending colon
    loops += [((108, -14, z), 15) for z in range(-260, -110, 12)]  # descending colon
    for centre, radius in loops:
        radii = radius * rng.uniform(0.85, 1.25, 3)
        box, points = canvas.look_at(centre, radii)
        level = centre[1] + radius * rng.uniform(-0.6, 1.4)
        tissue = rng.choice(["gut content", "stool"])
        shape = ellipsoid(points, centre, radii)
        paint_hollow(canvas, shape, 2.5, points[1] > level, box, tissue)


def paint_hollow(canvas: Canvas, shape, wall_mm: float, gas, box: tuple, content: str) -> None:
    """Paint a piece of gut: wall, content, and gas where `gas` is true."""
    canvas.paint("gut wall", shape < 0, box)
    canvas.paint(content, shape < -wall_mm, box)
    canvas.paint("gas", (shape < -wall_mm) & gas, box)


def stomach(canvas: Canvas, points: np.ndarray) -> np.ndarray:
    """Return roughly the distance in mm to the stomach, negative inside."""
    parts = (f"stomach {part}" for part in ("fundus", "body", "antrum"))
    fundus, body, antrum = (ellipsoid(points, *canvas.organs[part]) for part in parts)
    return join(join(fundus, body, 25), antrum, 18)


def paint_organs(canvas: Canvas) -> None:
    """Paint stomach, heart, spleen, gallbladder, kidneys, pancreas and the great vessels."""
    box, points = canvas.look((-60, -60, -150), (115, 85, 0))
    shape = cut(stomach(canvas, points), canvas.above[box] + 4, 4)
    gas = points[1] > canvas.rng.uniform(0, 80)
    shape = cut(shape, canvas.depth[box] + 2, 4)
    paint_hollow(canvas, shape, canvas.rng.uniform(2, 6), gas, box, "stomach content")
    for tissue, paths in TUBES.items():
        canvas.paint_tubes(tissue, paths)
    for name, tissue in SOLID_ORGANS.items():
        box, points = canvas.look_at(*canvas.organs[name][:2])
        limit = 2 - canvas.above[box] if "heart" in name else canvas.above[box] + 3.5
        room = np.maximum(canvas.depth[box] + 2, limit)
        shape = np.maximum(ellipsoid(points, *canvas.organs[name]), room)
        canvas.paint(tissue, shape < 0, box)
        if "kidney" in name:
            canvas.paint("kidney medulla", shape < -7, box)
            hilum = canvas.organs[name][0] * (0.74, 0.92, 1)  # faces the spine
            canvas.paint("fat", (shape < 1) & (ellipsoid(points, hilum, (15, 10, 24)) < 0), box)


def liver_shape(canvas: Canvas, box: tuple, points: np.ndarray) -> np.ndarray:
    """Return roughly the distance in mm to the liver, carved out by its neighbours."""
    (x, y, z), rng = points, canvas.rng
    right, tip, left, top, caudate = (ellipsoid(points, *canvas.organs[lobe]) for lobe in LOBES)
    lower = rng.uniform(-12, 12)
    visceral = 0.6 * (x + 14) - 0.3 * (y - 4) - 0.74 * (z + 92 + lower)  # faces kidney and colon
    right = join(cut(right, visceral, 16), tip, 20)
    axes_mm = [axis[part] for axis, part in zip(canvas.axes, box, strict=True)]
    bumps = smooth_noise(axes_mm, 60, rng.uniform(1, 4), rng)
    if rng.uniform() < 0.2:  # cirrhosis: the edge is nodular
        bumps += smooth_noise(axes_mm, 24, rng.uniform(0.8, 2.2), rng)
    liver = join(right, join(join(left, top, 20), caudate, 12), 14) + bumps
    if rng.uniform() < 0.06:  # a lobe was resected
        liver = cut(liver, rng.uniform(-80, -30) - x, 8)
    gap = np.maximum(rng.uniform(-1.5, 3) + smooth_noise(axes_mm, 45, 1.6, rng), 0)  # 0: they touch
    liver = cut(liver, canvas.above[box] + 2, 4)
    neighbours = [canvas.depth[box], -stomach(canvas, points)]
    vessels = TUBES["vena cava"] + TUBES["aorta"]
    neighbours += [radius - tube(points, start, end) for radius, start, end in vessels]
    for name in ("right kidney", "gallbladder", "spleen"):
        neighbours.append(-ellipsoid(points, *canvas.organs[name]))
    neighbours += [38 - np.hypot(x, y + 62), 22 - np.hypot(x + 6, y + 34)]  # spine and crura
    for neighbour in neighbours:
        liver = cut(liver, neighbour + gap, 4)
    for fissure in FISSURES:
        liver = np.maximum(liver, -ellipsoid(points, *canvas.organs[fissure]))
    return liver


def paint_vessels(canvas: Canvas) -> None:
    """Paint the vessels of the liver, which branch and taper."""
    rng = canvas.rng
    for tissue, paths in LIVER_TUBES.items():
        wide, pieces = rng.uniform(0.6, 1.3), []
        for radius, *points in paths:
            points = [points[0], *(np.add(point, rng.uniform(-7, 7, 3)) for point in points[1:])]
            pieces += [(wide * radius, *piece) for piece in pairwise(points)]
            way = np.subtract(points[-1], points[-2])
            way = way / np.linalg.norm(way)
            pieces += grow(rng, points[-1], way, 0.8 * wide * radius)
        canvas.paint_tubes(tissue, pieces, within="liver")


def paint_lesions(canvas: Canvas, shape: np.ndarray) -> None:
    """Paint one to ten lesions: some with a rim, a dead core, or bright spots in them.

    shape : (x, y, z) float32, mm to the liver, negative inside
    """
    rng = canvas.rng
    bumps, spots = (smooth_noise(canvas.axes, mm, 1, rng) for mm in (18, 12))
    for radius in np.exp(rng.uniform(np.log(3), np.log(42), int(rng.uniform(1, 3.4) ** 2))):
        rooms = np.argwhere(shape < -rng.uniform(0, 0.8) * radius)
        if not len(rooms):
            continue
        centre = canvas.points[(slice(None), *rooms[rng.integers(len(rooms))])]
        radii = radius * rng.uniform(0.7, 1.3, 3)
        box, points = canvas.look_at(centre, 1.2 * radii)
        lesion = ellipsoid(points, centre, radii, rng.uniform(-60, 60, 3))
        lesion += bumps[box] * min(0.2 * radius, 4)
        room = IN_LIVER[canvas.labels[box]]
        if rng.uniform() < 0.25:  # it grows out of the liver
            room |= (canvas.labels[box] == LABEL["fat"]) & (shape[box] < 0.4 * radius)
        inside, kind = (lesion < 0) & room, rng.uniform()
        first, second = rng.choice(LESION_TISSUES, 2, replace=False)
        canvas.paint(first, inside, box)
        if kind < 0.35:  # a rim around it, or a core in it
            canvas.paint(second, inside & (lesion < -rng.uniform(0.15, 0.6) * radius), box)
        elif kind < 0.43:  # calcifications, lipiodol or clips
            canvas.paint("bright spot", inside & (spots[box] > rng.uniform(0.5, 1.8)), box)


def paint_liver(canvas: Canvas, lesion: str) -> None:
    """Paint the liver, its vessels, and its lesions if the patient has any."""
    box, points = canvas.look((-150, -95, -230), (125, 95, 15))
    shape, labels = liver_shape(canvas, box, points), canvas.labels[box]
    solid = np.isin(labels, [LABEL["cortical bone"], LABEL["muscle"]])
    if canvas.rng.uniform() < 0.15:  # ascites
        canvas.paint("fluid", (labels == LABEL["fat"]) & (shape < canvas.rng.uniform(3, 18)), box)
    pieces, _ = label((shape < 0) & ~solid)
    canvas.paint("liver", pieces == np.bincount(pieces[pieces > 0]).argmax(), box)
    paint_vessels(canvas)
    if lesion != "none":
        everywhere = np.full(canvas.labels.shape, np.inf, np.float32)
        everywhere[box] = shape
        paint_lesions(canvas, everywhere)


def draw_labels(axes_mm: list[np.ndarray], lesion: str, rng) -> np.ndarray:
    """Return the tissues of one patient, (x, y, z) uint8, values of LABEL."""
    canvas = Canvas(axes_mm, rng)
    for paint in (paint_trunk, paint_arms, paint_ribs, paint_spine, paint_bowel, paint_organs):
        paint(canvas)
    paint_liver(canvas, lesion)
    return canvas.labels


FIXED = ("air", "table shell", "table foam", "lung", "gas", "cortical bone", "bright spot")
# greatest standard deviation in HU, fine and coarse; 8 and 8 if not named
TEXTURES = {"fat": (16, 16), "muscle": (14, 16), "lung": (60, 40), "fluid": (4, 4)}
TEXTURES |= {"cortical bone": (120, 60), "spongy bone": (60, 60), "stool": (90, 60)}
TEXTURES |= {"gut content": (25, 20), "stomach content": (25, 40)}


def draw_hu(phase: str, lesion: str, rng) -> np.ndarray:
    """Return the mean HU of each tissue of one patient, (tissues,) float32.

    Between two moments of the contrast agent, each soft tissue by 12 HU (one standard deviation)
    off. In every fourth patient the organs have any HU at all: there only shape and place tell.
    """
    table, share = np.array(list(TISSUE_HU.values()), np.float32), rng.uniform(0, 0.5)
    hu = (1 - share) * table[:, PHASE_COLUMN[phase]] + share * table[:, rng.integers(4)]
    soft = ~np.isin(list(LABEL), FIXED)
    hu[soft] += rng.normal(0, 12, soft.sum())
    if rng.uniform() < 0.25:
        organs = soft & (table[:, 0] > 0)
        hu[organs] = rng.uniform(-10, 220, organs.sum())
        hu[LABEL["liver"]] = rng.uniform(30, 180)
    elif rng.uniform() < 0.4:
        hu[LABEL["liver"]] -= rng.uniform(0, 45)  # fat in the liver darkens it
    liver = hu[LABEL["liver"]]
    hu[LABEL["muscle"]] += 0.4 * (liver - hu[LABEL["muscle"]])  # hard on purpose: they touch
    for tissue in LESION_TISSUES:
        cyst = lesion == "cyst" and rng.uniform() < 0.5
        hu[LABEL[tissue]] = rng.uniform(0, 20) if cyst else liver + rng.uniform(-80, 50)
    for tissue in ("gut content", "stomach content", "stool"):
        kind = rng.uniform()
        hu[LABEL[tissue]] = rng.uniform(-20, 80)
        if kind > 0.5:  # a full stomach looks like liver, or is bright
            hu[LABEL[tissue]] = liver + rng.uniform(-20, 20) if kind < 0.8 else rng.uniform(80, 600)
    hu[LABEL["bright spot"]] = np.exp(rng.uniform(np.log(180), np.log(2500)))
    return hu.astype(np.float32)


def grain(shape: tuple, sigmas, rng) -> np.ndarray:
    """Return blurred noise of standard deviation 1, (x, y, z) float32; sigmas in voxels."""
    noise = gaussian_filter(rng.standard_normal(shape, np.float32), sigmas)
    return noise / noise.std()


def scan(labels: np.ndarray, phase: str, lesion: str, rng) -> np.ndarray:
    """Turn labels into int16 HU: contrast phase, texture, blur, grainy noise and streaks."""
    tissue_hu = draw_hu(phase, lesion, rng)
    fine = grain(labels.shape, (1, 1, 0.5), rng)
    coarse = grain(labels.shape, (4, 4, 1.2), rng)
    textures = np.array([TEXTURES.get(tissue, (8, 8)) for tissue in LABEL], np.float32)
    textures *= rng.uniform(0, 1, textures.shape)
    image = tissue_hu[labels] + textures[:, 0][labels] * fine + textures[:, 1][labels] * coarse
    image[(labels == LABEL["lung"]) & (fine > 2.2)] = tissue_hu[LABEL["lung vessel"]]
    blur, along = rng.uniform(0.4, 1.1), rng.uniform(0.2, 0.6)
    image = gaussian_filter(image, (blur, blur, along))
    sharp = rng.uniform(0.4, 1.2)
    noise = grain(labels.shape, (sharp, sharp, 0.4), rng)
    image += noise * np.exp(rng.uniform(np.log(3), np.log(20)))
    if rng.uniform() < 0.3:
        image += grain(labels.shape, (9, 0.6, 0.3), rng) * rng.uniform(2, 10)
    return np.clip(np.rint(image), -1024, 2000).astype(np.int16)


def place_grid(matrix: int, rng) -> tuple[list[np.ndarray], tuple[float, float]]:
    """Choose a patient's size, position and slices.

    Returns the voxel centres in reference mm, three float32 arrays (x,), (y,) and (z,), and the
    spacing in mm: pixel, slice distance.
    """
    size = rng.uniform(0.88, 1.12)
    stretch = size * rng.uniform(0.93, 1.07, 3)
    pixel = round(np.clip(370 * size * rng.uniform(0.86, 1.15), 290, 490) / matrix, 4)
    distance = round(rng.uniform(3.8, 5.6), 3)
    bottom, top = rng.uniform((-250, 10), (-185, 60)) * stretch[2]
    offset = rng.uniform((-22, -24), (22, 8))  # nobody lies exactly in the middle
    across = (np.arange(matrix) - (matrix - 1) / 2) * pixel
    up = np.arange(bottom, top, distance)
    axes_mm = (across / stretch[0] + offset[0], across / stretch[1] + offset[1], up / stretch[2])
    return [axis.astype(np.float32) for axis in axes_mm], (pixel, distance)


def make_affine(shape: tuple, spacing_mm: tuple[float, float], oblique: bool) -> np.ndarray:
    """Return the affine (4, 4) in mm of a volume (x, y, z) to the patient's left, front and head.

    spacing_mm : pixel, slice distance; the world's origin is the middle of the volume
    """
    pixel, distance = spacing_mm
    affine = np.diag([-pixel, pixel, distance, 1])  # the world's x grows to the patient's right
    affine[:3, 3] = affine[:3, :3] @ (np.subtract(1, shape) / 2)
    if oblique:
        affine[:3] = Rotation.from_euler("xyz", TILT_DEGREES, degrees=True).as_matrix() @ affine[:3]
    return affine


def make_patient(number: int, matrix: int, seed: int) -> list[nib.Nifti1Image]:
    """Return a patient's CT (int16, HU) and liver mask (uint8, 0 or 1).

    The random stream hangs on seed and number alone: patient 3 stays the same person however many
    others there are.
    """
    rng = np.random.default_rng([seed, number])
    phase, lesion, axes = patient_kind(number)
    axes_mm, spacing_mm = place_grid(matrix, rng)
    labels = draw_labels(axes_mm, lesion, rng)
    affine = make_affine(labels.shape, spacing_mm, axes == OBLIQUE_AXES)
    volumes = scan(labels, phase, lesion, rng), IN_LIVER[labels].astype(np.uint8)
    images = [as_nifti(volume, affine, axes) for volume in volumes]
    for image in images:
        image.header["descrip"] = MARK
    return images


def patient_kind(number: int) -> tuple[str, str, str]:
    """Return contrast phase, lesion and stored axes of patient 1, 2, ..."""
    return tuple(kinds[(number - 1) % len(kinds)] for kinds in (PHASES, LESIONS, STORED_AXES))


def find_own(folders: list[Path]) -> list[Path]:
    """Return this script's files in the folders, as name and NIfTI header tell.

    Raises ValueError if there are other scans.
    """
    files = sorted(path for folder in folders for path in folder.glob("[!.]*"))
    scans = [path for path in files if path.name.lower().endswith((".nii", ".nii.gz"))]
    for path in scans:
        with suppress(ValueError):  # no NIfTI, or broken: somebody else's
            if OWN_NAME.fullmatch(path.name) and open_volume(path).header["descrip"] == MARK:
                continue
        raise ValueError(
            f"{named(path)} was not made by this script, which wants folders without other scans: "
            "move it away first, or keep it and run `python data.py`"
        )
    return scans


def write_patient(folder: Path, number: int, matrix: int, seed: int) -> dict[str, object]:
    """Draw and store one patient; return a line of the table."""
    images = make_patient(number, matrix, seed)
    name = f"phantom_{number:02d}"
    with whole(*(folder / f"{name}_{kind}.nii.gz" for kind in ("orig", "liver"))) as drafts:
        for image, draft in zip(images, drafts, strict=True):
            nib.save(image, draft)  # gzipped at level 1 and without a date
    phase, lesion, _ = patient_kind(number)
    return {"patient": name, "split": folder.name, "phase": phase, "lesion": lesion}


def parse_options() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=6, help="patients in raw/train (6)")
    parser.add_argument("--test", type=int, default=2, help="patients in raw/test (2)")
    parser.add_argument("--matrix", type=int, default=256, help="pixels per row and column (256)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other patients (0)")
    options = parser.parse_args()
    limits = {"train": (1, 999), "test": (0, 999), "matrix": (32, 1024), "seed": (0, 2**32)}
    for name, (low, high) in limits.items():
        value = getattr(options, name)
        if not low <= value <= high:
            parser.error(f"--{name} is {value}, but it must be from {low} to {high}")
    return options


def main() -> None:
    """Check the folders, remove our own older files, write the patients, print a table."""
    options = parse_options()
    train, test = ROOT / "raw" / "train", ROOT / "raw" / "test"
    older = find_own([train, test])
    for folder in (train, test):
        folder.mkdir(exist_ok=True)
    for path in older:  # before writing: nobody may stand in train and in test at once
        path.unlink()
    folders = [train] * options.train + [test] * options.test
    numbers, matrix, seed = count(1), repeat(options.matrix), repeat(options.seed)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as workers:
        rows = workers.map(write_patient, folders, numbers, matrix, seed)
        rows = list(tqdm(rows, "drawing", len(folders), unit="patient"))
    print(pd.DataFrame(rows).to_string(index=False), "next: python data.py", sep="\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped: run `python raw/phantom.py` again for a complete set")
