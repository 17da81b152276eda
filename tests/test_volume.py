import gzip
import itertools
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from inference.volume import VolumeError, atomic_write, read_labels, read_volume, write_labels, write_volume
from tests.conftest import block_levels, block_scan, save_nifti

SCAN = block_scan(block_levels())


def oblique(degrees: float) -> np.ndarray:
    """An LPS affine (4 x 2 x 2 mm) turned about z and tilted about x."""
    a, b = np.radians(degrees), np.radians(degrees / 2)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.diag([-2.0, -2.0, 4.0])
    affine[:3, 3] = 50, 60, 70
    return affine


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint16", "float32", "float64", "int8", ">i2"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_every_number_type_is_read_plain_and_compressed(tmp_path: Path, dtype: str, suffix: str) -> None:
    voxels = np.arange(-60, 60).reshape(4, 5, 6)
    voxels = (voxels + 60 if dtype == "uint16" else voxels).astype(dtype)
    image = nib.Nifti1Image(voxels.T, np.diag([-2, -2, 4, 1]), dtype=voxels.dtype)
    nib.save(image, tmp_path / f"a{suffix}")
    volume = read_volume(tmp_path / f"a{suffix}")
    assert (volume.voxels == voxels).all()
    assert volume.voxels.dtype.isnative
    assert volume.spacing == (4.0, 2.0, 2.0)


def test_a_slope_is_applied(tmp_path: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.diag([-1, -1, 1, 1]), header)
    image.header.set_slope_inter(2.5, -1000)
    raw = image.to_bytes()
    header_on_disk = nib.Nifti1Header(raw[:348])
    assert header_on_disk.get_slope_inter() == (2.5, -1000)
    (tmp_path / "a.nii").write_bytes(raw)
    stored = np.frombuffer(raw[352:], "<i2").reshape(4, 3, 2)
    volume = read_volume(tmp_path / "a.nii")
    assert volume.voxels.dtype == np.float32
    np.testing.assert_allclose(volume.voxels, stored * 2.5 - 1000)


def test_nifti_2_and_a_4d_file_of_one_volume_are_read(tmp_path: Path) -> None:
    nib.save(nib.Nifti2Image(SCAN.T, np.diag([-2, -2, 4, 1])), tmp_path / "two.nii.gz")
    nib.save(nib.Nifti1Image(SCAN.T[..., None], np.diag([-2, -2, 4, 1])), tmp_path / "four.nii.gz")
    for name in ("two", "four"):
        scan = read_volume(tmp_path / f"{name}.nii.gz")
        assert (scan.voxels == SCAN).all()
        write_labels(tmp_path / "mask.nii.gz", block_levels(), scan)
        mask = nib.load(tmp_path / "mask.nii.gz")
        assert mask.shape == SCAN.T.shape
        assert (np.asarray(mask.dataobj) == block_levels().T).all()


