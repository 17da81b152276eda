"""The loop in the training image, as anybody.

Needs that image: ORGANS_TRAIN_IMAGE names it and CONTAINER_ENGINE the command that runs it (docker, podman).
"""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from inference.bundle import PLAN_NAME, read_bundle
from tests.test_loop import toy_settings
from train.phantom import Recipe, write_dataset

IMAGE = os.environ.get("ORGANS_TRAIN_IMAGE", "")
ENGINE = shlex.split(os.environ.get("CONTAINER_ENGINE", "docker"))

pytestmark = pytest.mark.skipif(not IMAGE, reason="no image was built: ORGANS_TRAIN_IMAGE is not set")


def container(*arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    terms = (
        "--rm",
        "--network",
        "none",
        "--shm-size",
        "64m",
        "--user",
        "12345:12345",
        "--read-only",
        "--tmpfs",
        "/tmp",
    )
    return subprocess.run([*ENGINE, "run", *terms, *options, IMAGE, *arguments], capture_output=True, text=True)


def test_the_loop_runs_in_the_image_as_any_user_without_a_network(tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    write_dataset(data, 5, 2, 0, seed=5, recipe=Recipe(spacing=(10.0, 8.0, 8.0)))
    run.mkdir()
    run.chmod(0o777)
    settings = toy_settings(training__epochs=1, loop__iterations=1)
    mounts = ("-v", f"{data}:/data:ro", "-v", f"{run}:/run", "-e", "IMAGE_DIGEST=sha256:abc")
    done = container("loop", "--data", "/data", "--out", "/run", *settings, options=mounts)
    assert done.returncode == 0, done.stderr
    assert read_bundle(run / "bundle").plan.provenance["command"].startswith("python -m train loop")
    (start,) = json.loads((run / "starts.json").read_text())
    assert start["image"]["digest"] == "sha256:abc"
    assert start["image"]["version"] == start["commit"]
    assert {"python", "torch", "nnunetv2", "numpy", "onnx", "ray"} == set(start["versions"])
    assert "not installed" not in start["versions"].values()
    recorded = json.loads((run / "settings.json").read_text())
    assert (recorded["training"]["seed"], recorded["training"]["epochs"]) == (0, 1)
    assert (run / "bundle" / PLAN_NAME).stat().st_uid == 12345
    shown = container("status", "/run", options=("-v", f"{run}:/run:ro"))
    assert "/run: done" in shown.stdout


def test_the_image_reports_to_nobody() -> None:
    code = "import os; print(os.environ['RAY_USAGE_STATS_ENABLED'], os.environ['ORT_DISABLE_TELEMETRY'])"
    done = container("-c", code, options=("--entrypoint", "python3"))
    assert done.stdout.split() == ["0", "1"]
