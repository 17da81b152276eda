"""What a run was started with: settings, command, versions, commit, image. So that anyone can start it again."""

import argparse
import datetime
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inference.volume import atomic_write
from train.config import Config, ConfigError, read_settings
from train.export import git_commit, package_versions
from train.workspace import Workspace

# Of the fixed sections, what may still change when a run is started again: it changes the pace, not the result.
PACE = ("workers", "threads", "device", "augmentation_workers", "checkpoint_every", "check_disk")
# Set by whoever starts the container (`-e IMAGE_DIGEST=...`) and by the image itself.
IMAGE_DIGEST, IMAGE_VERSION = "IMAGE_DIGEST", "IMAGE_VERSION"


def record_settings(config: Config, workspace: Workspace, fixed: Sequence[str]) -> None:
    """Write settings.json. Raises ConfigError when the folder holds a run with others in the sections ``fixed``."""
    if workspace.settings.exists():
        before, now = asdict(read_settings(workspace.settings)), asdict(config)
        for section in fixed:
            for key, value in before[section].items():
                if key not in PACE and now[section][key] != value:
                    found = now[section][key]
                    raise ConfigError(
                        f"{section}.{key} is {found!r}; {workspace.root} was started with {value!r}: use a new folder"
                    )
    workspace.root.mkdir(parents=True, exist_ok=True)
    atomic_write(workspace.settings, config.to_json().encode())


def record_start(words: Sequence[str], data: Path, workspace: Workspace) -> None:
    """Write provenance.json at the first start, and add every start to starts.json.

    ``words``: the command as anyone could repeat it, see ``command_words``.
    """
    now = datetime.datetime.now(datetime.UTC)
    command = shlex.join(words)
    made_with = {"versions": package_versions(), "commit": git_commit()}
    if not workspace.provenance.exists():
        origin = {"command": command, "data": data.resolve().name, "started": now.date().isoformat()}
        _write(workspace.provenance, origin | made_with)
    start = {
        "time": now.isoformat(timespec="seconds"),
        "command": command,
        "image": {"digest": os.environ.get(IMAGE_DIGEST), "version": os.environ.get(IMAGE_VERSION)},
        **made_with,
    }
    _write(workspace.starts, [*read_starts(workspace), start])


def read_starts(workspace: Workspace) -> list[dict[str, Any]]:
    """All starts of a run, the first one first."""
    if not workspace.starts.exists():
        return []
    starts: list[dict[str, Any]] = json.loads(workspace.starts.read_text(encoding="utf-8"))
    return starts


def note(facts: Mapping[str, Any], workspace: Workspace) -> None:
    """Add facts to the run's origin, which travels with its bundle."""
    recorded = json.loads(workspace.provenance.read_text(encoding="utf-8"))
    _write(workspace.provenance, recorded | dict(facts))


def command_words(name: str, arguments: argparse.Namespace) -> list[str]:
    """``python -m train NAME`` with its data, run and settings; folders by name, wherever they lay."""
    data, out = arguments.data.resolve().name, arguments.out.resolve().name
    words = ["python", "-m", "train", name, "--data", data, "--out", out]
    if arguments.config is not None:
        words += ["--config", arguments.config.name if arguments.config.is_absolute() else str(arguments.config)]
    for setting in arguments.set:
        key, _, value = setting.partition("=")
        # A bundle travels: it need not tell how somebody's folders are called.
        words += ["--set", f"{key}={Path(value).name}" if key.strip() == "training.start_from" else setting]
    return words


def _write(path: Path, content: object) -> None:
    atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())
