"""The tissues a phantom is painted with, and what each means to a network: FLARE label, auxiliary class."""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from inference.organs import ORGANS

ORGAN_ID = {organ.name: organ.id for organ in ORGANS}

# Classes beside the 13 organs that a network learns and the export drops (PHANTOM: they keep vertebrae from being kidneys).
AUXILIARY: dict[str, int] = {"fat": 14, "muscle": 15, "bone": 16, "lung": 17, "bowel": 18, "heart_and_vessels": 19}


class Tissue(IntEnum):
    """What a voxel is made of. From LESION on, ids are dealt out per case (see pathology)."""

    AIR = 0
    SUBCUTANEOUS = 1
    FAT = 2
    MUSCLE = 3
    CORTICAL = 4
    SPONGY = 5
    LUNG = 6
    BOWEL_WALL = 7
    BOWEL_FLUID = 8
    STOOL = 9
    BOWEL_CONTRAST = 10
    BOWEL_GAS = 11
    MYOCARDIUM = 12
    RIGHT_HEART = 13
    LEFT_HEART = 14
    CANAL = 15
    DISC = 16
    PORTAL = 17
    VEIN = 18
    ARTERY = 19
    SINUS = 20
    TABLE = 21
    CARTILAGE = 22
    URINE = 23
    PELVIC = 24
    SKIN = 25
    MEDIASTINAL = 26  # fat above the diaphragm
    FOLDS = 27  # fluid between the folds of the small bowel
    PLAQUE = 28
    LIVER = 30
    LIVER_VESSEL = 31
    RIGHT_CORTEX = 32
    RIGHT_MEDULLA = 33
    SPLEEN = 34
    PANCREAS = 35
    DUCT = 36
    AORTA = 37
    CAVA = 38
    RIGHT_ADRENAL = 39
    LEFT_ADRENAL = 40
    GALLBLADDER = 41
    ESOPHAGUS_WALL = 42
    ESOPHAGUS_GAS = 43
    ESOPHAGUS_FLUID = 44
    STOMACH_WALL = 45
    STOMACH_CONTENT = 46
    STOMACH_GAS = 47
    DUODENUM_WALL = 48
    DUODENUM_CONTENT = 49
    DUODENUM_GAS = 50
    LEFT_CORTEX = 51
    LEFT_MEDULLA = 52
    AORTA_PLAQUE = 53
    STOMACH_FOOD = 54
    GALLBLADDER_WALL = 55
    METAL = 100
    ASCITES = 101
    EFFUSION = 102
    ATELECTASIS = 103
    STENT = 104
    LESION = 120


T = Tissue

ORGAN_TISSUES: dict[str, tuple[Tissue, ...]] = {
    "liver": (T.LIVER, T.LIVER_VESSEL),
    "right_kidney": (T.RIGHT_CORTEX, T.RIGHT_MEDULLA),
    "spleen": (T.SPLEEN,),
    "pancreas": (T.PANCREAS, T.DUCT),
    "aorta": (T.AORTA, T.AORTA_PLAQUE),
    "inferior_vena_cava": (T.CAVA,),
    "right_adrenal_gland": (T.RIGHT_ADRENAL,),
    "left_adrenal_gland": (T.LEFT_ADRENAL,),
    "gallbladder": (T.GALLBLADDER, T.GALLBLADDER_WALL),
    "esophagus": (T.ESOPHAGUS_WALL, T.ESOPHAGUS_GAS, T.ESOPHAGUS_FLUID),
    "stomach": (T.STOMACH_WALL, T.STOMACH_CONTENT, T.STOMACH_FOOD, T.STOMACH_GAS),
    "duodenum": (T.DUODENUM_WALL, T.DUODENUM_CONTENT, T.DUODENUM_GAS),
    "left_kidney": (T.LEFT_CORTEX, T.LEFT_MEDULLA),
}

LUMEN = (T.BOWEL_FLUID, T.FOLDS, T.STOOL, T.BOWEL_CONTRAST, T.BOWEL_GAS)
BOWEL = (T.BOWEL_WALL, *LUMEN)
GAS = (T.AIR, T.LUNG, T.BOWEL_GAS, T.ESOPHAGUS_GAS, T.STOMACH_GAS, T.DUODENUM_GAS)

_AUXILIARY_TISSUES: dict[str, tuple[Tissue, ...]] = {
    "fat": (T.SUBCUTANEOUS, T.FAT, T.MEDIASTINAL, T.SINUS, T.SKIN, T.URINE, T.PELVIC, T.ASCITES, T.STENT),
    "muscle": (T.MUSCLE, T.DISC, T.CARTILAGE),
    "bone": (T.CORTICAL, T.SPONGY, T.CANAL, T.METAL),
    "lung": (T.LUNG, T.EFFUSION, T.ATELECTASIS),
    "bowel": BOWEL,
    "heart_and_vessels": (T.MYOCARDIUM, T.RIGHT_HEART, T.LEFT_HEART, T.PORTAL, T.VEIN, T.ARTERY, T.PLAQUE),
}


def label_table(lesions: dict[int, str]) -> NDArray[np.uint8]:
    """FLARE label of every tissue id; ``lesions`` names the organ that each id from LESION on belongs to."""
    table = np.zeros(256, np.uint8)
    for name, tissues in ORGAN_TISSUES.items():
        table[list(tissues)] = ORGAN_ID[name]
    for tissue, name in lesions.items():
        table[tissue] = ORGAN_ID[name]
    return table


def auxiliary_table(lesions: dict[int, str]) -> NDArray[np.uint8]:
    """As ``label_table`` with the rest of the body in the classes of AUXILIARY; 0 is air and table."""
    table = label_table(lesions)
    for name, tissues in _AUXILIARY_TISSUES.items():
        table[list(tissues)] = AUXILIARY[name]
    return table
