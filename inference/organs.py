"""The thirteen abdominal organs of FLARE22: ids, names and NSD tolerances, once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Organ:
    """One organ of the FLARE22 label map.

    ``id`` is its value in a label map; ``name`` its snake_case name, the one that plan.json, the CSV files and the
    post-processing rules use; ``tolerance`` the NSD tolerance in mm of the challenge's evaluation.
    """

    id: int
    name: str
    tolerance: float

    @property
    def title(self) -> str:
        """The name as people write it: 'right adrenal gland'."""
        return self.name.replace("_", " ")


ORGANS: tuple[Organ, ...] = (
    Organ(1, "liver", 5.0),
    Organ(2, "right_kidney", 3.0),
    Organ(3, "spleen", 3.0),
    Organ(4, "pancreas", 5.0),
    Organ(5, "aorta", 2.0),
    Organ(6, "inferior_vena_cava", 2.0),
    Organ(7, "right_adrenal_gland", 2.0),
    Organ(8, "left_adrenal_gland", 2.0),
    Organ(9, "gallbladder", 2.0),
    Organ(10, "esophagus", 3.0),
    Organ(11, "stomach", 5.0),
    Organ(12, "duodenum", 7.0),
    Organ(13, "left_kidney", 3.0),
)

BACKGROUND = "background"

# The classes of a FLARE22 network in the order of its output channels.
CLASSES: tuple[str, ...] = (BACKGROUND, *(organ.name for organ in ORGANS))
