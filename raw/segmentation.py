"""Write a liver mask as a DICOM segmentation. Used by raw/dicom.py; it does nothing by itself."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentDescription
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid
from scipy import ndimage

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


def read_source(path: Path, identified: bool) -> pydicom.Dataset:
    """Return what a segmentation needs of the header of its series."""
    keywords = [*LINKS, *(PATIENT + CHARACTERS if identified else ())]
    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=keywords)
    if not identified and "SpecificCharacterSet" in header:  # pydicom reads it in any case
        del header.SpecificCharacterSet
    for keyword in PATIENT:
        if keyword not in header:
            setattr(header, keyword, "")
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


def place_mask(mask: nib.Nifti1Image, affine: np.ndarray, shape: tuple) -> np.ndarray:
    """Return a mask on the slices with this affine, (slices, rows, columns) uint8, 0 or 1.

    Each voxel takes the nearest one of the mask, whose axes may be others; on a straight grid of a
    gantry that leaned, the one that it was moved to.
    """
    to_mask = np.linalg.inv(mask.affine) @ affine  # from (column, row, slice)
    voxels = np.asarray(mask.dataobj)
    return ndimage.affine_transform(
        voxels, to_mask, output_shape=shape[::-1], order=0, mode="nearest"
    ).transpose(2, 1, 0)


def write_segmentation(
    path: Path,
    places: list[tuple[Path, int]],
    mask: nib.Nifti1Image,
    affine: np.ndarray,
    identified: bool,
) -> None:
    """Write a mask as a DICOM segmentation of the slices that it was made from.

    Raises ValueError if the headers of the slices do not allow it.
    places : file and frame of each slice; affine : from (column, row, slice) of these, mm
    """
    files = list(dict.fromkeys(file for file, _ in places))
    sources = [read_source(file, identified) for file in files]
    count = int(sources[0].get("NumberOfFrames") or 1)
    if count > 1 and len(files) > 1:
        raise ValueError("the series is in several files of many slices, wanted one: export it so")
    size = sources[0].Rows, sources[0].Columns
    frames = np.zeros((max(count, len(files)), *size), np.uint8)
    at = [frame if count > 1 else k for k, (_, frame) in enumerate(places)]
    frames[at] = place_mask(mask, affine, (len(places), *size))
    segmentation = Segmentation(
        source_images=sources,
        pixel_array=frames,
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
    segmentation.save_as(path)
