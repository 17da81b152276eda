import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inference.organs import ORGANS
from inference.volume import write_volume
from train import evaluate
from train.groups import (
    RecordError,
    Row,
    by_group,
    by_organ,
    describe,
    groups_markdown,
    groups_table,
    read_contents,
)
from train.metrics import Score
from train.phantom import Artefacts, Disease, Grid, generate

HEALTHY: dict[str, Any] = {
    "view": "abdomen",
    "shape": [10, 8, 8],
    "spacing": [4.0, 2.0, 2.0],
    "phase": {"name": "portal"},
    "disease": {
        "missing": [],
        "resected": [],
        "hydronephrosis": [],
        "stents": [],
        "implants": [],
        "horseshoe_kidney": False,
        "enlarged_spleen": False,
        "fatty_liver": False,
    },
    "lesions": [],
    "tissues": {"ascites": 0.0, "effusion": 0.0, "urine": 0.0, "metal": 0.0},
    "artefacts": {"motion": 0.0, "truncation": 0.0, "low_dose": False, "streaked_slices": 0},
    "organs": {organ.name: {"ml": 10.0, "cut": False} for organ in ORGANS},
}


def record(case: str = "A", **changes: Any) -> dict[str, Any]:
    """A healthy abdomen's record; changes of ``disease``, ``tissues``, ``artefacts`` and ``organs`` name only what differs."""
    out = {**HEALTHY, "case": case}
    for key, value in changes.items():
        out[key] = {**HEALTHY[key], **value} if isinstance(value, dict) else value
    return out


def lesion(organ: str, kind: str, ml: float) -> dict[str, Any]:
    return {"organ": organ, "kind": kind, "ml": ml}


def scores(dsc: float, **organs: float) -> dict[str, Score]:
    """The same DSC for all organs but those named; NSD is half of it."""
    return {o.name: Score(organs.get(o.name, dsc), organs.get(o.name, dsc) / 2) for o in ORGANS}


def rows(table: list[Row]) -> dict[tuple[str, str], Row]:
    return {(row.section, row.name): row for row in table}


def test_a_healthy_abdomen_is_in_one_group_of_each_section() -> None:
    shown = describe(record())
    assert shown.sections == {
        "": ("all cases",),
        "finding": ("no finding",),
        "artefact": ("no artefact",),
        "contrast": ("portal",),
        "extent": ("whole abdomen",),
    }
    assert shown.organs == {organ.name: ("no finding",) for organ in ORGANS}


@pytest.mark.parametrize(
    ("changes", "finding", "organs"),
    [
        ({"lesions": [lesion("liver", "tumour", 3.0), lesion("liver", "necrosis", 1.0)]}, "tumour", ["liver"]),
        ({"lesions": [lesion("spleen", "cyst", 0.1)]}, "cyst", ["spleen"]),
        ({"lesions": [lesion("gallbladder", "stone", 0.1)]}, "gallstones", ["gallbladder"]),
        ({"lesions": [lesion("aorta", "stent", 0.0), lesion("aorta", "thrombus", 2.0)]}, "aortic stent", ["aorta"]),
        (
            {"disease": {"hydronephrosis": ["left_kidney"]}, "tissues": {"urine": 4.0}},
            "hydronephrosis",
            ["left_kidney"],
        ),
        ({"disease": {"horseshoe_kidney": True}}, "horseshoe kidney", ["right_kidney", "left_kidney"]),
        ({"disease": {"enlarged_spleen": True}}, "enlarged spleen", ["spleen"]),
        ({"disease": {"fatty_liver": True}}, "fatty liver", ["liver"]),
        ({"disease": {"stents": ["biliary"]}}, "biliary stent", ["pancreas"]),
        ({"tissues": {"ascites": 90.0}}, "ascites", []),
        ({"tissues": {"effusion": 90.0}}, "effusion", []),
    ],
)
def test_each_finding_is_a_group_of_cases_and_of_its_organs(
    changes: dict[str, Any], finding: str, organs: list[str]
) -> None:
    shown = describe(record(**changes))
    assert shown.sections["finding"] == ("any finding", finding)
    assert [name for name, groups in shown.organs.items() if groups == ("any finding", finding)] == organs
    assert sum(groups == ("no finding",) for groups in shown.organs.values()) == 13 - len(organs)


