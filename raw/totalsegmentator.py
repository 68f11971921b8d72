"""Fill raw/train and raw/test from TotalSegmentator's small set: 102 CT scans under CC BY 4.0.

    python raw/totalsegmentator.py              download the zip, 3.2 GB, and take what is of use
    python raw/totalsegmentator.py --from PATH  the zip that you already have, or its folder

Of the scans that hold a whole liver, whose mask touches neither the first slice nor the last, every
fourth is for raw/test: totalseg_s0011_orig.nii.gz, totalseg_s0011_liver.nii.gz and so on, as they
are in the zip; raw/totalsegmentator.csv lists all. A download that is stopped starts again from
nothing; after it, the next run goes on with what is missing. Nothing that is there is overwritten.
"""

import argparse
import re
import signal
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pooch
import requests
from isal import igzip
from tqdm import tqdm
from volumes import ROOT, damaged, named, one_sentence, sides, whole

RAW = ROOT / "raw"
WORK = RAW / ".totalsegmentator"  # the download
URL = "https://zenodo.org/records/10047263/files/"
ZIP = "Totalsegmentator_dataset_small_v201.zip"
MD5 = "6b5524af4b15e6ba06ef2d700c0c73e0"
LICENCE = """\
The TotalSegmentator set is under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/): it and
what is made of it may be passed on, with its authors named. Please cite
J. Wasserthal et al., "TotalSegmentator: robust segmentation of 104 anatomic structures in CT
images", Radiology: Artificial Intelligence 5(5), 2023, https://doi.org/10.1148/ryai.230024
The data: https://doi.org/10.5281/zenodo.10047263
"""
BY_HAND = "get it from https://zenodo.org/records/10047263 in a browser, and use --from"
SUBJECT = re.compile(r"(?:.*/)?([\w-]+)/ct\.nii\.gz")
MASK = "segmentations/liver.nii.gz"  # beside a subject's ct.nii.gz
TEST_EVERY = 4  # the subjects are people, each with one scan
TABLE = "totalsegmentator.csv"
COLUMNS = ("subject", "liver", "split", "slices", "spacing_mm", "liver_ml")
Reader = Callable[[], bytes]


def download(url: str) -> Path:
    """Return the path of the zip, downloaded unless it is there, with the checksum that it has.

    Raises ConnectionError if it does not come.
    """
    if not (WORK / ZIP).exists():
        print("3.2 GB come in one piece: stopped, the download starts again", flush=True)
    fetcher = pooch.create(WORK, url, registry={ZIP: f"md5:{MD5}"}, retry_if_failed=2)
    bar = pooch.HTTPDownloader(progressbar=True, chunk_size=2**18, timeout=60)
    try:
        return Path(fetcher.fetch(ZIP, downloader=bar))
    except (requests.RequestException, ValueError) as error:  # ValueError: another checksum
        print(file=sys.stderr)  # the bar stays where it stopped, and the sentence goes below
        kind = type(error).__name__ if isinstance(error, requests.RequestException) else "damaged"
        raise ConnectionError(f"{url}{ZIP} does not come whole ({kind}): {BY_HAND}") from error


@contextmanager
def opened(source: Path) -> Iterator[dict[str, Reader]]:
    """Yield {path: function that reads it} of the files in a folder or a zip.

    Raises ValueError for a file that is neither.
    """
    if source.is_dir():
        paths = source.rglob("*.nii.gz")
        yield {path.relative_to(source).as_posix(): path.read_bytes for path in paths}
        return
    try:
        archive = zipfile.ZipFile(source)
    except zipfile.BadZipFile as error:
        raise damaged(str(source), error) from error
    with archive:
        yield {name: partial(archive.read, name) for name in archive.namelist()}


def find_subjects(files: dict[str, Reader]) -> dict[str, tuple[str, str]]:
    """Return {subject: paths of its scan and its liver}. Raises FileNotFoundError for none."""
    found = {}
    for path in sorted(files):
        mask = path.removesuffix("ct.nii.gz") + MASK
        if (match := SUBJECT.fullmatch(path)) and mask in files:
            found[match[1]] = path, mask
    if not found:
        raise FileNotFoundError(f"nothing there is named s0011/ct.nii.gz beside s0011/{MASK}")
    return found


