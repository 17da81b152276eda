"""Which methods the training's benchmark takes out for nnU-Net's side."""

import sys
from types import ModuleType

import pytest

from benchmarks.training import fast_methods


def test_what_makes_a_training_fast_on_a_cpu_is_found(trainer: ModuleType) -> None:
    found = fast_methods(trainer.SettingsTrainer, sys.modules["cpu_training"])
    assert found == ["initialize", "_build_loss", "train_step"]
    assert all(hasattr(trainer.nnUNetTrainer, name) for name in found)


def test_a_new_override_is_found_by_itself_and_others_are_left(trainer: ModuleType) -> None:
    fast = sys.modules["cpu_training"]

    class Parent:
        def run_training(self) -> None: ...
        def on_epoch_end(self) -> None: ...

    class Child(Parent):
        def __init__(self) -> None:
            self.on_cpu = True

        def run_training(self) -> None:
            trainer.keep_freed_memory()

        def on_epoch_end(self) -> None:
            self.done = True

        def own(self) -> bool:
            return self.on_cpu

    assert fast_methods(Child, fast) == ["run_training"]
    with pytest.raises(RuntimeError, match="overrides nothing"):
        fast_methods(Parent, fast)
