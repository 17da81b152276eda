"""What a phantom suffers from: switches, and how often each comes in the parts of a cohort."""

from dataclasses import dataclass, replace

from train.phantom.body import stream

KIDNEYS = ("left_kidney", "right_kidney")


@dataclass(frozen=True)
class Disease:
    """Switches. ``lesions`` (tumours) and ``cysts`` name organs; ``missing`` organs were never there, ``resected`` were removed.

    ``ascites`` is the depth in mm of the fluid between wall and organs, 0 for none; ``effusion`` the side(s) of pleural
    fluid. ``hydronephrosis`` names kidneys. ``implants`` are of metal and make streaks.
    """

    lesions: tuple[str, ...] = ()
    cysts: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    enlarged_spleen: bool = False
    fatty_liver: bool = False
    resected: tuple[str, ...] = ()
    hydronephrosis: tuple[str, ...] = ()
    horseshoe_kidney: bool = False
    gallstones: bool = False
    ascites: float = 0.0
    effusion: tuple[str, ...] = ()
    stents: tuple[str, ...] = ()
    implants: tuple[str, ...] = ()

    CAN_MISS = ("gallbladder", "left_kidney", "right_kidney", "spleen")
    CAN_HAVE = ("liver", "right_kidney", "left_kidney", "spleen", "pancreas")
    MOST_ASCITES = 30.0

    def __post_init__(self) -> None:
        for what, names, allowed in (
            ("lesions", self.lesions, self.CAN_HAVE),
            ("cysts", self.cysts, self.CAN_HAVE),
            ("missing", self.missing, self.CAN_MISS),
            ("resected", self.resected, self.CAN_MISS),
            ("hydronephrosis", self.hydronephrosis, KIDNEYS),
            ("effusion", self.effusion, ("left", "right")),
            ("stents", self.stents, ("aortic", "biliary")),
            ("implants", self.implants, ("hip", "spine")),
        ):
            unknown = set(names) - set(allowed)
            if unknown:
                raise ValueError(f"{what}: {', '.join(sorted(unknown))} is none of {', '.join(allowed)}")
        if not 0 <= self.ascites <= self.MOST_ASCITES:
            raise ValueError(f"ascites: {self.ascites} mm is not between 0 and {self.MOST_ASCITES:g}")
        self._check_absent()

    def _check_absent(self) -> None:
        twice = set(self.missing) & set(self.resected)
        if twice:
            raise ValueError(f"resected: {', '.join(sorted(twice))} is missing already")
        ill = {*self.lesions, *self.cysts, *self.hydronephrosis, *(("gallbladder",) if self.gallstones else ())}
        ill |= {"spleen"} if self.enlarged_spleen else set()
        ill |= set(KIDNEYS) if self.horseshoe_kidney else set()
        gone = ill & set(self.absent)
        if gone:
            raise ValueError(f"disease of an absent organ: {', '.join(sorted(gone))}")

    @property
    def absent(self) -> tuple[str, ...]:
        """Organs that the phantom does not have, for whatever reason."""
        return (*self.missing, *self.resected)


@dataclass(frozen=True)
class LesionTissue:
    """A tissue id dealt to one lesion: the organ it counts as and what it is (see appearance.lesion_hu)."""

    organ: str
    kind: str


# Chance of each finding in the unlabelled cases of FLARE22 (disease of liver, kidney, spleen and pancreas). Not
# epidemiology: every finding has to come often enough to be learned from and scored.
_HEALTHY = 0.25
_LESIONS = {"liver": 0.35, "right_kidney": 0.14, "left_kidney": 0.14, "spleen": 0.1, "pancreas": 0.25}
_CYSTS = {"liver": 0.2, "right_kidney": 0.22, "left_kidney": 0.22, "spleen": 0.06, "pancreas": 0.15}
_RESECTED = {"gallbladder": 0.09, "spleen": 0.04, "left_kidney": 0.025, "right_kidney": 0.025}


def draw_disease(seed: int, *, every: bool) -> Disease:
    """What the case of ``seed`` has: with ``every`` any disease, else of the pancreas only.

    METHOD's trap: FLARE22's labelled cases have disease of the pancreas, the unlabelled ones of other organs too.
    """
    return _any(seed) if every else _of_the_pancreas(seed)


def _of_the_pancreas(seed: int) -> Disease:
    u = stream(seed, "disease").random(3)
    return Disease(
        lesions=("pancreas",) if u[0] < 0.45 else (),
        cysts=("pancreas",) if u[1] < 0.25 else (),
        missing=("gallbladder",) if u[2] < 0.06 else (),
        stents=("biliary",) if u[0] < 0.1 else (),
    )


def _any(seed: int) -> Disease:
    r = stream(seed, "disease")
    if r.random(3)[2] < _HEALTHY:
        return Disease()

    def some(chances: dict[str, float]) -> tuple[str, ...]:
        draws = r.random(len(chances))
        return tuple(name for (name, p), u in zip(chances.items(), draws, strict=True) if u < p)

    lesions, cysts, resected = some(_LESIONS), some(_CYSTS), some(_RESECTED)
    if set(KIDNEYS) <= set(resected):
        resected = tuple(name for name in resected if name != "right_kidney")
    born_without = some({"gallbladder": 0.02, "left_kidney": 0.015, "right_kidney": 0.015, "spleen": 0.01})
    other_kidney = set(resected) & set(KIDNEYS)
    missing = tuple(
        n for n in born_without[:1] if n not in resected and not (n in KIDNEYS and other_kidney)
    )  # one at most, and never both kidneys
    water = some({"left_kidney": 0.07, "right_kidney": 0.07})
    u = r.random(8)
    drawn = Disease(
        fatty_liver=bool(u[0] < 0.2),
        ascites=round(float(r.uniform(4, 24)), 1) if u[1] < 0.12 else 0.0,
        effusion=some({"left": 0.09, "right": 0.12}),
        stents=some({"aortic": 0.05, "biliary": 0.05}),
        implants=some({"hip": 0.03, "spine": 0.03}),
        missing=missing,
        resected=resected,
    )
    present = [o for o in (*Disease.CAN_HAVE, "gallbladder") if o not in drawn.absent]
    return replace(
        drawn,
        lesions=tuple(o for o in lesions if o in present),
        cysts=tuple(o for o in cysts if o in present),
        hydronephrosis=tuple(o for o in water if o in present),
        horseshoe_kidney=bool(u[2] < 0.03) and set(KIDNEYS) <= set(present),
        enlarged_spleen=bool(u[3] < 0.12) and "spleen" in present,
        gallstones=bool(u[4] < 0.13) and "gallbladder" in present,
    )
