"""Cases of a data set in FLARE22's layout: images named CASE_0000.nii.gz, label maps CASE.nii.gz."""

from dataclasses import dataclass
from pathlib import Path

from inference.volume import SUFFIXES
from train.config import Data

CHANNEL = "_0000"


class DatasetError(ValueError):
    """A data set that cannot be used. The message names the folder or file, what was found and what was expected."""


@dataclass(frozen=True)
class Case:
    """One scan: its id, image file, and label map where it has one; ``auxiliary``: label map of auxiliary classes."""

    id: str
    image: Path
    label: Path | None = None
    auxiliary: Path | None = None


def labelled_cases(root: Path, data: Data) -> tuple[Case, ...]:
    """Training cases with label maps, sorted by id. Raises DatasetError."""
    cases = _paired(root / data.images, root / data.labels)
    if not data.auxiliary_classes:
        return cases
    extra = _label_files(root / data.auxiliary_labels)
    for case in cases:
        if case.id not in extra:
            folder = root / data.auxiliary_labels
            raise DatasetError(
                f"{folder}: no label map for {case.id}; expected one per training case, for data.auxiliary_classes"
            )
    return tuple(Case(case.id, case.image, case.label, extra[case.id]) for case in cases)


def unlabelled_cases(root: Path, data: Data) -> tuple[Case, ...]:
    """Cases without label maps, sorted by id. Raises DatasetError."""
    return tuple(Case(name, path) for name, path in sorted(_image_files(root / data.unlabelled).items()))


def held_out_cases(root: Path, data: Data) -> tuple[Case, ...]:
    """Cases of the test split with label maps, sorted by id. Raises DatasetError."""
    return _paired(root / data.test_images, root / data.test_labels)


def _paired(image_folder: Path, label_folder: Path) -> tuple[Case, ...]:
    images, labels = _image_files(image_folder), _label_files(label_folder)
    for name in sorted(images.keys() - labels.keys()):
        raise DatasetError(f"{images[name]}: no label map {name}.nii.gz in {label_folder}; expected one per image")
    for name in sorted(labels.keys() - images.keys()):
        raise DatasetError(
            f"{labels[name]}: no image {name}{CHANNEL}.nii.gz in {image_folder}; expected one per label map"
        )
    return tuple(Case(name, images[name], labels[name]) for name in sorted(images))


def _image_files(folder: Path) -> dict[str, Path]:
    files = _nifti_files(folder)
    for name, path in files.items():
        if not name.endswith(CHANNEL) or name == CHANNEL:
            raise DatasetError(f"{path}: expected an image named CASE{CHANNEL}.nii.gz")
    return {name.removesuffix(CHANNEL): path for name, path in files.items()}


def _label_files(folder: Path) -> dict[str, Path]:
    return _nifti_files(folder)


def _nifti_files(folder: Path) -> dict[str, Path]:
    """NIfTI files of a folder by name without suffix. Other files are passed over; hidden ones too."""
    if not folder.is_dir():
        raise DatasetError(f"{folder}: not a folder; expected NIfTI files (folder names are settings, section [data])")
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)
        if suffix is None or path.name.startswith("."):
            continue
        name = path.name.removesuffix(suffix)
        if name in files:
            raise DatasetError(f"{path}: {files[name].name} lies beside it; expected one file per case")
        files[name] = path
    if not files:
        raise DatasetError(f"{folder}: no .nii.gz or .nii file; expected at least one")
    return files
