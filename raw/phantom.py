"""Fill raw/train and raw/test with synthetic CT scans of the upper abdomen.

Writes phantom_01_orig.nii.gz (int16, HU) and phantom_01_liver.nii.gz (uint8, 0 or 1) and so on,
numbered on from train to test, so that `python data.py` and train.ipynb run without any download.
The shapes are drawn by formula, not taken from a patient: good for learning the workflow, useless
for medicine. Files that this script did not make are never touched.
"""

import argparse
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise, repeat
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter, label
from scipy.spatial.transform import Rotation
from tqdm import tqdm
from volumes import ROOT, as_nifti, named, open_volume, sides, whole

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
# https://www.zora.uzh.ch/id/eprint/210920/. The other values are typical ones, rounded.
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
    "tumour": (40, 52, 66, 70),
    "cyst": (9, 9, 10, 10),
    "gallbladder": (12, 12, 12, 12),
    "spleen": (48, 108, 114, 94),
    "kidney cortex": (34, 160, 172, 140),
    "kidney medulla": (33, 72, 138, 130),
    "pancreas": (42, 98, 92, 80),
    "gut wall": (42, 80, 92, 82),
    "gut content": (30, 30, 30, 30),
    "gas": (-940, -940, -940, -940),
}
LABEL = {tissue: number for number, tissue in enumerate(TISSUE_HU)}
IN_LIVER = np.isin(list(LABEL), ["liver", "portal branch", "hepatic vein", "tumour", "cyst"])

