"""Every scan once onto the working grid, with the container's own resampler, and what the labelled set teaches.

A prepared case is done when its files exist; they appear whole. So nnU-Net resamples nothing, and training, pseudo-labels
and the container see the same voxels (paper section 2.1).
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from inference.organs import ORGANS
from inference.resample import labels_to_working_grid, to_working_grid, working_affine, working_shape
from inference.volume import Array, Labels, Shape, Spacing, Volume, atomic_write, read_labels, read_volume, write_volume
from train.config import Config
from train.dataset import Case
from train.intensities import (
    Shares,
    intensities,
    intensities_of_training,
    read_intensities,
    shares_of_case,
    write_intensities,
)
from train.processes import process_pool, worker_count
from train.workspace import Workspace

log = logging.getLogger(__name__)

FIRST_AUXILIARY = len(ORGANS) + 1
INT16 = np.iinfo(np.int16)
WHOLE = 0.1  # share of an organ's cases that have to show a whole one, for the others not to count
DIED = "a process that prepared scans died, most likely for lack of memory; lower prepare.workers"


class PrepareError(ValueError):
    """A case that cannot be prepared. The message names the file, what was found and what was expected."""


def prepare(cases: Sequence[Case], config: Config, workspace: Workspace) -> tuple[str, ...]:
    """Bring ``cases`` onto the working grid, several at once. Returns the ids that are ready, sorted.

    A case whose files exist is kept. A case that fails is named in the log and in ``workspace.set_aside``; the others go on.
    The first call of a run needs labelled cases, to learn the range of HU from, or a training to start from: nothing is
    prepared before ``workspace.intensities`` exists. Raises PrepareError, IntensityError.
    """
    _settle_intensities(cases, config, workspace)
    todo = [case for case in cases if not is_prepared(case, workspace)]
    log.info("prepare: %d of %d cases to do", len(todo), len(cases))
    for folder in (workspace.image, workspace.label, workspace.training_label, workspace.volumes, workspace.set_aside):
        folder("case").parent.mkdir(parents=True, exist_ok=True)
    failed = _prepare_all(todo, config, workspace)
    for case, reason in sorted(failed.items()):
        log.warning("prepare: %s is set aside: %s", case, reason)
    return tuple(sorted(case.id for case in cases if case.id not in failed))


def is_prepared(case: Case, workspace: Workspace) -> bool:
    """Whether all files of a prepared case exist; its image is written last."""
    return workspace.image(case.id).exists()


def prepare_case(case: Case, config: Config, workspace: Workspace) -> None:
    """Write one case on the working grid, within the run's range of HU. Raises VolumeError or PrepareError naming the file."""
    scan = read_volume(case.image)
    spacing = config.prepare.spacing
    target = working_shape(scan.shape, scan.spacing, spacing)
    affine = exact_spacing(working_affine(scan.affine, scan.shape, target), spacing)
    if case.label is not None:
        labels = _read_matching(case.label, scan, case.image, len(ORGANS))
        atomic_write(workspace.volumes(case.id), json.dumps(organ_volumes(labels, scan.spacing), indent=1).encode())
        write_volume(workspace.label(case.id), labels_to_working_grid(labels, target), affine)
        if case.auxiliary is not None:
            auxiliary = _read_matching(case.auxiliary, scan, case.image, len(config.classes) - 1)
            merged = with_auxiliary(labels, auxiliary)
            write_volume(workspace.training_label(case.id), labels_to_working_grid(merged, target), affine)
    range_hu = clip_range(workspace)
    voxels = to_working_grid(scan.voxels, target, range_hu, config.prepare.anti_aliasing)
    write_volume(workspace.image(case.id), np.clip(voxels, INT16.min, INT16.max).astype(np.int16), affine)


def clip_range(workspace: Workspace) -> tuple[float, float]:
    """HU that scans are clipped to before they are resampled. Raises IntensityError."""
    found = read_intensities(workspace.intensities)
    return found["percentile_00_5"], found["percentile_99_5"]


def with_auxiliary(organs: Labels, auxiliary: Labels) -> Labels:
    """Label map (z, y, x) of ``organs``, and of the classes of ``auxiliary`` that are no organs where there is no organ."""
    use = (organs == 0) & (auxiliary >= FIRST_AUXILIARY)
    return np.where(use, auxiliary, organs).astype(np.uint8)


def organs_alone(labels: Labels) -> Labels:
    """``labels`` with auxiliary classes as background; itself where it has none."""
    auxiliary = labels >= FIRST_AUXILIARY
    return np.where(auxiliary, 0, labels).astype(np.uint8) if auxiliary.any() else labels


def exact_spacing(affine: Array, spacing: Spacing) -> Array:
    """``affine`` with its axes scaled to exactly ``spacing`` mm (z, y, x).

    A grid has whole voxels, so n / m voxels of a scan are only nearly the working spacing. The prepared file says the
    exact one, as the container's network is told, and nnU-Net sees nothing to resample.
    """
    scaled = affine.copy()
    lengths = np.linalg.norm(scaled[:3, :3], axis=0)
    scaled[:3, :3] *= np.asarray(spacing[::-1]) / lengths
    return scaled