@pytest.mark.parametrize(
    "changes",
    [
        {"lesions": [lesion("liver", "tumour", 0.0)]},
        {"disease": {"hydronephrosis": ["left_kidney"]}},  # no urine in the field of view
        {"disease": {"fatty_liver": True}, "organs": {"liver": {"ml": 0.0, "cut": False}}},
        {
            "disease": {"horseshoe_kidney": True},
            "organs": {f"{s}_kidney": {"ml": 0, "cut": False} for s in ("right", "left")},
        },
    ],
)
def test_what_the_field_of_view_leaves_out_is_no_finding(changes: dict[str, Any]) -> None:
    assert describe(record(**changes)).sections["finding"] == ("no finding",)


def test_an_organ_that_is_gone_is_absent_and_one_outside_the_scan_out_of_view() -> None:
    nothing = {"ml": 0.0, "cut": False}
    organs = {"spleen": nothing, "gallbladder": nothing, "duodenum": nothing, "liver": {"ml": 9.0, "cut": True}}
    shown = describe(record(disease={"missing": ["gallbladder"], "resected": ["spleen"]}, organs=organs))
    assert shown.sections["finding"] == ("any finding", "resected organ", "missing organ")
    assert shown.organs["spleen"] == shown.organs["gallbladder"] == ("absent",)
    assert shown.organs["duodenum"] == ("out of view",)
    assert shown.organs["liver"] == ("no finding", "cut")


def test_a_slab_need_not_show_that_an_organ_is_gone() -> None:
    shown = describe(record(view="slab", disease={"resected": ["spleen"]}))
    assert shown.sections["finding"] == ()
    assert shown.sections["extent"] == ("slab",)


@pytest.mark.parametrize(
    ("changes", "artefacts"),
    [
        ({"artefacts": {"motion": 8.0}}, ("any artefact", "motion")),
        ({"artefacts": {"truncation": 140.0}}, ("any artefact", "truncation")),
        ({"artefacts": {"low_dose": True}}, ("any artefact", "low dose")),
        (
            {"artefacts": {"streaked_slices": 30}, "disease": {"implants": ["spine"]}},
            ("any artefact", "implant streaks"),
        ),
        ({"disease": {"implants": ["hip"]}}, ("no artefact",)),  # below the field of view
    ],
)
def test_each_artefact_that_shows_is_a_group(changes: dict[str, Any], artefacts: tuple[str, ...]) -> None:
    assert describe(record(**changes)).sections["artefact"] == artefacts


def test_the_streaks_of_clips_are_no_heavy_artefact() -> None:
    clips, both = {"streaked_slices": 3}, {"streaked_slices": 3, "low_dose": True}
    assert describe(record(artefacts=clips)).sections["artefact"] == ("clip streaks",)
    assert describe(record(artefacts=both)).sections["artefact"] == ("any artefact", "low dose", "clip streaks")


def test_views_are_whole_cut_short_or_slabs() -> None:
    views = ("thorax, abdomen and pelvis", "liver's top cut", "upper abdomen", "slab")
    extents = [describe(record(view=view)).sections["extent"] for view in views]
    assert extents == [("whole abdomen",), ("abdomen cut short",), ("abdomen cut short",), ("slab",)]


