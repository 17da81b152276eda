from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from inference import mapped
from inference.bundle import Bundle, read_bundle, write_bundle
from inference.engine import OpenVinoEngine, openvino_core
from inference.mapped import MappedWeights
from tests.conftest import level_model, make_bundle

WINDOW = np.random.default_rng(0).uniform(0, 13, (8, 16, 16)).astype(np.float32)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle in files, whose few weights count as large."""
    monkeypatch.setattr(mapped, "LARGE", 100)
    write_bundle(tmp_path, make_bundle())
    return read_bundle(tmp_path)


def logits(bundle: Bundle) -> np.ndarray:
    return np.array(OpenVinoEngine(bundle, 1, "f32")(WINDOW))


def lay_under(bundle: Bundle, path: Path) -> int:
    return MappedWeights(path).lay_under(openvino_core().read_model(bundle.model))


def test_weights_lie_in_the_file_and_answer_as_before(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back, original = [], MappedWeights.give_back
    monkeypatch.setattr(MappedWeights, "give_back", lambda weights: given_back.append(original(weights)))
    assert (logits(bundle) == logits(replace(bundle, file=None))).all()
    assert len(given_back) == 1
    assert lay_under(bundle, bundle.file) == 1


def test_pages_that_were_given_back_hold_the_same_bytes(bundle: Bundle) -> None:
    weights = MappedWeights(bundle.file)
    weights.give_back()
    assert bytes(weights._pages) == bundle.model


def test_small_weights_stay_where_they_are(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "LARGE", 1 << 20)
    assert lay_under(bundle, bundle.file) == 0


@pytest.mark.parametrize(
    "content", [level_model(shift=(1, 0, 0)), level_model(classes=13), b"no network"], ids=["other", "smaller", "none"]
)
def test_a_file_that_is_not_what_was_checked_is_not_used(bundle: Bundle, content: bytes) -> None:
    expected = logits(replace(bundle, file=None))
    bundle.file.write_bytes(content)
    assert (logits(bundle) == expected).all()


def test_a_file_that_is_gone_is_not_needed(bundle: Bundle) -> None:
    expected = logits(replace(bundle, file=None))
    bundle.file.unlink()
    assert (logits(bundle) == expected).all()
