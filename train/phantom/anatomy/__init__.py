"""The organs and what lies around them, painted from the back of the scene to the front: ``build`` is the order."""

from train.phantom.anatomy import chest, kidneys, liver, pancreas, skeleton, stomach, trunk, vessels
from train.phantom.anatomy.scene import Scene

__all__ = ["Scene", "build"]


def build(scene: Scene) -> None:
    """Paint everything into the scene's canvas."""
    trunk.layers(scene)
    chest.lung_vessels(scene)
    chest.heart(scene)
    skeleton.skeleton(scene)
    trunk.muscles(scene)
    skeleton.pelvis(scene)
    trunk.breasts(scene)
    trunk.arms(scene)
    scene.gut.small_bowel()
    scene.gut.colon()
    stomach.stomach(scene)
    kidneys.place(scene)
    liver.liver(scene)
    scene.gut.press_into_liver(scene.liver.holes[-1])
    liver.spleen(scene)
    kidneys.kidneys(scene)
    vessels.great_vessels(scene)
    trunk.crura(scene)
    pancreas.duodenum_and_pancreas(scene)
    chest.esophagus(scene)
    liver.gallbladder(scene)
    kidneys.adrenals(scene)
    vessels.small_vessels(scene)