def test_a_group_has_the_means_of_its_cases() -> None:
    tumour = [lesion("liver", "tumour", 2.0)]
    contents = {
        "A": describe(record()),
        "B": describe(record(lesions=tumour, phase={"name": "native"})),
        "C": describe(record(lesions=[*tumour, lesion("liver", "cyst", 1.0)])),
    }
    given = {"A": scores(0.9), "B": scores(0.6, liver=0.08), "C": scores(0.8, liver=0.28)}
    found = rows(by_group(given, contents))
    # Case means: A 0.9, B (12 x 0.6 + 0.08) / 13 = 0.56, C (12 x 0.8 + 0.28) / 13 = 0.76.
    assert {key: row.cases for key, row in found.items()} == {
        ("", "all cases"): 3,
        ("finding", "no finding"): 1,
        ("finding", "any finding"): 2,
        ("finding", "tumour"): 2,
        ("finding", "cyst"): 1,
        ("artefact", "no artefact"): 3,
        ("contrast", "native"): 1,
        ("contrast", "portal"): 2,
        ("extent", "whole abdomen"): 3,
    }
    assert found["", "all cases"].figures["dsc"].mean == pytest.approx(0.74)
    dsc = found["finding", "tumour"].figures["dsc"]
    assert (dsc.mean, dsc.low, dsc.high) == pytest.approx((0.66, 0.56, 0.76))
    assert found["finding", "tumour"].figures["nsd"].mean == pytest.approx(0.33)
    assert found["contrast", "portal"].figures["dsc"].mean == pytest.approx(0.83)


def test_organs_that_the_scan_does_not_hold_are_left_out_of_the_figure_in_view() -> None:
    nothing = {organ.name: {"ml": 0.0, "cut": False} for organ in ORGANS if organ.name not in ("liver", "spleen")}
    slab = describe(record(view="slab", organs=nothing, disease={"missing": ["gallbladder"]}))
    chest = describe(
        record(view="slab", organs={**nothing, **{o: {"ml": 0.0, "cut": False} for o in ("liver", "spleen")}})
    )
    given = {"A": scores(1.0, liver=0.4, spleen=0.3), "B": scores(1.0, liver=0.0)}
    one, both = (
        rows(by_group({case: given[case] for case in cases}, {"A": slab, "B": chest})) for cases in ("A", "AB")
    )
    assert one["extent", "slab"].figures["dsc"].mean == pytest.approx(11.7 / 13)
    assert one["extent", "slab"].figures["dsc_in_view"].mean == pytest.approx(0.35)
    # Nothing is in view of the second: all that can be said of it is that the liver was invented.
    assert both["extent", "slab"].figures["dsc_in_view"].mean == pytest.approx((0.35 + 12 / 13) / 2)


def test_an_organ_is_scored_with_a_finding_in_it_and_without() -> None:
    contents = {
        "A": describe(record()),
        "B": describe(record(lesions=[lesion("liver", "tumour", 2.0)], organs={"liver": {"ml": 5.0, "cut": True}})),
        "C": describe(record(disease={"fatty_liver": True, "resected": ["spleen"]})),
        "D": describe(record(organs={"liver": {"ml": 0.0, "cut": False}})),
    }
    given = {"A": scores(0.9), "B": scores(0.9, liver=0.5), "C": scores(0.9, liver=0.7, spleen=0.0), "D": scores(1.0)}
    found = rows(by_organ(given, contents))
    liver = {name: (row.cases, row.figures["dsc"].mean) for (organ, name), row in found.items() if organ == "liver"}
    assert liver == {
        "no finding": (1, pytest.approx(0.9)),
        "any finding": (2, pytest.approx(0.6)),
        "tumour": (1, pytest.approx(0.5)),
        "fatty liver": (1, pytest.approx(0.7)),
        "cut": (1, pytest.approx(0.5)),
        "out of view": (1, pytest.approx(1.0)),
    }
    spleen = {name: row.cases for (organ, name), row in found.items() if organ == "spleen"}
    assert spleen == {"no finding": 3, "absent": 1}
    assert found["spleen", "absent"].figures["dsc"].mean == 0.0
    assert found["liver", "any finding"].figures["nsd"].mean == pytest.approx(0.3)


