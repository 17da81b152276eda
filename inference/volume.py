"""NIfTI in and out. The only module that knows the file's (x, y, z) order and its orientation.

Inside, every array is (z, y, x) in one orientation, by default LPS as in DICOM: x to the patient's left, y to posterior,
z to superior. A label map goes back to the scan's own axes and keeps its header: size, spacing, qform and sform with
their codes.
"""

import contextlib
import gzip
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from isal import igzip
from isal.isal_zlib import IsalError
from nibabel.affines import voxel_sizes

Array = npt.NDArray[Any]
Labels = npt.NDArray[np.uint8]
Spacing = tuple[float, float, float]
Shape = tuple[int, int, int]

ORIENTATION = "LPS"
SUFFIXES = (".nii.gz", ".nii")

# A voxel edge outside this range (mm) is a broken header: micro-CT starts below it, scouts end above it.
SPACING_RANGE = (0.05, 50.0)
# igzip's: on label maps, mostly runs of zeros, a thirtieth of the time of zlib's level 3 and fewer bytes.
COMPRESSION_LEVEL = 1


class VolumeError(ValueError):
    """A file that is not a scan or a label map. The message names the file, what was found and what was expected."""


@dataclass(frozen=True)
class Volume:
    """A scan or a label map in the inside orientation.

    ``voxels``: (z, y, x), the file's own number type unless a slope applies (then float32). ``spacing``: mm, (z, y, x).
    ``affine``: (4, 4), index (x, y, z) of ``voxels`` to RAS mm, as NIfTI has it. ``header``: the file's own.
    ``to_file``: the nibabel orientation transform that takes (x, y, z) back to the file's axes. ``warnings``: what is odd
    about the file but does not stop it.
    """

    voxels: Array
    spacing: Spacing
    affine: Array
    header: Any
    to_file: Array
    warnings: tuple[str, ...] = ()

    @property
    def shape(self) -> Shape:
        """(z, y, x) voxels."""
        z, y, x = self.voxels.shape
        return z, y, x

    @property
    def voxel_volume(self) -> float:
        """mm3 of one voxel."""
        return self.spacing[0] * self.spacing[1] * self.spacing[2]

    def without_voxels(self) -> "Volume":
        """The same place, shape and header for a mask, without the voxels' memory: all of them read 0."""
        return replace(self, voxels=np.broadcast_to(np.zeros((), self.voxels.dtype), self.shape))


def read_volume(path: Path, orientation: str = ORIENTATION) -> Volume:
    """Read a CT scan from .nii or .nii.gz.

    ``orientation``: the directions in which x, y and z grow, e.g. "LPS" or "RAS"; the axes keep this order.
    Raises VolumeError for anything but one finite, non-constant 3D image with a usable geometry.
    """
    volume = _read(path, orientation)
    low, high = _finite_range(path, volume.voxels)
    if low == high:
        raise VolumeError(f"{path}: every voxel is {low:g}; expected a CT scan")
    if low > -200:
        # Air is -1000 HU and surrounds every patient: a scan without it was windowed or shifted before it came here.
        note = f"lowest intensity is {low:g}, so there is no air: are these Hounsfield units?"
        return _with_warning(volume, note)
    return volume


def read_labels(path: Path, orientation: str = ORIENTATION) -> Volume:
    """Read a label map: as ``read_volume``, but an empty map is valid and voxels become uint8. Whole numbers 0-255 only."""
    volume = _read(path, orientation)
    low, high = _finite_range(path, volume.voxels)
    whole = np.issubdtype(volume.voxels.dtype, np.integer) or bool((volume.voxels == np.rint(volume.voxels)).all())
    if low < 0 or high > 255 or not whole:
        raise VolumeError(
            f"{path}: values from {low:g} to {high:g}; expected a label map of whole numbers from 0 to 255"
        )
    fields = dict(volume.__dict__, voxels=volume.voxels.astype(np.uint8, copy=False))
    return Volume(**fields)


def write_labels(path: Path, labels: Labels, scan: Volume) -> None:
    """Write a label map (z, y, x) of ``scan``'s shape on the scan's own grid, as uint8, whole or not at all.

    Size, spacing, qform and sform with their codes are those of the scan's file. Raises OSError if the disk refuses.
    """
    if labels.shape != scan.shape:
        raise ValueError(f"label map is {labels.shape}, its scan {scan.shape} (z, y, x)")
    stored = nib.apply_orientation(labels.T, scan.to_file)
    header = scan.header.copy()
    header.extensions.clear()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1, 0)
    header.set_intent("none")
    header["cal_min"], header["cal_max"] = 0, 0
    image_class = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    _write_image(path, image_class(stored, None, header))


