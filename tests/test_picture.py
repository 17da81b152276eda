import argparse
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from inference.organs import ORGANS
from train import picture
from train.picture import COLOURS, WINDOW, choose_planes, png_bytes, render

SHARED = Path(__file__).parents[2] / "shared"
SPACING = (4.0, 1.0, 0.5)

# Machado et al. 2009, severity 1: how linear RGB looks to a person without one kind of cone.
DEFICIENCIES = {
    "none": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


def patient() -> tuple[np.ndarray, np.ndarray]:
    """A box of tissue in air, (z, y, x): the liver on the patient's right in front, the spleen left behind, high up."""
    scan = np.full((20, 60, 80), -1000, np.int16)
    scan[:, 5:55, 5:75] = 40
    labels = np.zeros(scan.shape, np.uint8)
    labels[10:18, 10:30, 10:40] = 1
    labels[12:16, 40:50, 60:70] = 3
    return scan, labels


def lab(colour: str, deficiency: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of a colour as somebody with a colour vision deficiency sees it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(deficiency @ linear, 0, 1)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    ratio = to_xyz @ seen / (0.95047, 1.0, 1.08883)
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def axes_by_title(figure) -> dict:
    return {ax.get_title("right").split()[0]: ax for ax in figure.axes if ax.get_title("right")}


def texts(figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


@pytest.mark.parametrize("name", DEFICIENCIES)
def test_any_two_of_the_thirteen_colours_differ_for_every_kind_of_eye(name: str) -> None:
    seen = {organ.name: lab(COLOURS[organ.name], DEFICIENCIES[name]) for organ in ORGANS}
    # 2.3 is a just noticeable difference.
    least = 34 if name == "none" else 19
    for first, second in combinations(seen, 2):
        assert np.linalg.norm(seen[first] - seen[second]) > least, (first, second)


def test_the_patients_right_is_on_the_left_anterior_and_head_are_up() -> None:
    _, labels = patient()
    axial, coronal, sagittal = (plane.cut(labels) for plane in choose_planes([labels]))
    rows, columns = np.nonzero(axial == 1)
    spleen_rows, spleen_columns = np.nonzero(axial == 3)
    assert columns.max() < spleen_columns.min()
    assert rows.max() < spleen_rows.min()
    for cut in (coronal, sagittal):
        assert np.nonzero(cut)[0].min() == 2  # two empty slices above the liver's top
    assert [plane.letters for plane in choose_planes([labels])] == ["RLAP", "RLSI", "APSI"]


def test_the_cut_shows_as_many_organs_as_possible() -> None:
    labels = np.zeros((10, 10, 10), np.uint8)
    labels[1:9, 1:9, 1:3] = 1
    labels[6, 8, 8] = 7  # one voxel of adrenal decides between slices that show all of the liver
    axial, coronal, sagittal = choose_planes([labels])
    assert (axial.index, coronal.index) == (6, 8)
    assert sagittal.index == 2  # all of the liver or all of the adrenal: the one nearer to the middle


def test_without_organs_the_cuts_are_in_the_middle() -> None:
    assert [plane.index for plane in choose_planes([np.zeros((9, 5, 7), np.uint8)])] == [4, 2, 3]


def test_a_millimetre_is_as_long_in_every_plane_and_direction() -> None:
    scan, labels = patient()
    figure = render(scan, labels, SPACING)
    width, height = figure.get_size_inches()
    scales = []
    for ax in axes_by_title(figure).values():
        box = ax.get_position()
        rows, columns = ax.images[0].get_array().shape
        row, column = {"axial": (1.0, 0.5), "coronal": (4.0, 0.5), "sagittal": (4.0, 1.0)}[
            ax.get_title("right").split()[0]
        ]
        scales += [box.width * width / (columns * column), box.height * height / (rows * row)]
        assert ax.get_aspect() == row / column
    assert scales == pytest.approx([scales[0]] * 6)


def test_the_window_is_the_abdominal_one() -> None:
    figure = render(*patient(), SPACING)
    assert {ax.images[0].get_clim() for ax in axes_by_title(figure).values()} == {WINDOW}


def test_the_legend_gives_volumes_in_ml_and_with_a_reference_dsc() -> None:
    scan, labels = patient()
    reference = labels.copy()
    reference[labels == 1] = 0
    reference[10:18, 10:30, 10:25] = 1
    written = texts(render(scan, labels, SPACING))
    # 8 x 20 x 30 voxels of 2 mm3; the spleen's 400 voxels are 0.8 mL.
    assert written[written.index("liver") + 1] == "9.6"
    assert written[written.index("spleen") + 1] == "0.8"
    assert written[written.index("aorta") + 1] == "–"
    written = texts(render(scan, labels, SPACING, reference))
    assert written[written.index("liver") + 1 :][:3] == ["9.6", "4.8", "0.67"]


def test_a_reference_gets_its_own_row() -> None:
    scan, labels = patient()
    with_images = [ax for ax in render(scan, labels, SPACING, labels).axes if ax.images]
    assert len(with_images) == 6
    assert with_images[0].get_title("left") == "prediction, reference in white"
    assert with_images[3].get_title("left") == "reference"


def test_every_organ_is_drawn_in_its_colour() -> None:
    scan, labels = patient()
    figure = render(scan, labels, SPACING)
    drawn = axes_by_title(figure)["axial"].collections
    colours = {tuple(np.round(line[:3], 3)) for each in drawn for line in each.get_edgecolor()}
    assert {tuple(np.round(to_rgb(COLOURS[name]), 3)) for name in ("liver", "spleen")} <= colours


@pytest.mark.parametrize("shape", [(1, 30, 30), (200, 20, 20), (3, 3, 3)])
def test_slabs_columns_and_scans_of_air_can_be_drawn(shape: tuple[int, int, int]) -> None:
    figure = render(np.full(shape, -1000, np.int16), np.zeros(shape, np.uint8), (5.0, 0.7, 0.7))
    assert png_bytes(figure).startswith(b"\x89PNG")


def test_masks_of_another_shape_are_refused() -> None:
    scan, labels = patient()
    with pytest.raises(ValueError, match=r"a mask \(19, 60, 80\)"):
        render(scan, labels[1:], SPACING)


def save(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(voxels.T, affine), path)
    return path


def call(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    picture.add_arguments(parser)
    return picture.run(parser.parse_args([str(argument) for argument in arguments]))


def test_a_scan_gives_one_picture_however_it_is_stored(tmp_path: Path) -> None:
    scan, labels = patient()
    pictures = []
    for name, flip in (("LPS", slice(None)), ("RPS", slice(None, None, -1))):
        affine = np.diag([-0.5 if name == "LPS" else 0.5, -1.0, 4.0, 1.0])
        folder = tmp_path / name
        folder.mkdir()
        image = save(folder / "A_0000.nii.gz", scan[:, :, flip], affine)
        mask = save(folder / "A.nii.gz", labels[:, :, flip], affine)
        assert call(image, mask, "-o", folder / "new" / "A.png") == 0
        pictures.append((folder / "new" / "A.png").read_bytes())
    assert pictures[0] == pictures[1]


def test_a_mask_of_another_grid_is_refused_and_no_picture_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scan, labels = patient()
    affine = np.diag([-0.5, -1.0, 4.0, 1.0])
    image = save(tmp_path / "A_0000.nii.gz", scan, affine)
    assert call(image, save(tmp_path / "short.nii.gz", labels[1:], affine), "-o", tmp_path / "A.png") == 2
    assert "short.nii.gz: 80 x 60 x 19 voxels; expected 80 x 60 x 20" in caplog.text
    assert call(image, tmp_path / "none.nii.gz", "-o", tmp_path / "A.png") == 2
    assert "none.nii.gz: cannot be read" in caplog.text
    assert not (tmp_path / "A.png").exists()


def test_a_real_scan_is_cropped_to_the_patient(tmp_path: Path) -> None:
    folder = SHARED / "ct"
    if not folder.is_dir():
        pytest.skip("no real scans beside the repository")
    assert call(folder / "TS_0002_0000.nii.gz", folder / "TS_0002.nii.gz", "-o", tmp_path / "A.png") == 0
    assert (tmp_path / "A.png").stat().st_size > 100_000