# Anatomy in reference millimetres: x to the patient's left, y to the front, z up from the top of
# the right diaphragm. Centre, radii, tilt in degrees about x, y and z.
ORGANS = {
    "heart fat": ((22, 32, 24), (72, 54, 62), (0, 0, 25)),
    "heart muscle": ((26, 30, 30), (58, 44, 54), (0, 0, 25)),
    "heart blood": ((32, 30, 32), (42, 32, 41), (0, 0, 25)),
    "spleen": ((97, -40, -72), (27, 46, 46), (20, 0, -20)),
    "gallbladder": ((-46, 40, -112), (14, 19, 26), (25, 0, 0)),
    "right kidney": ((-58, -46, -132), (27, 25, 52), (-8, -10, 0)),
    "left kidney": ((60, -46, -120), (27, 25, 54), (-8, 10, 0)),
    "stomach fundus": ((62, -6, -58), (38, 42, 42), (0, 0, 0)),
    "stomach body": ((50, 28, -92), (34, 28, 44), (25, 0, 0)),
    "stomach antrum": ((8, 36, -118), (46, 20, 20), (0, -15, 0)),
    "right lobe": ((-72, 0, -72), (76, 92, 92), (0, 0, 0)),
    "right tip": ((-98, -2, -122), (26, 46, 46), (0, 0, 0)),
    "left lobe": ((6, 46, -58), (82, 34, 36), (-10, 14, -6)),
    "caudate lobe": ((-14, 8, -62), (24, 20, 26), (0, 0, 0)),
}
SOLID_ORGANS = {  # organ: tissue, in the order of painting
    "heart fat": "fat",
    "heart muscle": "heart muscle",
    "heart blood": "heart blood",
    "spleen": "spleen",
    "gallbladder": "gallbladder",
    "right kidney": "kidney cortex",
    "left kidney": "kidney cortex",
}
TUBES = {  # radius, then the points it runs through
    "pancreas": [(12, (-22, 14, -118), (20, 8, -108), (76, -22, -92))],
    "aorta": [(10.5, (14, -26, 60), (10, -22, -260))],
    "portal trunk": [(6.5, (-4, 2, -108), (-34, 6, -82))],
    "vena cava": [(12, (-24, -10, 20), (-23, -18, -260))],
}
LIVER_TUBES = {
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

    points : (3, x, y, z) float32, reference mm, bent by a smooth warp that differs by patient
    labels : (x, y, z) uint8, values of LABEL
    depth : (x, y, z) float32, mm to the inner face of the muscle wall, negative inside
    above : (x, y, z) float32, mm over the diaphragm
    organs : ORGANS, each a little moved and resized
    """

    def __init__(self, axes_mm: list[np.ndarray], rng: np.random.Generator) -> None:
        self.axes, self.rng = axes_mm, rng
        grid = np.meshgrid(*axes_mm, indexing="ij", sparse=True)
        self.points = np.stack([g + smooth_noise(axes_mm, 130, 3.5, rng) for g in grid])
        self.labels = np.zeros(self.points.shape[1:], np.uint8)
        self.wall_mm, self.fat_mm = rng.uniform((11, 9), (14, 24)).astype(np.float32)
        self.depth = trunk_distance(self.points) + self.wall_mm
        self.above = self.points[2] - diaphragm_height(self.points)
        self.organs = {
            name: (centre + rng.uniform(-5, 5, 3), radii * rng.uniform(0.92, 1.08, 3), tilt)
            for name, (centre, radii, tilt) in ORGANS.items()
        }

    def look(self, low, high) -> tuple[tuple[slice, ...], np.ndarray]:
        """Return the box between two corners, with room for the warp, and its points."""
        ends = [np.searchsorted(self.axes[i], (low[i] - 14, high[i] + 14)) for i in range(3)]
        box = tuple(slice(*end) for end in ends)
        return box, self.points[(slice(None), *box)]

    def look_at(self, centre, radii) -> tuple[tuple, np.ndarray]:
        """Return the box around an ellipsoid and its points."""
        return self.look(np.subtract(centre, max(radii)), np.add(centre, max(radii)))

    def paint(self, tissue: str, inside: np.ndarray, box: tuple = (...,)) -> None:
        """Label the voxels of the box where `inside` is true."""
        self.labels[box][inside] = LABEL[tissue]

    def paint_tubes(self, tubes: dict, within: str | None = None) -> None:
        """Paint straight vessels, only over the tissue `within` if one is named."""
        for tissue, paths in tubes.items():
            for radius, start, end in segments(paths):
                box, points = self.look(*np.sort([start, end], axis=0))
                inside = tube(points, start, end) < radius
                if within:
                    inside &= self.labels[box] == LABEL[within]
                self.paint(tissue, inside, box)


def segments(paths: list[tuple]) -> list[tuple]:
    """Cut paths into straight pieces (radius, start, end)."""
    return [(radius, *piece) for radius, *points in paths for piece in pairwise(points)]


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


def diaphragm_height(points: np.ndarray) -> np.ndarray:
    """Return the z in mm of the diaphragm over each point: two domes and the heart's bed."""
    x, y = points[0], points[1]
    right = -80 * (((x + 66) / 70) ** 2 + ((y - 4) / 86) ** 2)
    left = -14 - 80 * (((x - 70) / 68) ** 2 + ((y - 2) / 86) ** 2)
    middle = -26 - 60 * (((x - 8) / 70) ** 2 + ((y - 20) / 70) ** 2)
    return cut(cut(right, left, 12), middle, 12)


def trunk_distance(points: np.ndarray) -> np.ndarray:
    """Return the distance in mm to the outer face of the muscle wall, negative inside."""
    x, y = np.abs(points[0]), np.abs(points[1])
    ratio = ((x / 147) ** 2.3 + (y / 97) ** 2.3) ** np.float32(1 / 2.3) + 1e-3
    return np.hypot(x, y) * (1 - 1 / ratio)


def paint_trunk(canvas: Canvas) -> None:
    """Paint the table, skin, fat, muscle wall, diaphragm and lungs."""
    x, y = canvas.axes[0][:, None, None], canvas.axes[1][None, :, None]
    table = np.abs(y + 111 + canvas.fat_mm - (x / 150) ** 2 * 18) + 0 * canvas.depth
    canvas.paint("table shell", (table < 11) & (np.abs(x) < 200))
    canvas.paint("table foam", (table < 6) & (np.abs(x) < 197))
    canvas.paint("skin", canvas.depth < canvas.wall_mm + canvas.fat_mm)
    canvas.paint("fat", canvas.depth < canvas.wall_mm + canvas.fat_mm - 2.5)
    canvas.paint("muscle", canvas.depth < canvas.wall_mm)
    inside = canvas.depth < 0
    canvas.paint("fat", inside)
    canvas.paint("muscle", inside & (np.abs(canvas.above) < 2))
    x, y, _ = canvas.points
    canvas.paint("lung", inside & (canvas.above > 2) & (np.hypot(x - 6, y + 34) > 30))


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
    loops = [(rng.uniform((-74, -6, -260), (84, 64, -128)), rng.uniform(11, 17)) for _ in range(60)]
    loops += [((x, 58, -128 - 0.0016 * x * x), 17) for x in range(-95, 96, 19)]  # transverse colon
    loops += [((-104, -4, z), 21) for z in range(-260, -165, 16)]  # ascending colon
    loops += [((108, -14, z), 15) for z in range(-260, -110, 12)]  # descending colon
    for centre, radius in loops:
        radii = radius * rng.uniform(0.85, 1.25, 3)
        box, points = canvas.look_at(centre, radii)
        level = centre[1] + radius * rng.uniform(-0.6, 1.4)
        paint_hollow(canvas, ellipsoid(points, centre, radii), 2.5, points[1] > level, box)


def paint_hollow(canvas: Canvas, shape: np.ndarray, wall_mm: float, gas, box: tuple) -> None:
    """Paint a piece of gut: wall, content, and gas where `gas` is true."""
    canvas.paint("gut wall", shape < 0, box)
    canvas.paint("gut content", shape < -wall_mm, box)
    canvas.paint("gas", (shape < -wall_mm) & gas, box)


def stomach(canvas: Canvas, points: np.ndarray) -> np.ndarray:
    """Return roughly the distance in mm to the stomach, negative inside."""
    parts = ("stomach fundus", "stomach body", "stomach antrum")
    fundus, body, antrum = (ellipsoid(points, *canvas.organs[part]) for part in parts)
    return join(join(fundus, body, 25), antrum, 18)


def paint_organs(canvas: Canvas) -> None:
    """Paint stomach, heart, spleen, gallbladder, kidneys, pancreas and the great vessels."""
    box, points = canvas.look((-60, -60, -150), (115, 85, 0))
    shape = cut(stomach(canvas, points), canvas.above[box] + 4, 4)
    gas = points[1] > canvas.rng.uniform(20, 40)
    paint_hollow(canvas, cut(shape, canvas.depth[box] + 2, 4), 4, gas, box)
    canvas.paint_tubes(TUBES)
    for name in SOLID_ORGANS:
        box, points = canvas.look_at(*canvas.organs[name][:2])
        limit = 2 - canvas.above[box] if "heart" in name else canvas.above[box] + 3.5
        room = np.maximum(canvas.depth[box] + 2, limit)
        shape = np.maximum(ellipsoid(points, *canvas.organs[name]), room)
        canvas.paint(SOLID_ORGANS[name], shape < 0, box)
        if "kidney" in name:
            canvas.paint("kidney medulla", shape < -7, box)
            hilum = canvas.organs[name][0] * (0.74, 0.92, 1)  # faces the spine
            canvas.paint("fat", (shape < 1) & (ellipsoid(points, hilum, (15, 10, 24)) < 0), box)


def liver_shape(canvas: Canvas, box: tuple, points: np.ndarray) -> np.ndarray:
    """Return roughly the distance in mm to the liver, carved out by its neighbours."""
    x, y, z = points
    lobes = ("right lobe", "right tip", "left lobe", "caudate lobe")
    right, tip, left, caudate = (ellipsoid(points, *canvas.organs[lobe]) for lobe in lobes)
    visceral = 0.6 * (x + 14) - 0.3 * (y - 4) - 0.74 * (z + 92)  # faces kidney, colon and stomach
    right = join(cut(right, visceral, 16), tip, 20)
    axes_mm = [axis[part] for axis, part in zip(canvas.axes, box, strict=True)]
    bumps = smooth_noise(axes_mm, 60, 2, canvas.rng)
    liver = join(right, join(left, caudate, 12), 14) + bumps
    gap = np.maximum(1.8 + smooth_noise(axes_mm, 45, 1.4, canvas.rng), 0)  # 0: they touch
    liver = cut(liver, canvas.above[box] + 2, 4)
    neighbours = [canvas.depth[box], -stomach(canvas, points)]
    vessels = TUBES["vena cava"] + TUBES["aorta"]
    neighbours += [radius - tube(points, start, end) for radius, start, end in segments(vessels)]
    for name in ("right kidney", "gallbladder", "spleen"):
        neighbours.append(-ellipsoid(points, *canvas.organs[name]))
    neighbours += [38 - np.hypot(x, y + 62), 22 - np.hypot(x + 6, y + 34)]  # spine and crura
    for neighbour in neighbours:
        liver = cut(liver, neighbour + gap, 4)
    return liver


def paint_liver(canvas: Canvas, lesion: str) -> None:
    """Paint the liver, its vessels and two to five lesions if the patient has any."""
    box, points = canvas.look((-136, -90, -176), (90, 90, 0))
    shape, rng = liver_shape(canvas, box, points), canvas.rng
    solid = np.isin(canvas.labels[box], [LABEL["cortical bone"], LABEL["muscle"]])
    pieces, _ = label((shape < 0) & ~solid)
    canvas.paint("liver", pieces == np.bincount(pieces[pieces > 0]).argmax(), box)
    canvas.paint_tubes(LIVER_TUBES, within="liver")
    for radius in rng.uniform(5, 15, rng.integers(2, 6)) if lesion != "none" else ():
        rooms = np.argwhere(shape < -0.7 * radius)
        if len(rooms):
            centre = points[(slice(None), *rooms[rng.integers(len(rooms))])]
            inside = ellipsoid(points, centre, radius * rng.uniform(0.8, 1.2, 3)) < 0
            canvas.paint(lesion, inside & IN_LIVER[canvas.labels[box]], box)


def draw_labels(axes_mm: list[np.ndarray], lesion: str, rng) -> np.ndarray:
    """Return the tissues of one patient, (x, y, z) uint8, values of LABEL."""
    canvas = Canvas(axes_mm, rng)
    paint_trunk(canvas)
    paint_ribs(canvas)
    paint_spine(canvas)
    paint_bowel(canvas)
    paint_organs(canvas)
    paint_liver(canvas, lesion)
    return canvas.labels


def scan(labels: np.ndarray, phase: str, rng) -> np.ndarray:
    """Turn labels into int16 HU: contrast phase, fatty liver, blur and grainy noise."""
    tissue_hu = np.array([row[PHASE_COLUMN[phase]] for row in TISSUE_HU.values()], np.float32)
    tissue_hu[LABEL["liver"]] -= rng.uniform(0, 20)  # fat in the liver darkens it
    tissue_hu[LABEL["gut content"]] = rng.uniform(10, 100)  # from water to oral contrast
    image = tissue_hu[labels]
    grain = gaussian_filter(rng.standard_normal(labels.shape, np.float32), (0.9, 0.9, 0.5))
    grain /= grain.std()
    image[(labels == LABEL["lung"]) & (grain > 2.2)] = tissue_hu[LABEL["lung vessel"]]
    image = gaussian_filter(image, (0.7, 0.7, 0.35)) + grain * rng.uniform(13, 19)
    return np.clip(np.rint(image), -1024, 2000).astype(np.int16)


def place_grid(matrix: int, rng) -> tuple[list[np.ndarray], tuple[float, float]]:
    """Choose a patient's size, position and slices.

    Returns the voxel centres in reference mm, three float32 arrays (x,), (y,) and (z,), and the
    spacing in mm: pixel, slice distance.
    """
    size = rng.uniform(0.9, 1.1)
    stretch = size * rng.uniform(0.96, 1.04, 3)
    pixel = round(np.clip(370 * size * rng.uniform(1, 1.06), 310, 420) / matrix, 4)
    distance = round(rng.uniform(3.8, 5.6), 3)
    bottom, top = rng.uniform((-225, 14), (-195, 34)) * stretch[2]
    offset = rng.uniform((-8, -16), (8, -4))  # nobody lies exactly in the middle
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
    volumes = scan(labels, phase, rng), IN_LIVER[labels].astype(np.uint8)
    images = [as_nifti(volume, affine, axes) for volume in volumes]
    for image in images:
        image.header["descrip"] = MARK
    return images


def patient_kind(number: int) -> tuple[str, str, str]:
    """Return contrast phase, lesion and stored axes of patient 1, 2, ..."""
    return tuple(kinds[(number - 1) % len(kinds)] for kinds in (PHASES, LESIONS, STORED_AXES))


def is_own(path: Path) -> bool:
    """Say whether this script wrote the file: name and NIfTI header must both tell so."""
    try:
        own_name = OWN_NAME.fullmatch(path.name)
        return bool(own_name) and open_volume(path).header["descrip"].item() == MARK
    except ValueError:  # no NIfTI, or broken: somebody else's
        return False


def find_own(folders: list[Path]) -> list[Path]:
    """Return the phantom files in the folders. Raises ValueError if there are other scans."""
    files = sorted(path for folder in folders for path in folder.glob("[!.]*"))
    scans = [path for path in files if path.name.lower().endswith((".nii", ".nii.gz"))]
    for path in scans:
        if not is_own(path):
            raise ValueError(
                f"{named(path)} was not made by this script, which wants folders without other "
                "scans: move it away first, or keep it and run `python data.py`"
            )
    return scans


def write_patient(folder: Path, number: int, matrix: int, seed: int) -> dict[str, object]:
    """Draw and store one patient; return a line of the table."""
    images = make_patient(number, matrix, seed)
    name = f"phantom_{number:02d}"
    with whole(*(folder / f"{name}_{kind}.nii.gz" for kind in ("orig", "liver"))) as drafts:
        for image, draft in zip(images, drafts, strict=True):
            nib.save(image, draft)  # gzipped at level 1 and without a date
    image, mask = images
    phase, lesion, _ = patient_kind(number)
    sizes_mm = image.header.get_zooms()
    return {
        "patient": name,
        "split": folder.name,
        "voxels": sides(image.shape),
        "spacing_mm": " x ".join(f"{mm:.2f}" for mm in sizes_mm),
        "axes": "".join(nib.aff2axcodes(image.affine)),
        "liver_ml": round(np.count_nonzero(mask.dataobj) * np.prod(sizes_mm) / 1000),
        "phase": phase,
        "lesion": lesion,
    }


def parse_options() -> argparse.Namespace:
    """Read the command line; a bad option ends with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=int, default=6, help="patients in raw/train (6)")
    parser.add_argument("--test", type=int, default=2, help="patients in raw/test (2)")
    parser.add_argument("--matrix", type=int, default=256, help="pixels per row and column (256)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other patients (0)")
    options = parser.parse_args()
    limits = {"train": (1, 99), "test": (0, 99), "matrix": (32, 1024), "seed": (0, 2**32)}
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