def write_volume(path: Path, voxels: Array, affine: Array) -> None:
    """Write an inside array (z, y, x) with its affine (see ``Volume.affine``) as a new NIfTI, whole or not at all."""
    image = nib.Nifti1Image(voxels.T, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    image.header.set_xyzt_units("mm")
    _write_image(path, image)


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file so that its name only ever shows the whole content: a hidden neighbour first, then a rename."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _write_image(path: Path, image: Any) -> None:
    content: bytes = image.to_bytes()
    if path.name.endswith(".gz"):
        # mtime=0: the same mask gives the same bytes.
        content = igzip.compress(content, COMPRESSION_LEVEL, mtime=0)
    atomic_write(path, content)


def _read(path: Path, orientation: str) -> Volume:
    content = _read_bytes(path)
    header = _read_header(path, content)
    stored = _read_voxels(path, content, header)
    affine, warnings = _read_affine(path, header)
    to_inside = nib.orientations.ornt_transform(
        nib.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(orientation))
    )
    to_file = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt(tuple(orientation)), nib.io_orientation(affine)
    )
    inside_affine = affine @ nib.orientations.inv_ornt_aff(to_inside, stored.shape)
    x, y, z = voxel_sizes(inside_affine)
    voxels = np.ascontiguousarray(nib.apply_orientation(stored, to_inside).T)
    return Volume(voxels, (float(z), float(y), float(x)), inside_affine, header, to_file, warnings)


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read ({error.strerror})") from error
    if not content:
        raise VolumeError(f"{path}: the file is empty; expected a NIfTI image")
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        unpacked: bytes = igzip.decompress(content)
    except (EOFError, IsalError, gzip.BadGzipFile) as error:
        raise VolumeError(f"{path}: the gzip data is cut off or damaged ({error}); expected a whole .nii.gz") from error
    return unpacked


def _read_header(path: Path, content: bytes) -> Any:
    """The NIfTI-1 or NIfTI-2 header of a single-file image."""
    for header_class, size in ((nib.Nifti1Header, 348), (nib.Nifti2Header, 540)):
        if {content[:4]} & {size.to_bytes(4, "little"), size.to_bytes(4, "big")} and len(content) >= size:
            try:
                header = header_class(content[:size], check=False)
                # Checked apart from the constructor, which logs to stderr what it mends.
                header.get_data_dtype(), header.get_data_shape(), header.get_slope_inter()
            except Exception as error:  # nibabel raises many kinds for a damaged header
                raise VolumeError(f"{path}: the NIfTI header is damaged ({error})") from error
            if bytes(header["magic"])[:2] in (b"n+", b"ni"):
                return header
    raise VolumeError(f"{path}: starts with {content[:12]!r}, which is no NIfTI header; expected a NIfTI image")


def _read_voxels(path: Path, content: bytes, header: Any) -> Array:
    """The stored array in the file's axis order (x, y, z), scaled where the header has a slope."""
    shape = tuple(int(n) for n in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1:
        size = " x ".join(str(n) for n in shape) or "no"
        raise VolumeError(f"{path}: a {len(shape)}D image of {size} voxels; expected one 3D volume")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise VolumeError(f"{path}: voxels of type {dtype}; expected whole or floating-point numbers")
    offset = max(int(header["vox_offset"]), 352)
    promised = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    found = max(0, len(content) - offset)
    if found < promised:
        raise VolumeError(f"{path}: {found} bytes of voxels; the header promises {promised}: the file is cut off")
    stored: Array = np.ndarray(shape, dtype, buffer=content, offset=offset, order="F")
    stored = stored.astype(dtype.newbyteorder("="), copy=False)
    slope, intercept = header.get_slope_inter()
    if slope is None or (slope == 1 and intercept == 0):
        return stored
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _read_affine(path: Path, header: Any) -> tuple[Array, tuple[str, ...]]:
    """The best affine of the file (sform, else qform, else spacing alone), checked, and what is odd about it."""
    pixdim = np.abs(np.asarray(header["pixdim"][1:4], float))
    _check_spacing(path, pixdim)
    if header["pixdim"][0] == 0:
        # The standard takes this for 1; nibabel refuses it.
        header = header.copy()
        header["pixdim"][0] = 1
    try:
        affine = np.asarray(header.get_best_affine(), float)
    except Exception as error:  # a quaternion longer than one, among others
        raise VolumeError(f"{path}: the header's orientation cannot be used ({error})") from error
    spacing = voxel_sizes(affine)
    _check_spacing(path, spacing)
    # Below this the three axes lie (almost) in one plane and no orientation can be told.
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 0.1 or np.isnan(nib.io_orientation(affine)).any():
        raise VolumeError(f"{path}: the header's axes are not independent; expected three directions in space")
    warnings = []
    if int(header["qform_code"]) <= 0 and int(header["sform_code"]) <= 0:
        warnings.append(
            "the header names no orientation (qform and sform codes 0); axes read as right, anterior, superior"
        )
        affine = _unflipped(affine)
    elif not np.allclose(pixdim, spacing, rtol=0.01):
        warnings.append(
            f"spacing differs between pixdim {_mm(pixdim)} and the affine {_mm(spacing)}; the affine counts"
        )
    return affine, tuple(warnings)


def _check_spacing(path: Path, spacing: Array) -> None:
    low, high = SPACING_RANGE
    if not (np.isfinite(spacing).all() and (spacing >= low).all() and (spacing <= high).all()):
        found = " x ".join(f"{side:g}" for side in spacing)
        raise VolumeError(f"{path}: spacing {found} mm (x, y, z); expected {low:g} to {high:g} mm along each axis")


def _unflipped(affine: Array) -> Array:
    """nibabel flips x where no form is coded (Analyze's habit); NIfTI's method 1 and ITK do not."""
    flipped = affine.copy()
    flipped[0] = -flipped[0]
    return flipped


def _mm(sizes: Array) -> str:
    return " x ".join(f"{size:.3g}" for size in sizes) + " mm"


def _finite_range(path: Path, voxels: Array) -> tuple[float, float]:
    low, high = float(voxels.min()), float(voxels.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        count = int(voxels.size - np.isfinite(voxels).sum())
        raise VolumeError(f"{path}: {count} voxels are NaN or infinite; expected finite intensities")
    return low, high


def _with_warning(volume: Volume, note: str) -> Volume:
    return Volume(**dict(volume.__dict__, warnings=(*volume.warnings, note)))
