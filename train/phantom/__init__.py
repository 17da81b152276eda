"""Synthetic abdominal CT with known labels of all 13 organs: seeded, at any grid. ``scan.generate`` is the main path."""

from train.phantom.artefact import Artefacts
from train.phantom.canvas import Grid
from train.phantom.cohort import Recipe, add_arguments, run, write_dataset
from train.phantom.disease import Disease
from train.phantom.scan import Phantom, generate
from train.phantom.tissue import AUXILIARY

__all__ = [
    "AUXILIARY",
    "Artefacts",
    "Disease",
    "Grid",
    "Phantom",
    "Recipe",
    "add_arguments",
    "generate",
    "run",
    "write_dataset",
]
