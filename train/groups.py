"""Scores by what a synthetic scan shows: disease, artefacts, contrast, extent; and organs with and without a finding.

What a case shows is read from its record (docs/formats.md, phantoms), and only what lies in the field of view counts: a
tumour that the scan's end leaves out is no tumour. A case is in every group that fits it, so groups overlap.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from inference.organs import ORGANS
from train.metrics import Figure, Score, summarise_values

CaseScores = Mapping[str, Mapping[str, Score]]

COHORT = "phantoms.json"
KIDNEYS = ("right_kidney", "left_kidney")
# What a lesion's kind is called here: necrosis is a tumour's core, thrombus lies around a stent.
LESIONS = {"necrosis": "tumour", "stone": "gallstones", "stent": "aortic stent", "thrombus": "aortic stent"}
SHORT_VIEWS = {"slab": "slab", "liver's top cut": "abdomen cut short", "upper abdomen": "abdomen cut short"}
NO_FINDING, ANY_FINDING, CUT, ABSENT, OUT_OF_VIEW = "no finding", "any finding", "cut", "absent", "out of view"
# Rows stand in this order; a name that is not here comes after, by the alphabet.
ORDER = (
    *("all cases", NO_FINDING, ANY_FINDING, "tumour", "cyst", "gallstones", "hydronephrosis", "horseshoe kidney"),
    *("enlarged spleen", "fatty liver", "ascites", "effusion", "aortic stent", "biliary stent"),
    *("resected organ", "missing organ", CUT, ABSENT, OUT_OF_VIEW),
    *("no artefact", "any artefact", "motion", "truncation", "low dose", "implant streaks", "clip streaks"),
    *("native", "arterial", "portal", "late", "whole abdomen", "abdomen cut short", "slab"),
)


class RecordError(ValueError):
    """Records that do not say what a case shows. The message names the file and the case."""


@dataclass(frozen=True)
class Contents:
    """What one case shows: the names of its groups per section, and of the groups of each organ."""

    sections: Mapping[str, tuple[str, ...]]
    organs: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Row:
    """One line of a table: a group of a section, or of an organ. ``figures``: DSC, NSD and, of whole cases, DSC in view."""

    section: str
    name: str
    cases: int
    figures: Mapping[str, Figure]


def read_contents(records: Path, references: Mapping[str, Path]) -> dict[str, Contents]:
    """What each case of ``references`` (case: label map) shows, by the records of ``python -m train phantom``.

    ``records`` is a data set of phantoms, its phantoms.json or its folder of records. Raises RecordError for a case without
    a record, with an incomplete one or with that of a scan of another size.
    """
    found = _read_records(records)
    contents = {}
    for case, path in references.items():
        if case not in found:
            raise RecordError(f"{records}: no record of case {case}; expected one for every reference")
        try:
            _check_extent(found[case], path)
            contents[case] = describe(found[case])
        except (KeyError, TypeError, AttributeError) as error:
            raise RecordError(
                f"{records}: the record of case {case} cannot be used ({type(error).__name__}: {error}); expected the "
                "fields of docs/formats.md, as this version of `python -m train phantom` writes them"
            ) from error
    return contents


def describe(record: Mapping[str, Any]) -> Contents:
    """What the record of one case says is there to see. KeyError for a field that is missing."""
    disease, found = record["disease"], _findings(record)
    removed = {*disease["missing"], *disease["resected"]}
    gone = [f"{name} organ" for name in ("missing", "resected") if disease[name]]
    # A slab may lie elsewhere and not show that an organ is gone: such a case is in neither group.
    shown = {name for name, _ in found}.union(gone if record["view"] != "slab" else ())
    seen = [ANY_FINDING, *shown] if shown else [] if gone else [NO_FINDING]
    sections = {
        "": ["all cases"],
        "finding": seen,
        "artefact": _artefacts(record),
        "contrast": [record["phase"]["name"]],
        "extent": [SHORT_VIEWS.get(record["view"], "whole abdomen")],
    }
    organs = {organ.name: _organ_groups(organ.name, record, found, removed) for organ in ORGANS}
    return Contents({section: _ordered(names) for section, names in sections.items()}, organs)


def by_group(scores: CaseScores, contents: Mapping[str, Contents]) -> list[Row]:
    """One row per group of cases: means over organs as evaluate's "overall", and DSC over the organs in view alone.

    The latter because an organ that neither mask holds scores 1, which makes a slab's mean a good one.
    """
    return _rows(
        scores, lambda case: contents[case].sections, lambda case, _: _case_values(scores[case], contents[case])
    )


def by_organ(scores: CaseScores, contents: Mapping[str, Contents]) -> list[Row]:
    """One row per organ and group of cases: without and with a finding in it, each finding, cut, absent, out of view."""
    return _rows(scores, lambda case: contents[case].organs, lambda case, organ: _organ_values(scores[case][organ]))


def table_lines(rows: Sequence[Row], section: str) -> list[tuple[str, ...]]:
    """The lines of a CSV, its header first; ``section`` is the name of the first column."""
    keys = list(rows[0].figures)
    header = (section, "group", "cases", *(f"{key}_{name}" for key in keys for name in ("mean", "low", "high")))
    lines = [header]
    for row in rows:
        values = [
            value for key in keys for value in (row.figures[key].mean, row.figures[key].low, row.figures[key].high)
        ]
        lines.append((row.section or "all", row.name, str(row.cases), *(f"{value:.4f}" for value in values)))
    return lines


def groups_markdown(groups: Sequence[Row], organs: Sequence[Row]) -> str:
    """Two tables: groups of cases, and every organ with a finding in it beside the same organ without."""
    lines = [
        "DSC and NSD by what the records say is in the field of view: mean [95 % bootstrap interval]. Groups overlap.",
        "",
        "| Group | Cases | DSC | NSD | DSC, organs in view |",
        "|---|---|---|---|---|",
    ]
    for row in groups:
        cells = [f"{row.section}: {row.name}".removeprefix(": "), str(row.cases)]
        lines.append(f"| {' | '.join(cells + [_interval(figure) for figure in row.figures.values()])} |")
    lines += [
        "",
        "DSC and NSD are means over the 13 organs of a case, where an organ that neither mask holds scores 1; the last column "
        "leaves such organs out.",
        "",
        "| Organ | Cases without a finding in it | DSC | NSD | Cases with one | DSC | NSD |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, pair in _pairs(organs):
        cells = [name.replace("_", " ").title()]
        for each in pair:
            cells += [str(each.cases), *map(_interval, each.figures.values())] if each else ["0", "-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Each finding, and organs cut by an end of the scan, absent or out of view: organs_by_finding.csv."]
    return "\n".join(lines) + "\n"


def groups_table(groups: Sequence[Row], organs: Sequence[Row]) -> str:
    """Both tables for the terminal."""
    lines = [f"{'group':<28}  {'cases':>5}  mean DSC  mean NSD  DSC in view"]
    for row in groups:
        dsc, nsd, in_view = (figure.mean for figure in row.figures.values())
        name = f"{row.section}: {row.name}".removeprefix(": ")
        lines.append(f"{name:<28}  {row.cases:>5}  {dsc:8.4f}  {nsd:8.4f}  {in_view:11.4f}")
    lines += ["", f"{'organ':<20}  without finding: DSC     NSD    with one: DSC     NSD"]
    for name, pair in _pairs(organs):
        cells = [
            f"{row.cases:>7} {row.figures['dsc'].mean:10.4f}  {row.figures['nsd'].mean:.4f}"
            if row
            else f"{0:>7} {'-':>10}  {'-':>6}"
            for row in pair
        ]
        lines.append("  ".join([f"{name.replace('_', ' '):<20}", *cells]))
    return "\n".join(lines) + "\n"


def _read_records(path: Path) -> dict[str, Mapping[str, Any]]:
    """Records by case."""
    if (path / COHORT).is_file():
        path = path / COHORT
    if path.is_dir():
        records = [_read_json(file) for file in sorted(path.glob("*.json"))]
    else:
        cases = _read_json(path).get("cases")
        records = cases if isinstance(cases, list) else []
    found: dict[str, Mapping[str, Any]] = {
        record["case"]: record for record in records if isinstance(record, dict) and "case" in record
    }
    if not found:
        raise RecordError(
            f"{path}: no record of a case; expected {COHORT} of a data set of phantoms, or its folder of records"
        )
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise RecordError(f"{path}: no JSON ({error})") from error
    if not isinstance(content, dict):
        raise RecordError(f"{path}: a JSON {type(content).__name__}; expected an object")
    return content


def _check_extent(record: Mapping[str, Any], path: Path) -> None:
    """Data sets of phantoms use the same names for their cases: is the record that of this scan? RecordError if not."""
    try:
        header = nib.load(path).header
    except (OSError, EOFError, zlib.error, ImageFileError, HeaderDataError):
        return  # scoring says what is wrong with the file
    zooms = header.get_zooms()[:3]
    # Axes in any order, and a grid of its own: what stays is the size in mm, to a voxel.
    stored = np.sort(np.multiply(header.get_data_shape()[:3], zooms))
    drawn = np.sort(np.multiply(record["shape"], record["spacing"]))
    if not np.allclose(stored, drawn, rtol=0, atol=max(*zooms, *record["spacing"])):
        sizes = [" x ".join(f"{size:.0f}" for size in extent) for extent in (stored, drawn)]
        raise RecordError(
            f"{path}: {sizes[0]} mm, but the record of that name is of a scan of {sizes[1]} mm; expected the records of "
            "the same data set"
        )


def _findings(record: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Name and organ ("" for none) of every finding of which something is in the field of view."""
    disease, tissues, organs = record["disease"], record["tissues"], record["organs"]
    found = {(LESIONS.get(v["kind"], v["kind"]), v["organ"]) for v in record["lesions"] if v["ml"] > 0}
    switched = {
        "hydronephrosis": disease["hydronephrosis"] if tissues["urine"] > 0 else (),
        "horseshoe kidney": KIDNEYS if disease["horseshoe_kidney"] else (),
        "enlarged spleen": ("spleen",) if disease["enlarged_spleen"] else (),
        "fatty liver": ("liver",) if disease["fatty_liver"] else (),
        # It lies in the bile duct, much of which runs through the pancreas; its volume is not recorded.
        "biliary stent": ("pancreas",) if "biliary" in disease["stents"] else (),
    }
    found |= {(name, organ) for name, where in switched.items() for organ in where if organs[organ]["ml"] > 0}
    return found | {(name, "") for name in ("ascites", "effusion") if tissues[name] > 0}


