"""FLARE's own command on the built cpu image.

Needs that image: ORGANS_IMAGE names it and CONTAINER_ENGINE the command that runs it (docker, podman); .ci/run sets both.
"""

import json
import os
import shlex
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from inference.bundle import write_bundle
from tests.conftest import make_bundle
from train.phantom import Recipe, write_dataset

IMAGE = os.environ.get("ORGANS_IMAGE", "")
ENGINE = shlex.split(os.environ.get("CONTAINER_ENGINE", "docker"))
# FLARE22 gives 64 MB of /dev/shm; no network, one CPU, a read-only root and nowhere else to write are our own, stricter terms.
TERMS = ("--rm", "--network", "none", "--cpus", "1", "--shm-size", "64m", "--read-only", "--tmpfs", "/tmp:ro")
PREDICT = ("/bin/bash", "-c", "sh predict.sh")
MEGABYTE = 1_000_000

pytestmark = pytest.mark.skipif(not IMAGE, reason="no image was built: ORGANS_IMAGE is not set")


def container(*options: str, command: tuple[str, ...] = PREDICT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ENGINE, "run", *TERMS, *options, IMAGE, *command], capture_output=True, text=True, check=False
    )


def mounts(inputs: Path, outputs: Path, root: str = "/workspace") -> tuple[str, ...]:
    return "-v", f"{inputs}:{root}/inputs:ro", "-v", f"{outputs}:{root}/outputs"


def inside(code: str) -> str:
    """What a Python program in the container prints."""
    done = container(command=("python3", "-c", code))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one phantom on a coarse grid, stored as scanners do (LPS)."""
    root = tmp_path_factory.mktemp("flare")
    write_dataset(root, 0, 0, 1, seed=199, recipe=Recipe(spacing=(5.0, 3.0, 3.0)))
    folder = root / "inputs"
    folder.mkdir()
    (root / "imagesTs" / "FLARE22_Ts_0001_0000.nii.gz").rename(folder / "CASE_0000.nii.gz")
    return folder


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """Folder that anybody may write to and that holds another case's mask already."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    folder.chmod(0o777)
    other = folder / "OTHER.nii.gz"
    other.write_bytes(b"another case's mask")
    os.utime(other, (1_600_000_000, 1_600_000_000))
    return folder


@pytest.fixture(scope="module")
def mask(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of CASE.nii.gz."""
    folder = tmp_path_factory.mktemp("mask")
    done = container(*mounts(inputs, folder))
    assert done.returncode == 0, done.stderr
    return (folder / "CASE.nii.gz").read_bytes()


@pytest.mark.parametrize("user", [(), ("--user", "12345")], ids=["root", "user 12345"])
def test_the_organisers_command_writes_one_mask_on_the_scans_grid(
    user: tuple[str, ...], inputs: Path, outputs: Path
) -> None:
    done = container(*user, *mounts(inputs, outputs))
    assert done.returncode == 0, done.stderr
    scan, labels = nib.load(inputs / "CASE_0000.nii.gz"), nib.load(outputs / "CASE.nii.gz")
    assert labels.shape == scan.shape
    assert np.array_equal(labels.affine, scan.affine)
    for field in ("pixdim", "qform_code", "sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"):
        assert np.array_equal(labels.header[field], scan.header[field]), field
    found = np.unique(np.asanyarray(labels.dataobj))
    assert labels.get_data_dtype() == np.uint8
    assert found.max() <= 13
    assert len(found) > 1, "the mask is empty"


def test_nothing_else_is_left_in_the_output_folder(inputs: Path, outputs: Path) -> None:
    assert container(*mounts(inputs, outputs)).returncode == 0
    assert sorted(path.name for path in outputs.iterdir()) == ["CASE.nii.gz", "OTHER.nii.gz"]
    assert (outputs / "OTHER.nii.gz").read_bytes() == b"another case's mask"
    assert (outputs / "OTHER.nii.gz").stat().st_mtime == 1_600_000_000


def test_the_same_scan_gives_the_same_bytes(mask: bytes, inputs: Path, outputs: Path) -> None:
    assert container(*mounts(inputs, outputs)).returncode == 0
    assert (outputs / "CASE.nii.gz").read_bytes() == mask


def test_the_folders_may_be_mounted_at_the_root(mask: bytes, inputs: Path, outputs: Path) -> None:
    done = container(*mounts(inputs, outputs, root=""))
    assert done.returncode == 0, done.stderr
    assert (outputs / "CASE.nii.gz").read_bytes() == mask


def test_a_broken_scan_fails_alone(mask: bytes, inputs: Path, outputs: Path, tmp_path: Path) -> None:
    several = tmp_path / "several"
    several.mkdir()
    scan = (inputs / "CASE_0000.nii.gz").read_bytes()
    (several / "BROKEN_0000.nii.gz").write_bytes(scan[: len(scan) // 2])
    (several / "CASE_0000.nii.gz").write_bytes(scan)
    done = container(*mounts(several, outputs))
    assert done.returncode == 1
    assert "BROKEN_0000.nii.gz" in done.stderr
    assert sorted(path.name for path in outputs.iterdir()) == ["CASE.nii.gz", "OTHER.nii.gz"]
    assert (outputs / "CASE.nii.gz").read_bytes() == mask


def test_weights_with_a_wrong_hash_are_refused(inputs: Path, outputs: Path, tmp_path: Path) -> None:
    bundle = make_bundle()
    write_bundle(tmp_path / "weights", bundle)
    (tmp_path / "weights" / bundle.plan.model.file).write_bytes(bundle.model + b"\0")
    done = container("-v", f"{tmp_path / 'weights'}:/workspace/weights:ro", *mounts(inputs, outputs))
    assert done.returncode == 2
    assert "sha256" in done.stderr
    assert [path.name for path in outputs.iterdir()] == ["OTHER.nii.gz"]


def test_a_start_without_folders_says_what_is_missing() -> None:
    done = container()
    assert done.returncode == 2
    assert "/workspace/inputs" in done.stderr


def test_the_container_was_as_closed_as_it_was_told_to_be() -> None:
    """No network but the loop, 64 MB of shared memory, one CPU, no writable file: what the other tests ran under."""
    facts = json.loads(
        inside(
            "import json, os\n"
            "from inference.engine import available_cores\n"
            "shm = os.statvfs('/dev/shm')\n"
            "writable = [p for p in ('/', '/tmp', '/workspace', '/opt/venv') if not os.statvfs(p).f_flag & os.ST_RDONLY]\n"
            "print(json.dumps([os.listdir('/sys/class/net'), shm.f_blocks * shm.f_frsize, writable, available_cores()]))"
        )
    )
    assert facts == [["lo"], 64 * 2**20, [], 1]


def test_the_image_holds_neither_torch_nor_telemetry() -> None:
    absent = ("torch", "nnunetv2", "openvino_telemetry", "train", "pip")
    code = f"import importlib.util, openvino; print([n for n in {absent} if importlib.util.find_spec(n)])"
    assert inside(code).strip() == "[]"


def test_the_image_stays_under_900_megabytes() -> None:
    shown = subprocess.run(
        [*ENGINE, "image", "inspect", "--format", "{{.Size}}", IMAGE], capture_output=True, text=True, check=True
    )
    assert int(shown.stdout) < 900 * MEGABYTE
