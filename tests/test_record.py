import argparse
from pathlib import Path

from train.record import command_words


def test_a_recorded_command_names_files_without_the_folders_they_lay_in(tmp_path: Path) -> None:
    arguments = argparse.Namespace(
        data=tmp_path / "scans",
        out=tmp_path / "run",
        config=tmp_path / "mine.toml",
        set=[f"training.start_from={tmp_path}/first/checkpoint_final.pth", "training.epochs=3"],
    )
    words = command_words("fit", arguments)
    assert words[:8] == ["python", "-m", "train", "fit", "--data", "scans", "--out", "run"]
    assert words[8:] == [
        "--config",
        "mine.toml",
        "--set",
        "training.start_from=checkpoint_final.pth",
        "--set",
        "training.epochs=3",
    ]