def _artefacts(record: Mapping[str, Any]) -> list[str]:
    """Artefacts that show. Clips streak a few slices and are no heavy artefact: not part of "any artefact"."""
    drawn, implants = record["artefacts"], bool(record["disease"]["implants"])
    there = {
        "motion": drawn["motion"] > 0,
        "truncation": drawn["truncation"] > 0,
        "low dose": drawn["low_dose"],
        "implant streaks": drawn["streaked_slices"] > 0 and implants,
    }
    heavy = [name for name, seen in there.items() if seen]
    clips = ["clip streaks"] if drawn["streaked_slices"] > 0 and not implants else []
    return (["any artefact", *heavy] if heavy else []) + clips or ["no artefact"]


def _organ_groups(
    name: str, record: Mapping[str, Any], found: Iterable[tuple[str, str]], removed: Iterable[str]
) -> tuple[str, ...]:
    """The groups that a case is in when ``name`` alone is looked at."""
    volume = record["organs"][name]
    if name in removed:
        return (ABSENT,)
    if not volume["ml"] > 0:
        return (OUT_OF_VIEW,)
    kinds = {kind for kind, organ in found if organ == name}
    return _ordered([*([ANY_FINDING, *kinds] if kinds else [NO_FINDING]), *([CUT] if volume["cut"] else [])])