def test_the_tables_name_groups_and_organs() -> None:
    contents = {"A": describe(record()), "B": describe(record(lesions=[lesion("liver", "tumour", 2.0)]))}
    given = {"A": scores(0.9), "B": scores(0.9, liver=0.5)}
    tables = by_group(given, contents), by_organ(given, contents)
    markdown = groups_markdown(*tables).splitlines()
    assert (
        "| finding: no finding | 1 | 0.9000 [0.9000, 0.9000] | 0.4500 [0.4500, 0.4500] | 0.9000 [0.9000, 0.9000] |"
        in markdown
    )
    assert (
        "| Liver | 1 | 0.9000 [0.9000, 0.9000] | 0.4500 [0.4500, 0.4500] | 1 | 0.5000 [0.5000, 0.5000] "
        "| 0.2500 [0.2500, 0.2500] |"
    ) in markdown
    assert "| Spleen | 2 | 0.9000 [0.9000, 0.9000] | 0.4500 [0.4500, 0.4500] | 0 | - | - |" in markdown
    lines = [line.split() for line in groups_table(*tables).splitlines()]
    assert ["finding:", "tumour", "1", "0.8692", "0.4346", "0.8692"] in lines
    assert ["liver", "1", "0.9000", "0.4500", "1", "0.5000", "0.2500"] in lines
    assert ["spleen", "2", "0.9000", "0.4500", "0", "-", "-"] in lines


def save_records(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "phantoms.json"
    path.write_text(json.dumps({"cases": records}))
    (folder / "records").mkdir(exist_ok=True)
    for each in records:
        (folder / "records" / f"{each.get('case')}.json").write_text(json.dumps(each))
    return path


def save_reference(path: Path, shape: tuple[int, int, int] = (10, 8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.zeros(shape, np.uint8)
    for organ in ORGANS:
        labels[2:6, organ.id % 8, organ.id // 8] = organ.id
    write_volume(path, labels, np.diag([-2.0, -2.0, 4.0, 1.0]))
    return path


def test_records_are_found_in_the_data_set_its_summary_and_its_folder(tmp_path: Path) -> None:
    references = {"A": save_reference(tmp_path / "A.nii.gz")}
    summary = save_records(tmp_path, record("A", phase={"name": "native"}), record("B"))
    for place in (tmp_path, summary, tmp_path / "records"):
        contents = read_contents(place, references)
        assert list(contents) == ["A"]
        assert contents["A"].sections["contrast"] == ("native",)


def test_a_scan_stored_in_another_order_of_axes_or_resampled_is_still_that_of_its_record(tmp_path: Path) -> None:
    records = save_records(tmp_path, record("A", shape=[10, 8, 6]))
    turned, resampled = tmp_path / "turned" / "A.nii.gz", tmp_path / "resampled" / "A.nii.gz"
    for path in (turned, resampled):
        path.parent.mkdir()
    write_volume(turned, np.zeros((6, 10, 8), np.uint8), np.diag([2.0, 4.0, 2.0, 1.0]))
    write_volume(resampled, np.zeros((13, 6, 4), np.uint8), np.diag([3.0, 3.0, 3.0, 1.0]))
    for path in (turned, resampled):
        assert list(read_contents(records, {"A": path})) == ["A"]


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda path: save_records(path, record("B")), "no record of case A; expected one for every reference"),
        (
            lambda path: save_records(path, {"case": "A", "view": "slab"}),
            r"case A cannot be used \(KeyError: 'shape'\)",
        ),
        (lambda path: save_records(path, record("A", lesions=None)), r"case A cannot be used \(TypeError"),
        (lambda path: save_records(path, record("A", shape=[30, 8, 8])), "A.nii.gz: 16 x 16 x 40 mm, but the record"),
        (lambda path: save_records(path), "phantoms.json: no record of a case"),
        (lambda path: (path / "phantoms.json").write_text("{"), "phantoms.json: no JSON"),
        (lambda path: (path / "phantoms.json").write_text("[1]"), "phantoms.json: a JSON list; expected an object"),
        (lambda path: (path / "phantoms.json").write_text('{"cases": 3}'), "phantoms.json: no record of a case"),
        (lambda path: None, "phantoms.json: cannot be read"),
    ],
)
def test_records_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, arrange: Callable[[Path], object], message: str
) -> None:
    references = {"A": save_reference(tmp_path / "A.nii.gz")}
    arrange(tmp_path)
    with pytest.raises(RecordError, match=message):
        read_contents(tmp_path / "phantoms.json", references)


