"""The shipped bundle: whole, small, and good on synthetic abdomens that its training never saw."""

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from inference.bundle import read_bundle
from inference.engine import load_engine
from inference.organs import CLASSES, ORGANS
from inference.pipeline import Options, Segmenter
from inference.volume import read_labels, read_volume, write_volume
from train.metrics import dice
from train.phantom import Phantom, generate
from train.phantom.canvas import Grid

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
# Training draws its bodies from seeds of 10,000,000 and more.
UNSEEN = (41, 43)


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    bundle = read_bundle(WEIGHTS)
    return Segmenter(bundle, load_engine(bundle, "cpu", precision="f32"))


def phantom(seed: int) -> Phantom:
    """A whole abdomen, 270 x 300 x 400 mm on a 5 x 2 x 2 mm grid."""
    return generate(seed, Grid((54, 150, 200), (5.0, 2.0, 2.0), (-130.0, -150.0, -200.0)))


def store(path: Path, body: Phantom) -> Path:
    write_volume(path, body.hu, np.diag([-body.spacing[2], -body.spacing[1], body.spacing[0], 1.0]))
    return path


def test_the_bundle_is_whole_and_small_and_knows_the_thirteen_organs() -> None:
    bundle = read_bundle(WEIGHTS)
    assert len(bundle.model) <= 35_000_000
    assert bundle.plan.classes == CLASSES
    assert set(bundle.plan.organ_minima_mm3) == set(CLASSES[1:])
    assert bundle.plan.provenance["command"].startswith("python -m train fit")


def test_unseen_synthetic_abdomens_are_segmented(tmp_path: Path, segmenter: Segmenter) -> None:
    scores = []
    for seed in UNSEEN:
        body = phantom(seed)
        found = segmenter.segment(read_volume(store(tmp_path / "scan.nii.gz", body))).labels
        scores.append([dice(body.labels == organ.id, found == organ.id) for organ in ORGANS])
    means = dict(zip(CLASSES[1:], np.mean(scores, axis=0).round(3).tolist()))
    assert np.mean(scores) >= 0.83, means
    assert means["liver"] >= 0.95, means


def test_eight_orientations_and_an_oblique_header_give_the_same_anatomy(tmp_path: Path, segmenter: Segmenter) -> None:
    segmenter = Segmenter(read_bundle(WEIGHTS), segmenter.engine, Options(step=0.9))  # ten scans: the quick step
    body = generate(UNSEEN[0], Grid((40, 110, 140), (6.0, 2.7, 2.7), (-110.0, -148.0, -190.0)))
    path = store(tmp_path / "scan.nii.gz", body)
    image = nib.load(path)
    first = segmenter.segment(read_volume(path)).labels
    affine = image.affine.copy()
    turn = np.array([[np.cos(0.2), -np.sin(0.2), 0], [np.sin(0.2), np.cos(0.2), 0], [0, 0, 1]])
    affine[:3, :3] = turn @ affine[:3, :3]
    images = [nib.Nifti1Image(np.asanyarray(image.dataobj), affine)]
    for number, signs in enumerate(itertools.product((1, -1), repeat=3)):
        order = list(itertools.permutations(range(3)))[number % 6]
        images.append(image.as_reoriented(np.array(list(zip(order, signs)))))
    for other in images:
        nib.save(other, path)
        labels = segmenter.segment(read_volume(path)).labels
        for organ in np.unique(first)[1:]:
            assert dice(first == organ, labels == organ) >= 0.99, (nib.aff2axcodes(other.affine), CLASSES[organ])


def test_real_scans_agree_with_their_machine_made_labels(real_scans: Path, segmenter: Segmenter) -> None:
    """Two patients train nothing; a gross error (flipped sides, a lost liver) shows all the same."""
    scan = read_volume(real_scans / "TS_0001_0000.nii.gz")
    truth = read_labels(real_scans / "TS_0001.nii.gz").voxels
    found = segmenter.segment(scan).labels
    for organ, least in (("liver", 0.75), ("right_kidney", 0.4), ("left_kidney", 0.4), ("spleen", 0.4)):
        index = CLASSES.index(organ)
        assert dice(truth == index, found == index) >= least, organ