def _rank(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=_rank))


def _rows(
    cases: Iterable[str],
    groups: Callable[[str], Mapping[str, tuple[str, ...]]],
    values: Callable[[str, str], Mapping[str, float]],
) -> list[Row]:
    """Cases dealt to the groups of each section, and their values summed up."""
    dealt: dict[str, dict[str, list[Mapping[str, float]]]] = {}
    for case in cases:
        for section, names in groups(case).items():
            members = dealt.setdefault(section, {})
            for name in names:
                members.setdefault(name, []).append(values(case, section))
    rows = []
    for section, members in dealt.items():
        for name in _ordered(members):
            drawn = members[name]
            figures = {key: summarise_values(np.array([each[key] for each in drawn])) for key in drawn[0]}
            rows.append(Row(section, name, len(drawn), figures))
    return rows


def _case_values(scores: Mapping[str, Score], contents: Contents) -> dict[str, float]:
    """A scan of the chest holds none of the organs: then all of them count, as everywhere else."""
    dsc = {name: score.dsc for name, score in scores.items()}
    in_view = [dsc[name] for name, groups in contents.organs.items() if groups not in ((ABSENT,), (OUT_OF_VIEW,))]
    return {
        "dsc": float(np.mean(list(dsc.values()))),
        "nsd": float(np.mean([score.nsd for score in scores.values()])),
        "dsc_in_view": float(np.mean(in_view or list(dsc.values()))),
    }


def _organ_values(score: Score) -> dict[str, float]:
    return {"dsc": score.dsc, "nsd": score.nsd}


def _pairs(organs: Sequence[Row]) -> list[tuple[str, tuple[Row | None, Row | None]]]:
    """The rows of each organ without and with a finding, None where no case has it so; organs without any such case go."""
    found = {(row.section, row.name): row for row in organs}
    pairs = [(o.name, (found.get((o.name, NO_FINDING)), found.get((o.name, ANY_FINDING)))) for o in ORGANS]
    return [(name, pair) for name, pair in pairs if any(pair)]


def _interval(figure: Figure) -> str:
    return f"{figure.mean:.4f} [{figure.low:.4f}, {figure.high:.4f}]"