def call(folder: Path) -> int:
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    places = [f"--{name}={folder / name}" for name in ("predictions", "references", "records", "out")]
    return evaluate.run(parser.parse_args([*places, "--jobs=1"]))


def test_evaluate_writes_both_tables_beside_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_records(tmp_path, record("A", lesions=[lesion("liver", "cyst", 1.0)]), record("B"), record("broken"))
    for case in ("A", "B", "broken"):
        for folder in ("predictions", "references"):
            save_reference(tmp_path / folder / f"{case}.nii.gz")
    (tmp_path / "references" / "broken.nii.gz").write_bytes(b"no scan")
    (tmp_path / "predictions" / "B.nii.gz").unlink()
    assert call(tmp_path) == 1  # the broken one is named; the groups are of the cases that were scored
    names = ["groups.csv", "groups.md", "organs_by_finding.csv", "scores.csv", "summary.csv", "summary.md"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    with (tmp_path / "out" / "groups.csv").open() as file:
        groups = {(row["section"], row["group"]): row for row in csv.DictReader(file)}
    assert groups["finding", "cyst"]["dsc_mean"] == groups["finding", "cyst"]["nsd_low"] == "1.0000"
    assert groups["finding", "no finding"]["dsc_in_view_mean"] == "0.0000"
    assert (groups["all", "all cases"]["cases"], groups["all", "all cases"]["dsc_mean"]) == ("2", "0.5000")
    with (tmp_path / "out" / "organs_by_finding.csv").open() as file:
        organs = [(row["organ"], row["group"], row["cases"], row["dsc_mean"]) for row in csv.DictReader(file)]
    assert organs[:3] == [
        ("liver", "no finding", "1", "0.0000"),
        ("liver", "any finding", "1", "1.0000"),
        ("liver", "cyst", "1", "1.0000"),
    ]
    printed = capsys.readouterr().out
    assert "overall" in printed
    assert "finding: cyst" in printed


def test_evaluate_refuses_a_case_without_a_record_before_the_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_records(tmp_path, record("A"))
    for case in ("A", "B"):
        save_reference(tmp_path / "references" / f"{case}.nii.gz")
        save_reference(tmp_path / "predictions" / f"{case}.nii.gz")
    assert call(tmp_path) == 2
    assert "records: no record of case B" in caplog.text
    assert not (tmp_path / "out").exists()


def test_a_record_as_the_generator_writes_it_says_what_the_phantom_holds() -> None:
    grid = Grid.covering((-120, -140, -180), (150, 140, 180), (8.0, 4.0, 4.0))
    disease = Disease(lesions=("liver",), resected=("left_kidney",), fatty_liver=True, ascites=20.0)
    phantom = generate(3, grid, disease, Artefacts(motion=8.0))
    shown = describe({**phantom.record, "view": "abdomen"})
    assert set(shown.sections["finding"]) == {"any finding", "tumour", "fatty liver", "ascites", "resected organ"}
    assert shown.sections["artefact"][:2] == ("any artefact", "motion")
    assert shown.organs["left_kidney"] == ("absent",)
    assert shown.organs["liver"][:3] == ("any finding", "tumour", "fatty liver")
    for organ in ORGANS:
        held = bool((phantom.labels == organ.id).any())
        assert held == (shown.organs[organ.name] not in (("absent",), ("out of view",)))
