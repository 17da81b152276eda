"""Every path of a run. Nobody else joins paths below the run's folder."""

from dataclasses import dataclass
from pathlib import Path

# nnU-Net asks for a number and a name; a run's first data set holds the labelled cases.
LABELLED_DATASET = "Dataset001_Labelled"
PLANS = "nnUNetPlans"
CONFIGURATION = "3d_fullres"
TRAINER = "SettingsTrainer"


def iteration_dataset(number: int) -> str:
    """nnU-Net's data set of an iteration of the loop: the labelled cases, from iteration 1 on with accepted ones."""
    return LABELLED_DATASET if number == 0 else f"Dataset{number + 1:03d}_Iteration{number}"


@dataclass(frozen=True)
class Workspace:
    """The folder of one run.

    ``prepared``: cases on the working grid. ``nnunet``: the three folders nnU-Net works in. ``bundle``: the exported
    network. A step whose file exists is done; files appear whole, by rename.
    """

    root: Path

    @property
    def settings(self) -> Path:
        """The settings the run was started with."""
        return self.root / "settings.json"

    @property
    def provenance(self) -> Path:
        """Command, data and versions of the run."""
        return self.root / "provenance.json"

    @property
    def bundle(self) -> Path:
        """The exported network of ``fit``: plan.json and model.onnx."""
        return self.root / "bundle"

    @property
    def starts(self) -> Path:
        """When and how the run was started and started again: commands, versions, commit, image."""
        return self.root / "starts.json"

    @property
    def lock(self) -> Path:
        """Held by the process that works on the run."""
        return self.root / "lock"

    @property
    def data(self) -> Path:
        """The scans that a loop was started on: size of the files of each case; written before any work."""
        return self.root / "data.json"

    @property
    def cases(self) -> Path:
        """Ids of the cases a loop works on; written when all of them are prepared."""
        return self.root / "cases.json"

    @property
    def machine(self) -> Path:
        """How many jobs run side by side, as the loop found it when it was last started."""
        return self.root / "machine.json"

    @property
    def log(self) -> Path:
        """What the loop said, over all its starts."""
        return self.root / "loop.log"

    def iteration(self, number: int) -> Path:
        """An iteration of the loop: its models, pseudo-labels and selection."""
        return self.root / "iterations" / str(number)

    def job_log(self, number: int, job: str) -> Path:
        """What a job of an iteration said, over all its starts."""
        return self.iteration(number) / "logs" / f"{job}.log"

    def fold_bundle(self, number: int, fold: int) -> Path:
        """The exported network of one fold."""
        return self.iteration(number) / "bundles" / str(fold)

    def pseudo_labels(self, number: int) -> Path:
        return self.iteration(number) / "labels"

    def pseudo_label(self, number: int, case: str) -> Path:
        """A case's pseudo-label on the working grid."""
        return self.pseudo_labels(number) / f"{case}.nii.gz"

    def training_pseudo_label(self, number: int, case: str) -> Path:
        """Its organs and auxiliary classes, where a run has any: what the next iteration learns."""
        return self.iteration(number) / "auxiliary" / f"{case}.nii.gz"

    def rows(self, number: int) -> Path:
        return self.iteration(number) / "rows"

    def row(self, number: int, case: str) -> Path:
        """Agreement, volumes and seconds of a pseudo-label; written after it: the case is labelled."""
        return self.rows(number) / f"{case}.json"

    def failures(self, number: int) -> Path:
        return self.iteration(number) / "set_aside"

    def failure(self, number: int, case: str) -> Path:
        """Why a case could not be labelled; it is left out of this iteration."""
        return self.failures(number) / f"{case}.txt"

    def selection(self, number: int) -> Path:
        """The decision on every case; written when all are labelled: the iteration is done."""
        return self.iteration(number) / "selection.csv"

    @property
    def prepared(self) -> Path:
        """Cases on the working grid."""
        return self.root / "prepared"

    def image(self, case: str) -> Path:
        """A scan on the working grid, int16 HU."""
        return self.prepared / "images" / f"{case}.nii.gz"

    def label(self, case: str) -> Path:
        """Its organs on the working grid, uint8 with FLARE22's ids."""
        return self.prepared / "labels" / f"{case}.nii.gz"

    def training_label(self, case: str) -> Path:
        """Its organs and auxiliary classes, uint8: what a network with auxiliary classes learns."""
        return self.prepared / "auxiliary" / f"{case}.nii.gz"

    def volumes(self, case: str) -> Path:
        """Volume of each organ of a labelled case, measured on the original label map."""
        return self.prepared / "volumes" / f"{case}.json"

    @property
    def prepared_aside(self) -> Path:
        """Reasons of all cases that could not be prepared."""
        return self.prepared / "set_aside"

    def set_aside(self, case: str) -> Path:
        """Why a case could not be prepared."""
        return self.prepared_aside / f"{case}.txt"

    @property
    def intensities(self) -> Path:
        """HU of the organs in the labelled set before any resampling; written before the first case is prepared."""
        return self.prepared / "intensities.json"

    @property
    def organ_minima(self) -> Path:
        """Smallest volume of each organ in the labelled set, mm3."""
        return self.prepared / "organ_minima.json"

    @property
    def nnunet_raw(self) -> Path:
        return self.root / "nnunet" / "raw"

    @property
    def nnunet_preprocessed(self) -> Path:
        return self.root / "nnunet" / "preprocessed"

    @property
    def nnunet_results(self) -> Path:
        return self.root / "nnunet" / "results"

    def raw_dataset(self, dataset: str) -> Path:
        """nnU-Net's dataset.json, which points at the prepared files."""
        return self.nnunet_raw / dataset / "dataset.json"

    def preprocessed(self, dataset: str) -> Path:
        """nnU-Net's folder of one data set: fingerprint, plans, splits."""
        return self.nnunet_preprocessed / dataset

    def fingerprint(self, dataset: str) -> Path:
        return self.preprocessed(dataset) / "dataset_fingerprint.json"

    def plans(self, dataset: str) -> Path:
        return self.preprocessed(dataset) / f"{PLANS}.json"

    def splits(self, dataset: str) -> Path:
        return self.preprocessed(dataset) / "splits_final.json"

    def preprocessed_cases(self, dataset: str) -> Path:
        """Normalised cases as nnU-Net's loader reads them."""
        return self.preprocessed(dataset) / f"{PLANS}_{CONFIGURATION}"

    def model(self, dataset: str) -> Path:
        """nnU-Net's folder of the trained folds of one data set."""
        return self.nnunet_results / dataset / f"{TRAINER}__{PLANS}__{CONFIGURATION}"

    def fold(self, dataset: str, fold: int | str) -> Path:
        return self.model(dataset) / f"fold_{fold}"

    def final_checkpoint(self, dataset: str, fold: int | str) -> Path:
        """Written when a training has ended: the step is done."""
        return self.fold(dataset, fold) / "checkpoint_final.pth"

    def latest_checkpoint(self, dataset: str, fold: int | str) -> Path:
        return self.fold(dataset, fold) / "checkpoint_latest.pth"

    def fold_lock(self, dataset: str, fold: int | str) -> Path:
        """Held by the process that trains the fold."""
        return self.fold(dataset, fold) / "lock"

    def progress(self, dataset: str, fold: int | str) -> Path:
        """Epoch, loss, pseudo Dice, seconds: one small JSON object, rewritten after each epoch."""
        return self.fold(dataset, fold) / "progress.json"

    def training_facts(self, dataset: str, fold: int | str) -> Path:
        """What nnU-Net wrote down of the machine and the settings of a training."""
        return self.fold(dataset, fold) / "debug.json"

    def nnunet_log(self, dataset: str, fold: int | str) -> Path:
        """What nnU-Net prints while it trains."""
        return self.fold(dataset, fold) / "nnunet.log"
