import json
from pathlib import Path
from typing import Any

import pytest

from inference.bundle import BundleError, Plan, read_bundle, write_bundle
from tests.conftest import level_model, make_bundle, make_plan

PLAN = make_plan(level_model(), organ_minima_mm3={"liver": 5e5}, provenance={"data": "blocks"})


def test_a_bundle_reads_back_as_it_was_written(tmp_path: Path) -> None:
    bundle = make_bundle(organ_minima_mm3={"spleen": 1e4}, provenance={"command": "fit"})
    write_bundle(tmp_path / "weights", bundle)
    assert read_bundle(tmp_path / "weights") == bundle
    assert sorted(entry.name for entry in (tmp_path / "weights").iterdir()) == ["model.onnx", "plan.json"]


def test_a_plan_survives_json() -> None:
    assert Plan.from_json(PLAN.to_json()) == PLAN


def changed(path: str, value: Any) -> str:
    content = json.loads(PLAN.to_json())
    *parents, name = path.split(".")
    inner = content
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    return json.dumps(content)


REQUIRED = [name for name in json.loads(PLAN.to_json()) if name not in ("precision", "anti_aliasing")]


@pytest.mark.parametrize("path", [*REQUIRED, "model.sha256", "model.file", "intensity.std"])
def test_a_missing_field_is_named(path: str) -> None:
    content = json.loads(PLAN.to_json())
    *parents, name = path.split(".")
    del (content[parents[0]] if parents else content)[name]
    with pytest.raises(BundleError, match=f"'{path}' is missing"):
        Plan.from_json(json.dumps(content))


def test_a_plan_of_the_first_format_is_still_read_and_may_be_mirrored() -> None:
    content = json.loads(PLAN.to_json())
    del content["mirrored_axes"]
    plan = Plan.from_json(json.dumps(content | {"format_version": 1}))
    assert plan.mirrored_axes == (0, 1, 2)


def test_a_plan_that_names_no_precision_bears_bfloat16() -> None:
    content = json.loads(PLAN.to_json())
    del content["precision"]
    assert Plan.from_json(json.dumps(content)).precision == "bfloat16"
    assert Plan.from_json(json.dumps(content | {"precision": "float32"})).precision == "float32"


def test_a_plan_that_does_not_name_anti_aliasing_has_none() -> None:
    content = json.loads(PLAN.to_json())
    del content["anti_aliasing"]
    assert not Plan.from_json(json.dumps(content)).anti_aliasing
    assert Plan.from_json(json.dumps(content | {"anti_aliasing": True})).anti_aliasing


def test_mirroring_that_training_never_showed_is_refused() -> None:
    plan = make_plan(level_model(), mirrored_axes=(2,))
    plan.check_mirroring(())
    plan.check_mirroring((2,))
    with pytest.raises(BundleError, match=r"along z, y, x; .* here x \(field 'mirrored_axes'\)"):
        plan.check_mirroring((0, 1, 2))


@pytest.mark.parametrize("path", ["colour", "model.size", "intensity.median"])
def test_an_unknown_field_is_named(path: str) -> None:
    with pytest.raises(BundleError, match=f"'{path}' is unknown"):
        Plan.from_json(changed(path, 1))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("format_version", 3, "expected 2"),
        ("mirrored_axes", [0, 0], "each once"),
        ("mirrored_axes", [3], "0, 1, 2"),
        ("precision", "float16", "bfloat16 or float32"),
        ("precision", None, "bfloat16 or float32"),
        ("anti_aliasing", 1, "true or false"),
        ("orientation", "SLP", "such as LPS"),
        ("orientation", "LPX", "such as LPS"),
        ("orientation", 3, "such as LPS"),
        ("spacing", [1.2, 1.2], "three lengths"),
        ("spacing", [4, 1.2, 0], "above 0"),
        ("spacing", "4 1 1", "a list"),
        ("patch", [40, 224, 192.5], "whole numbers"),
        ("patch", [40, 0, 192], "above 0"),
        ("step", 0, "above 0"),
        ("step", 1.1, "at most 1"),
        ("step", True, "a number"),
        ("classes", ["liver", "background"], "'background' first"),
        ("classes", ["background"], "then organs"),
        ("classes", ["background", "liver", "liver"], "every name once"),
        ("classes", ["background", 7], "names"),
        ("classes", ["background", *map(str, range(256))], "at most 256"),
        ("intensity.std", 0, "more than 0"),
        ("intensity.std", "wide", "a finite number"),
        ("intensity.clip_low", 5000, "less than clip_high"),
        ("intensity", [1, 2, 3, 4], "an object"),
        ("organ_minima_mm3", {"heart": 5}, "organs named in classes"),
        ("organ_minima_mm3", {"liver": -5}, "a volume in mm3"),
        ("organ_minima_mm3", [5], "an object"),
        ("provenance", "me", "an object"),
        ("model.file", "../model.onnx", "beside plan.json"),
        ("model.sha256", "abc", "64 hexadecimal"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(path: str, value: object, expected: str) -> None:
    with pytest.raises(BundleError) as caught:
        Plan.from_json(changed(path, value))
    assert path.split(".")[0] in str(caught.value)
    assert expected in str(caught.value)


def test_infinity_and_broken_json_are_refused() -> None:
    with pytest.raises(BundleError, match=r"intensity\.mean"):
        Plan.from_json(changed("intensity.mean", float("inf")))
    with pytest.raises(BundleError, match="not valid JSON"):
        Plan.from_json('{"format_version": 1,')
    with pytest.raises(BundleError, match="expected an object"):
        Plan.from_json("[]")


def test_a_network_that_is_not_the_plans_is_refused(tmp_path: Path) -> None:
    write_bundle(tmp_path, make_bundle())
    model = tmp_path / "model.onnx"
    model.write_bytes(model.read_bytes() + b"\0")
    with pytest.raises(BundleError, match=r"model.onnx: sha256 is .* expects"):
        read_bundle(tmp_path)


def test_a_folder_without_plan_or_network_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"plan.json: cannot be read"):
        read_bundle(tmp_path)
    write_bundle(tmp_path, make_bundle())
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"model.onnx: cannot be read"):
        read_bundle(tmp_path)