@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_any_axis_order_and_flip_gives_one_inside_array_and_goes_back(
    tmp_path: Path, signs: tuple, order: tuple
) -> None:
    image = nib.load(save_nifti(tmp_path / "lps.nii.gz", SCAN))
    stored = image.as_reoriented(np.array([[axis, sign] for axis, sign in zip(order, signs)]))
    nib.save(stored, tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    assert (volume.voxels == SCAN).all()
    assert volume.spacing == (4.0, 2.0, 2.0)
    np.testing.assert_allclose(volume.affine, image.affine)
    write_labels(tmp_path / "mask.nii.gz", block_levels(), volume)
    mask = nib.load(tmp_path / "mask.nii.gz")
    assert (
        np.asarray(mask.dataobj) * 10 == np.where(np.asarray(stored.dataobj) < 0, 0, np.asarray(stored.dataobj))
    ).all()
    np.testing.assert_array_equal(mask.affine, stored.affine)


@pytest.mark.parametrize("degrees", [5, 20, 40])
def test_an_oblique_header_is_read_along_its_nearest_axes_and_kept(tmp_path: Path, degrees: float) -> None:
    nib.save(nib.Nifti1Image(SCAN.T, oblique(degrees)), tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    assert (volume.voxels == SCAN).all()
    np.testing.assert_allclose(volume.spacing, (4, 2, 2), rtol=1e-5)
    write_labels(tmp_path / "mask.nii.gz", block_levels(), volume)
    np.testing.assert_array_equal(nib.load(tmp_path / "mask.nii.gz").affine, nib.load(tmp_path / "a.nii.gz").affine)


def test_a_sheared_header_is_read(tmp_path: Path) -> None:
    affine = np.diag([-2.0, -2.0, 4.0, 1.0])
    affine[1, 2] = 1.2  # gantry tilt
    image = nib.Nifti1Image(SCAN.T, affine)
    image.set_sform(affine, 2)
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    assert (volume.voxels == SCAN).all()
    write_labels(tmp_path / "mask.nii.gz", block_levels(), volume)
    np.testing.assert_array_equal(nib.load(tmp_path / "mask.nii.gz").affine, nib.load(tmp_path / "a.nii.gz").affine)


@pytest.mark.parametrize(("qform", "sform"), [(1, 1), (0, 2), (1, 0), (4, 3), (0, 0)])
def test_the_mask_keeps_qform_and_sform_apart_with_their_codes(tmp_path: Path, qform: int, sform: int) -> None:
    image = nib.Nifti1Image(SCAN.T, None)
    image.header.set_zooms((2, 2, 4))
    image.set_qform(oblique(3), qform)
    image.set_sform(oblique(30), sform)
    nib.save(image, tmp_path / "a.nii.gz")
    scan = nib.load(tmp_path / "a.nii.gz").header
    write_labels(tmp_path / "mask.nii.gz", block_levels(), read_volume(tmp_path / "a.nii.gz"))
    mask = nib.load(tmp_path / "mask.nii.gz").header
    assert mask.get_data_dtype() == np.uint8
    for field in ("dim", "pixdim", "qform_code", "sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z"):
        np.testing.assert_array_equal(mask[field], scan[field], err_msg=field)
    for field in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"):
        np.testing.assert_array_equal(mask[field], scan[field], err_msg=field)


def test_a_file_without_orientation_is_read_as_stored_and_warned_about(tmp_path: Path) -> None:
    image = nib.Nifti1Image(SCAN.T, None)
    image.header.set_zooms((2, 2, 4))
    image.header["qform_code"] = image.header["sform_code"] = 0
    (tmp_path / "a.nii").write_bytes(image.to_bytes())
    volume = read_volume(tmp_path / "a.nii")
    assert (volume.voxels == SCAN[:, ::-1, ::-1]).all()  # right, anterior, superior turned to LPS
    assert "no orientation" in volume.warnings[0]


def test_the_same_mask_gives_the_same_bytes(tmp_path: Path) -> None:
    scan = read_volume(save_nifti(tmp_path / "a.nii.gz", SCAN))
    for name in ("one.nii.gz", "two.nii.gz"):
        write_labels(tmp_path / name, block_levels(), scan)
    assert (tmp_path / "one.nii.gz").read_bytes() == (tmp_path / "two.nii.gz").read_bytes()


def test_a_written_volume_reads_back_whole(tmp_path: Path) -> None:
    write_volume(tmp_path / "a.nii.gz", SCAN, oblique(10))
    volume = read_volume(tmp_path / "a.nii.gz")
    assert (volume.voxels == SCAN).all()
    np.testing.assert_allclose(volume.affine, oblique(10), rtol=1e-5, atol=1e-6)


def test_labels_may_be_empty_but_not_fractional(tmp_path: Path) -> None:
    write_volume(tmp_path / "empty.nii.gz", np.zeros((3, 4, 5), np.uint8), np.diag([-1, -1, 1, 1]))
    assert not read_labels(tmp_path / "empty.nii.gz").voxels.any()
    write_volume(tmp_path / "soft.nii.gz", np.full((3, 4, 5), 0.5, np.float32), np.diag([-1, -1, 1, 1]))
    with pytest.raises(VolumeError, match=r"soft.nii.gz.*whole numbers"):
        read_labels(tmp_path / "soft.nii.gz")


def broken_header(**fields: object) -> bytes:
    image = nib.Nifti1Image(SCAN.T, np.diag([-2.0, -2.0, 4.0, 1.0]))
    raw = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    raw[:348] = header.structarr.tobytes()
    return bytes(raw)


def nifti(voxels: np.ndarray) -> bytes:
    return nib.Nifti1Image(voxels, np.diag([-2.0, -2.0, 4.0, 1.0])).to_bytes()


NAN = np.where(SCAN == -1000, np.nan, SCAN).astype(np.float32)
PIXDIM = np.array([1, 2, 2, 4, 0, 0, 0, 0], np.float32)
BAD = {
    "empty file": (b"", "empty"),
    "text": (b"patient name,age\n" * 50, "no NIfTI header"),
    "truncated gz": (gzip.compress(nifti(SCAN.T))[:-400], "cut off or damaged"),
    "garbage in gz": (gzip.compress(nifti(SCAN.T))[:50] + b"\0" * 500, "cut off or damaged"),
    "truncated plain": (nifti(SCAN.T)[:-100], "the header promises"),
    "header alone": (nifti(SCAN.T)[:348], "the header promises"),
    "2D image": (nifti(SCAN[3].T), "2D image of 56 x 48"),
    "several volumes": (nifti(np.stack([SCAN.T, SCAN.T], -1)), "4D image of 56 x 48 x 20 x 2"),
    "NaN": (nifti(NAN.T), "1 voxels are NaN or infinite"),
    "infinity": (nifti(np.where(np.isnan(NAN), np.inf, NAN).T), "1 voxels are NaN or infinite"),
    "constant": (nifti(np.full((5, 6, 7), 40, np.int16)), "every voxel is 40"),
    "complex": (nifti(np.ones((5, 6, 7), np.complex64)), "voxels of type complex64"),
    "colour": (nifti(np.zeros((5, 6, 7), [("R", "u1"), ("G", "u1"), ("B", "u1")])), "voxels of type"),
    "zero spacing": (broken_header(pixdim=PIXDIM * [1, 0, 1, 1, 0, 0, 0, 0]), "spacing 0 x 2 x 4 mm"),
    "zero slice spacing": (broken_header(pixdim=PIXDIM * 0, qform_code=1, sform_code=0), "spacing 0 x 0 x 0 mm"),
    "absurd spacing": (broken_header(pixdim=PIXDIM * 1000), "expected 0.05 to 50 mm"),
    "absurd affine": (broken_header(srow_x=[-2000, 0, 0, 0], sform_code=1), "spacing 2000 x 2 x 4 mm"),
    "NaN affine": (broken_header(srow_x=[np.nan, 0, 0, 0], sform_code=1), "spacing nan"),
    "flat affine": (
        broken_header(srow_x=[-2, -2, 0, 0], srow_y=[-2, -2, 0, 0], sform_code=1),
        "axes are not independent",
    ),
    "bad type code": (broken_header(datatype=77), "header is damaged"),
    "negative size": (broken_header(dim=[3, 56, -48, 20, 1, 1, 1, 1]), ""),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_refused_with_one_line_that_names_it(tmp_path: Path, kind: str) -> None:
    content, reason = BAD[kind]
    path = tmp_path / "CASE_0000.nii.gz"
    path.write_bytes(content)
    with pytest.raises(VolumeError) as caught:
        read_volume(path)
    message = str(caught.value)
    assert str(path) in message
    assert reason in message
    assert "\n" not in message


def test_intensities_without_air_are_warned_about(tmp_path: Path) -> None:
    scan = read_volume(save_nifti(tmp_path / "a.nii.gz", np.maximum(SCAN, 0)))
    assert "Hounsfield" in scan.warnings[0]
    assert not read_volume(save_nifti(tmp_path / "b.nii.gz", SCAN)).warnings


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.nii.gz", tmp_path):
        with pytest.raises(VolumeError, match="cannot be read"):
            read_volume(path)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "mask.nii.gz"
    target.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(target, b"new content")
    assert target.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["mask.nii.gz"]


def test_real_scans_keep_their_geometry(tmp_path: Path, real_scans: Path) -> None:
    for name in ("TS_0001", "TS_0002"):
        scan = read_volume(real_scans / f"{name}_0000.nii.gz")
        labels = read_labels(real_scans / f"{name}.nii.gz")
        write_labels(tmp_path / "mask.nii.gz", labels.voxels, scan)
        ours, theirs = nib.load(tmp_path / "mask.nii.gz"), nib.load(real_scans / f"{name}.nii.gz")
        assert (np.asarray(ours.dataobj) == np.asarray(theirs.dataobj)).all()
        np.testing.assert_array_equal(ours.affine, nib.load(real_scans / f"{name}_0000.nii.gz").affine)


def test_a_volume_without_its_voxels_takes_a_mask_all_the_same(tmp_path: Path) -> None:
    scan = read_volume(save_nifti(tmp_path / "scan.nii.gz", SCAN))
    empty = scan.without_voxels()
    assert (empty.shape, empty.spacing) == (scan.shape, scan.spacing)
    assert empty.voxels.base is not None
    assert empty.voxels.base.nbytes <= 8
    for name, place in (("a.nii.gz", scan), ("b.nii.gz", empty)):
        write_labels(tmp_path / name, block_levels(), place)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
