"""Docker or podman, by their command line: which one answers, the challenge's own command, and what an image says of itself."""

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What the organisers run in a container: predict.sh in the WORKDIR, under sh, started by the image's bash.
PREDICT = ("/bin/bash", "-c", "sh predict.sh")
ENGINES = ("docker", "podman")


class ContainerError(RuntimeError):
    """An engine or an image that cannot be used. The message says what was looked for."""


@dataclass(frozen=True)
class Mounts:
    """The two folders a container sees; ``read_only``: it cannot write to its inputs."""

    inputs: Path
    outputs: Path
    read_only: bool = False

    def options(self) -> list[str]:
        mode = ":ro" if self.read_only else ""
        return [
            "-v",
            f"{self.inputs.resolve()}:/workspace/inputs/{mode}",
            "-v",
            f"{self.outputs.resolve()}:/workspace/outputs/",
        ]


def find_engine() -> list[str]:
    """The command of the container engine: CONTAINER_ENGINE, which may carry words, else the first of docker and podman.

    Raises ContainerError where none answers to ``info``.
    """
    named = shlex.split(os.environ.get("CONTAINER_ENGINE", ""))
    candidates = [named] if named else [[name] for name in ENGINES if shutil.which(name)]
    for engine in candidates:
        if _succeeds([*engine, "info"]):
            return engine
    if named:
        raise ContainerError(
            f"CONTAINER_ENGINE is {shlex.join(named)!r}, and its `info` fails; expected docker or podman"
        )
    raise ContainerError("neither docker nor podman answers to `info`; CONTAINER_ENGINE names another command")


def inspect_image(engine: Sequence[str], image: str) -> dict[str, Any]:
    """What the engine knows of a local image: Config, Size and more. Raises ContainerError if it has no such image."""
    done = subprocess.run([*engine, "image", "inspect", image], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ContainerError(f"{image}: the engine has no such image ({last_line(done.stderr)})")
    facts: dict[str, Any] = json.loads(done.stdout)[0]
    return facts


def run_command(
    engine: Sequence[str], image: str, mounts: Mounts, options: Sequence[str] = (), command: Sequence[str] = PREDICT
) -> list[str]:
    """The organisers' `container run`, with further options before the image."""
    return [*engine, "container", "run", "--rm", *options, *mounts.options(), image, *command]


def remove_container(engine: Sequence[str], name: str) -> None:
    """Stop and remove a container; one that is gone already is no error."""
    subprocess.run([*engine, "rm", "-f", name], capture_output=True, check=False)


def last_line(text: str) -> str:
    """The last line of what a program wrote, which mostly says why it failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it wrote nothing"


def _succeeds(command: Sequence[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