def organ_volumes(labels: Labels, spacing: Spacing) -> dict[str, dict[str, float | bool]]:
    """Volume in mm3 of every organ present, and whether the scan's first or last slice cuts it."""
    counts = np.bincount(labels.ravel(), minlength=256)
    ends = set(np.unique(labels[[0, -1]]).tolist())
    voxel = float(np.prod(spacing))
    return {
        organ.name: {"mm3": float(counts[organ.id]) * voxel, "cut": organ.id in ends}
        for organ in ORGANS
        if counts[organ.id]
    }


def organ_minima(volumes: Iterable[Mapping[str, Mapping[str, float | bool]]]) -> dict[str, float]:
    """Smallest volume in mm3 of each organ over the labelled cases (paper section 2.3, first rule).

    An organ that the scan cuts off says nothing about how small a whole one is, so it does not count; but it does where
    hardly any case shows a whole one (``WHOLE``). Those few are as long as the trunk, and the rule would take an
    esophagus whose mask ends a slice before the scan does for a fragment of theirs. An organ that no case has is left
    out, and the rule skips it.
    """
    whole: dict[str, list[float]] = {organ.name: [] for organ in ORGANS}
    cut: dict[str, list[float]] = {organ.name: [] for organ in ORGANS}
    for case in volumes:
        for name, entry in case.items():
            (cut if entry["cut"] else whole)[name].append(float(entry["mm3"]))
    minima = {}
    for organ in ORGANS:
        found, rest = whole[organ.name], cut[organ.name]
        if len(found) < WHOLE * (len(found) + len(rest)):
            found = found + rest
        if found:
            minima[organ.name] = min(found)
    return minima


def write_organ_minima(cases: Sequence[str], workspace: Workspace) -> dict[str, float]:
    """Learn the minima from the prepared labelled ``cases`` and write them. Returns them, mm3 by organ."""
    minima = organ_minima(json.loads(workspace.volumes(case).read_text(encoding="utf-8")) for case in cases)
    atomic_write(workspace.organ_minima, (json.dumps(minima, indent=1) + "\n").encode())
    return minima


def _settle_intensities(cases: Sequence[Case], config: Config, workspace: Workspace) -> None:
    """Measure the organs' HU, or take them over from the training that this one starts from; what is there stays."""
    if workspace.intensities.exists():
        return
    if any(is_prepared(case, workspace) for case in cases):
        raise PrepareError(
            f"{workspace.prepared}: holds scans that were prepared before their HU were measured ({workspace.intensities.name}); "
            "expected a new folder for the run"
        )
    workspace.intensities.parent.mkdir(parents=True, exist_ok=True)
    if config.training.start_from:
        found = intensities_of_training(Path(config.training.start_from))
    else:
        found = intensities(_measured([case for case in cases if case.label is not None], config))
    write_intensities(workspace.intensities, found)


def _measured(cases: Sequence[Case], config: Config) -> Iterable[Shares]:
    """HU of the organs of each case, several at once; of one that cannot be read nothing, which preparing it will tell."""
    if not cases:
        return
    with process_pool(worker_count(config.prepare.workers, len(cases))) as pool:
        jobs = [pool.submit(shares_of_case, case) for case in cases]
        for count, job in enumerate(jobs, 1):  # in the cases' order: sums of floats depend on theirs
            try:
                yield job.result()
            except BrokenProcessPool as error:
                raise PrepareError(DIED) from error
            except Exception as error:
                log.debug("intensities: %s", error)
            if count % 10 == 0 or count == len(cases):
                log.info("intensities: %d of %d", count, len(cases))


def _prepare_all(cases: Sequence[Case], config: Config, workspace: Workspace) -> dict[str, str]:
    """Prepare cases in processes. Returns the reason of each that failed, by id."""
    if not cases:
        return {}
    failed: dict[str, str] = {}
    with process_pool(worker_count(config.prepare.workers, len(cases))) as pool:
        jobs = {pool.submit(prepare_case, case, config, workspace): case.id for case in cases}
        for count, job in enumerate(as_completed(jobs), 1):
            case = jobs[job]
            try:
                job.result()
                workspace.set_aside(case).unlink(missing_ok=True)
            except BrokenProcessPool as error:
                raise PrepareError(DIED) from error
            except OSError:
                raise  # a full or unwritable disk is not the case's fault, and the next one would fail too
            except Exception as error:
                failed[case] = str(error)
                atomic_write(workspace.set_aside(case), f"{error}\n".encode())
            if count % 10 == 0 or count == len(cases):
                log.info("prepare: %d of %d", count, len(cases))
    return failed


def _read_matching(path: Path, scan: Volume, image: Path, highest: int) -> Labels:
    """A label map on its scan's grid, with no value above ``highest``."""
    labels = read_labels(path)
    if labels.shape != scan.shape:
        raise PrepareError(
            f"{path}: {_shape(labels.shape)} voxels (z, y, x); expected {_shape(scan.shape)} as {image.name}"
        )
    if not np.allclose(labels.affine, scan.affine, atol=0.1):
        raise PrepareError(f"{path}: lies elsewhere in space than {image.name}; expected the same affine")
    found = int(labels.voxels.max())
    if found > highest:
        raise PrepareError(f"{path}: label {found}; expected 0 to {highest}")
    return np.asarray(labels.voxels, np.uint8)


def _shape(shape: Shape) -> str:
    return " x ".join(str(n) for n in shape)
