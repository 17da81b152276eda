"""Synthetic abdominal CT with known labels of all 13 organs: seeded, at any grid. ``scan.generate`` is the main path."""

from train.phantom.anatomy import Disease
from train.phantom.canvas import Grid
from train.phantom.cohort import add_arguments, run, write_dataset
from train.phantom.scan import Phantom, generate
from train.phantom.tissue import AUXILIARY

__all__ = ["AUXILIARY", "Disease", "Grid", "Phantom", "add_arguments", "generate", "run", "write_dataset"]
