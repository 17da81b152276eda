from pathlib import Path

import pytest

from inference.organs import CLASSES
from train.config import DEFAULTS, ConfigError, load_config, read_settings
from train.phantom import AUXILIARY

SMALL = DEFAULTS.with_name("small.toml")


def test_the_defaults_are_the_papers() -> None:
    config = load_config()
    assert config.prepare.spacing == (4.0, 1.2, 1.2)
    assert config.network.patch == (40, 224, 192)
    assert (config.network.batch_size, config.training.epochs, config.training.iterations_per_epoch) == (2, 1000, 250)
    assert (config.training.learning_rate, config.training.momentum, config.training.mirroring) == (0.01, 0.99, True)
    assert (config.training.folds, config.loop.iterations, config.loop.threshold, config.inference.step) == (
        5,
        4,
        0.9,
        0.9,
    )
    assert config.classes == CLASSES


def test_every_setting_has_a_comment_above_it_or_above_its_group() -> None:
    commented = False
    for line in DEFAULTS.read_text(encoding="utf-8").splitlines():
        if not line:
            continue
        assert not line.startswith("[") or line.endswith("]")
        if line.startswith("["):
            commented = False
        elif line.startswith("#"):
            commented = True
        else:
            assert commented, line


def test_a_file_is_laid_over_the_defaults_and_a_setting_over_the_file() -> None:
    config = load_config(SMALL, ["training.epochs=7", "network.plan=nnunet", "training.mirroring=true"])
    assert config.prepare.spacing != load_config().prepare.spacing
    assert (config.training.epochs, config.network.plan, config.training.mirroring) == (7, "nnunet", True)
    assert config.loop.threshold == 0.9
    assert config.classes[:14] == CLASSES
    assert config.classes[14] == "fat"


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("training.epoch=3", ("unknown key training.epoch", "epochs")),
        ("train.epochs=3", ("unknown section 'train'", "training")),
        ("training.epochs=0", ("training.epochs is 0", "from 1")),
        ("training.epochs=2.5", ("training.epochs is 2.5", "whole number")),
        ("training.epochs=true", ("training.epochs is True", "whole number")),
        ("training.mirroring=1", ("training.mirroring is 1", "true or false")),
        ("training.learning_rate=0", ("training.learning_rate is 0", "excluded")),
        ("loop.threshold=1.5", ("loop.threshold is 1.5", "from 0 to 1")),
        ("inference.step=nan", ("inference.step is nan", "from 0")),
        ("network.plan=mine", ("network.plan is 'mine'", "'nnunet'")),
        ("prepare.spacing=[1, 2]", ("prepare.spacing is [1, 2]", "3 entries")),
        ("network.patch=[41, 224, 192]", ("network.patch", "multiple of 8")),
        ("network.strides=[[1, 1, 1]]", ("network.strides", "6 entries")),
        ("data.images=../elsewhere", ("data.images", "without slashes")),
        ('data.auxiliary_classes=["liver"]', ("data.auxiliary_classes", "differ")),
        ("training.epochs", ("--set 'training.epochs'", "section.key=value")),
    ],
)
def test_a_bad_setting_is_refused_by_key_value_and_range(setting: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [setting])
    for part in parts:
        assert part in str(error.value)


def test_a_clock_and_a_deterministic_training_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="reproducible"):
        load_config(None, ["training.deterministic=true", "training.max_minutes=5"])


def test_settings_that_a_run_recorded_are_read_back_equal(tmp_path: Path) -> None:
    config = load_config(SMALL)
    path = tmp_path / "settings.json"
    path.write_text(config.to_json(), encoding="utf-8")
    assert read_settings(path) == config


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("epochs = = 3", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        load_config(path)


def test_mirroring_while_labelling_needs_models_that_saw_flips() -> None:
    with pytest.raises(ConfigError, match=r"labelling\.mirroring is True; expected false"):
        load_config(settings=["training.mirroring=false", "labelling.mirroring=true"])
    assert load_config(settings=["labelling.mirroring=true"]).labelling.mirroring


@pytest.mark.parametrize("name", ["small", "wide", "gpu"])
def test_the_settings_for_phantoms_are_valid_and_share_the_phantoms_classes(name: str) -> None:
    config = load_config(DEFAULTS.with_name(f"{name}.toml"))
    assert config.data.auxiliary_classes == tuple(AUXILIARY)
    assert not config.training.mirroring


def test_the_second_stage_goes_on_with_the_network_of_the_first() -> None:
    first, second = load_config(SMALL), load_config(DEFAULTS.with_name("wide.toml"))
    assert first.prepare.spacing == second.prepare.spacing
    for narrow, wide in zip(first.network.kernels, second.network.kernels):  # zeros go around narrower ones
        assert all(size <= wider and (wider - size) % 2 == 0 for size, wider in zip(narrow, wide))
    for field in ("features", "strides", "encoder_convolutions", "decoder_convolutions"):
        assert getattr(first.network, field) == getattr(second.network, field), field
