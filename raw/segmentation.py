"""Write a liver mask as a DICOM segmentation. Used by raw/dicom.py; it does nothing by itself."""

import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentDescription
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid
from scipy import ndimage
from volumes import AFFINE_TOLERANCE, ROOT, named, open_volume, read_mask, whole

# what a segmentation takes over from its series, so that a viewer finds and places it
LINKS = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Modality")
LINKS += ("FrameOfReferenceUID", "Rows", "Columns", "ImageType", "PixelSpacing", "SliceThickness")
LINKS += ("ImageOrientationPatient", "ImagePositionPatient", "NumberOfFrames")
LINKS += ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
# and what it takes only if it is told to, else these are empty
PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber")
PATIENT += ("StudyID", "StudyDate", "StudyTime")
CHARACTERS = ("SpecificCharacterSet",)
MAKER = "Liver segmentation in CT with a U-net in Keras"
VERSION = "1"


def read_source(path: Path, identified: bool, step_mm: float) -> pydicom.Dataset:
    """Return what a segmentation needs of the header of its series.

    Raises ValueError if that is not there; slices without a thickness are as thick as their step.
    """
    keywords = [*LINKS, *(PATIENT + CHARACTERS if identified else ())]
    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=keywords)
    if not identified and "SpecificCharacterSet" in header:  # pydicom reads it in any case
        del header.SpecificCharacterSet
    for keyword in PATIENT:
        if keyword not in header:
            setattr(header, keyword, "")
    header.SliceThickness = header.get("SliceThickness") or f"{step_mm:.6g}"
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        if not header.get(keyword):
            raise ValueError(f"the series has no {keyword}, so that no viewer could place a mask")
    return header


def describe_liver() -> SegmentDescription:
    """Return what is marked, in the words of SNOMED, and by what."""
    return SegmentDescription(
        segment_number=1,
        segment_label="Liver",
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=codes.SCT.Liver,
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence(
            name=MAKER, version=VERSION, family=codes.DCM.ArtificialIntelligence
        ),
    )


def fits(path: Path, shape: tuple, affine: np.ndarray) -> bool:
    """Say whether a mask lies on a grid, whatever the order and direction of its axes."""
    mask = open_volume(path)
    corners = np.argwhere(np.ones((2, 2, 2))) * (np.array(shape) - 1)  # (8, x y z)
    places = nib.affines.apply_affine(np.linalg.inv(mask.affine) @ affine, corners)
    off = np.minimum(np.abs(places), np.abs(places - np.array(mask.shape[:3]) + 1))
    return off.max() < AFFINE_TOLERANCE


def place_mask(path: Path, affine: np.ndarray, shape: tuple) -> np.ndarray:
    """Return a mask on the slices with this affine, (slices, rows, columns) uint8, 0 or 1.

    Each voxel takes the nearest one of the mask, whose axes may be others; if the gantry leaned,
    the one that it was moved to. Raises ValueError for a mask without liver.
    """
    to_mask = np.linalg.inv(open_volume(path).affine) @ affine  # from (column, row, slice)
    voxels = read_mask(path).view(np.uint8)
    if not voxels.any():
        raise ValueError(f"{named(path)} marks no liver in any slice: nothing to write")
    return ndimage.affine_transform(
        voxels, to_mask, output_shape=shape[::-1], order=0, mode="nearest"
    ).transpose(2, 1, 0)


def read_sources(
    places: list[tuple[Path, int]], identified: bool, step_mm: float
) -> list[pydicom.Dataset]:
    """Return the headers of the slices, or the one of the file that holds them all as frames.

    Raises ValueError for frames in several files, which a segmentation cannot be made of.
    """
    files = dict.fromkeys(file for file, _ in places)
    sources = [read_source(file, identified, step_mm) for file in files]
    if groups := sources[0].get("PerFrameFunctionalGroupsSequence"):
        if len(sources) > 1:
            raise ValueError("the series is in several files of many slices, wanted one file")
        # without the frames of other time points, which lie at the same positions
        sources[0].PerFrameFunctionalGroupsSequence = [groups[frame] for _, frame in places]
        sources[0].NumberOfFrames = len(places)
    return sources


def export_mask(
    mask: Path, places: list[tuple[Path, int]], affine: np.ndarray, identified: bool
) -> Path:
    """Write a mask as a DICOM segmentation to preds/ and return its path.

    Raises ValueError if the headers of the slices do not allow it, or if the mask is empty.
    places : file and frame of each slice; affine : from (column, row, slice) of these, mm
    """
    sources = read_sources(places, identified, np.linalg.norm(affine[:3, 2]))
    size = len(places), sources[0].Rows, sources[0].Columns
    segmentation = Segmentation(
        source_images=sources,
        pixel_array=place_mask(mask, affine, size),
        segmentation_type="BINARY",
        segment_descriptions=[describe_liver()],
        series_instance_uid=generate_uid(),
        series_number=1000,  # far from those of the scanner
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer=MAKER,
        manufacturer_model_name="U-net",
        software_versions=VERSION,
        device_serial_number="-",
    )
    if (
        "PerFrameFunctionalGroupsSequence" in sources[0]
    ):  # its frames count from 1, among those that were left out
        for group in segmentation.PerFrameFunctionalGroupsSequence:
            for source in group.DerivationImageSequence[0].SourceImageSequence:
                source.ReferencedFrameNumber = places[source.ReferencedFrameNumber - 1][1] + 1
    path = ROOT / "preds" / re.sub(r"\.nii(\.gz)?$", ".dcm", mask.name, flags=re.IGNORECASE)
    with whole(path) as (draft,):
        segmentation.save_as(draft)
    return path