def measure(path: str, content: bytes) -> dict[str, object]:
    """Return what a mask tells for the table. Raises ValueError for a file that is damaged."""
    try:
        mask = nib.as_closest_canonical(nib.Nifti1Image.from_bytes(igzip.decompress(content)))
        inside = np.asarray(mask.dataobj) > 0  # (right, front, head)
    except Exception as error:  # nibabel has a class of error for each kind of damage
        raise damaged(path, error) from error
    of_liver = inside.any(axis=(0, 1))
    liver = "cut" if of_liver[0] or of_liver[-1] else "whole" if of_liver.any() else "none"
    spacing_mm = nib.affines.voxel_sizes(mask.affine)
    return {
        "liver": liver,
        "slices": len(of_liver),
        "spacing_mm": sides(spacing_mm.round(3)),
        "liver_ml": round(np.count_nonzero(inside) * np.prod(spacing_mm) / 1000),
    }


def pair(name: str, split: str) -> list[Path]:
    """Return the paths of a subject's mask and image; data.py refuses a mask without an image."""
    return [RAW / split / f"totalseg_{name}_{kind}.nii.gz" for kind in ("liver", "orig")]


def is_there(name: str) -> bool:
    """Say whether a subject is there with mask and image, be it moved to the other split."""
    return any(all(path.exists() for path in pair(name, split)) for split in ("train", "test"))


def read_table() -> pd.DataFrame | None:
    """Return the table of a run that was finished, None if subjects are missing since."""
    if not (RAW / TABLE).exists():
        return None
    table = pd.read_csv(RAW / TABLE)
    return table if all(map(is_there, table["subject"][table["liver"] == "whole"])) else None


def bring(name: str, split: str, contents: list[bytes]) -> None:
    """Write a subject's mask and image. Raises ValueError if another file is there."""
    paths = pair(name, split)
    for path, content in zip(paths, contents, strict=True):
        if path.exists() and path.read_bytes() != content:
            raise ValueError(f"{named(path)} would be overwritten: take it away")
    with whole(*paths) as drafts:
        for draft, content in zip(drafts, contents, strict=True):
            draft.write_bytes(content)


def get_subjects(files: dict[str, Reader]) -> pd.DataFrame:
    """Bring the subjects with a whole liver, unless they are there; return a row for each."""
    rows: list[dict] = []
    for name, (scan, mask) in tqdm(find_subjects(files).items(), "subjects", unit=""):
        try:
            content = files[mask]()
            row = {"subject": name, "split": "-", **measure(mask, content)}
            if row["liver"] == "whole":
                count = sum(other["liver"] == "whole" for other in rows) + 1
                row["split"] = "train" if count % TEST_EVERY else "test"
                if not is_there(name):
                    bring(name, row["split"], [content, files[scan]()])
        except (zipfile.BadZipFile, zlib.error) as error:
            raise damaged(scan, error) from error
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, metavar="PATH", help="zip or folder")
    parser.add_argument("--url", default=URL, help="where to download from (%(default)s)")
    parser.add_argument("--keep", action="store_true", help=f"keep the download, {named(WORK)}")
    options = parser.parse_args(arguments)
    if options.source and not options.source.exists():
        parser.error(f"--from {options.source}: no such file or folder")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Get the subjects, list them and say what comes next; errors leave in one sentence."""
    options = parse_options(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidy up as after Ctrl-C
    print(LICENCE, flush=True)
    try:
        for folder in (RAW / "train", RAW / "test", WORK):
            folder.mkdir(exist_ok=True)
        for path in WORK.glob("tmp*"):  # what pooch leaves if it is killed
            path.unlink()
        if (table := read_table()) is None:
            with opened(options.source or download(options.url)) as files:
                table = get_subjects(files)
            with whole(RAW / TABLE) as (draft,):
                table.to_csv(draft, index=False)
        if not options.keep:
            (WORK / ZIP).unlink(missing_ok=True)
    except (ValueError, OSError) as error:
        sys.exit(f"raw/totalsegmentator.py: {one_sentence(error)}")
    except KeyboardInterrupt:
        sys.exit("raw/totalsegmentator.py: interrupted, the same command goes on")
    finally:
        with suppress(OSError):  # it is not empty, or was never made
            WORK.rmdir()
    print(table.to_string(index=False))
    print("next: python data.py")


if __name__ == "__main__":
    main()
