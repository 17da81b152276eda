"""The house's one-way streets, read off the imports."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Modules of inference/ from the ground up: each imports only from those before it.
ORDER = [
    "organs",
    "threads",
    "volume",
    "body",
    "bundle",
    "resample",
    "sliding_window",
    "onnx_file",
    "skips",
    "precision",
    "mapped",
    "engine",
    "stitching",
    "postprocess",
    "pipeline",
    "__main__",
]
IMAGE_PACKAGES = {"numpy", "nibabel", "isal", "cc3d", "openvino", "onnxruntime"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module or "")
    return found


def test_inference_modules_are_all_in_the_order() -> None:
    assert {path.stem for path in (ROOT / "inference").glob("*.py")} == {"__init__", *ORDER}


@pytest.mark.parametrize("name", ORDER)
def test_inference_imports_run_one_way(name: str) -> None:
    for imported in imports(ROOT / "inference" / f"{name}.py"):
        top, _, inner = imported.partition(".")
        assert top != "train"
        if top == "inference":
            assert ORDER.index(inner) < ORDER.index(name), f"{name} imports {inner}"
        else:
            assert top in sys.stdlib_module_names | IMAGE_PACKAGES, f"{name} imports {top}"


@pytest.mark.parametrize(("package", "module"), [("nnunetv2", "nnunet"), ("ray", "cluster")])
def test_one_module_speaks_for_each_framework(package: str, module: str) -> None:
    for path in (ROOT / "train").rglob("*.py"):
        if path.stem == module or "trainer" in path.parts:
            continue
        assert not any(name.split(".")[0] == package for name in imports(path)), f"{path} imports {package}"
