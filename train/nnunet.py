"""The only module that speaks nnU-Net v2: data set, plan, preprocessing, splits, training. nnU-Net is driven as it is.

nnU-Net and torch are imported inside the functions that need them: both take seconds, and other commands do without.
"""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from inference.bundle import Bundle, Plan, read_bundle
from inference.engine import Engine
from inference.volume import Labels, Volume, atomic_write
from train.config import Config, Training
from train.intensities import INTENSITIES, read_intensities
from train.processes import process_pool, worker_count
from train.workspace import CONFIGURATION, LABELLED_DATASET, PLANS, TRAINER, Workspace

log = logging.getLogger(__name__)

TRAINER_FOLDER = Path(__file__).with_name("trainer")
# A preprocessed case: image, label map, and what marks it as done.
CASE_FILES = (".b2nd", "_seg.b2nd", ".pkl")
READER = "NibabelIO"  # SimpleITK refuses the sheared headers of tilted scans


class TrainingError(RuntimeError):
    """A data set or a training that nnU-Net cannot go on with."""


@dataclass(frozen=True)
class Split:
    """One fold: the cases a model trains on, and the labelled ones among the rest."""

    train: tuple[str, ...]
    val: tuple[str, ...]


def deal_folds(
    labelled: Sequence[str], pseudo_labelled: Sequence[str], folds: int, seed: int, left_out: int = 1
) -> tuple[Split, ...]:
    """Deal cases into folds; each model trains on all but one, validation figures come from labelled cases only.

    Both kinds are dealt apart, so a labelled case stays in its fold over all iterations (paper section 2.2).
    ``left_out``: folds that a model does not train on, its own and those after it; 2 leaves two models to judge each case.
    """
    random = np.random.default_rng(seed)
    own = _deal(labelled, folds, random)
    hands = [{*own, *guests} for own, guests in zip(own, _deal(pseudo_labelled, folds, random), strict=True)]
    splits = []
    for fold in range(folds):
        train = set().union(*(hands[(fold + after) % folds] for after in range(left_out, folds)))
        splits.append(Split(tuple(sorted(train)), tuple(sorted(own[fold]))))
    return tuple(splits)


def write_dataset(
    dataset: str,
    cases: Sequence[str],
    config: Config,
    workspace: Workspace,
    pseudo_labels: Mapping[str, Path] | None = None,
) -> None:
    """Write nnU-Net's dataset.json; it points at the prepared files, so nothing is copied.

    ``cases``: the labelled ones. ``pseudo_labels``: label map by case of those that have no other.
    """
    label = workspace.training_label if config.data.auxiliary_classes else workspace.label
    labels = {case: label(case) for case in cases} | dict(pseudo_labels or {})
    path = workspace.raw_dataset(dataset)
    relative = partial(os.path.relpath, start=path.parent)
    content = {
        "channel_names": {"0": "CT"},
        "labels": {name: value for value, name in enumerate(config.classes)},
        "numTraining": len(labels),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": READER,
        "dataset": {
            case: {"images": [relative(workspace.image(case))], "label": relative(file)}
            for case, file in labels.items()
        },
    }
    for target in (path, workspace.preprocessed(dataset) / "dataset.json"):
        _write_json(target, content)


def write_splits(dataset: str, splits: Sequence[Split], workspace: Workspace) -> None:
    """Write nnU-Net's split file."""
    _write_json(workspace.splits(dataset), [{"train": list(split.train), "val": list(split.val)} for split in splits])


def make_plan(dataset: str, config: Config, workspace: Workspace) -> None:
    """Write the plan of a data set from nnU-Net's fingerprint of its organs and the settings; an existing plan stays."""
    if workspace.plans(dataset).exists():
        return
    with environment(config, workspace), contextlib.redirect_stdout(None):  # nnU-Net prints what it finds
        fingerprint = _fingerprint(dataset, config, workspace)
        if config.network.plan == "nnunet":
            plans = _planned_by_nnunet(dataset)
        else:
            plans = _plans_from_settings(dataset, fingerprint, config)
    configuration = plans["configurations"][CONFIGURATION]
    configuration["spacing"] = list(config.prepare.spacing)
    for kind in ("data", "seg", "probabilities"):
        # The prepared grid is the working grid, so only nnU-Net's own predictor resamples: trilinear, both ways.
        configuration[f"resampling_fn_{kind}_kwargs"]["force_separate_z"] = False
    plans["configurations"] = {CONFIGURATION: configuration}
    _write_json(workspace.plans(dataset), plans)


def share_plan(dataset: str, workspace: Workspace) -> None:
    """Give another data set of the run the plan and the fingerprint of the labelled one; an existing plan stays."""
    if workspace.plans(dataset).exists():
        return
    workspace.preprocessed(dataset).mkdir(parents=True, exist_ok=True)
    atomic_write(workspace.fingerprint(dataset), workspace.fingerprint(LABELLED_DATASET).read_bytes())
    _write_json(workspace.plans(dataset), read_plans(LABELLED_DATASET, workspace) | {"dataset_name": dataset})


def preprocess(dataset: str, config: Config, workspace: Workspace, earlier: Sequence[str] = ()) -> None:
    """nnU-Net's preprocessing (crop, normalise) of every case that has not been through it, several at once.

    ``earlier``: data sets of this run whose files are taken over by hard links where they are the same: all of a labelled
    case, the image of a pseudo-labelled one. A scan is then on the disk once, however many iterations there are.
    """
    folder = workspace.preprocessed_cases(dataset)
    (folder / "part").mkdir(parents=True, exist_ok=True)
    cases = read_cases(dataset, workspace)
    for case in cases:
        _take_over(case, dataset, earlier, workspace)
    todo = [case for case in cases if not (folder / f"{case}.pkl").exists()]
    log.info("preprocess: %d of %d cases to do", len(todo), len(cases))
    if not todo:
        return
    job = partial(_preprocess_case, dataset=dataset, earlier=tuple(earlier), config=config, workspace=workspace)
    workers = worker_count(config.prepare.workers, len(todo))
    with contextlib.ExitStack() as stack:
        # One alone works here: a process of its own would only import nnU-Net once more.
        run = map if workers == 1 else stack.enter_context(process_pool(workers)).map
        for count, _ in enumerate(run(job, todo), 1):
            if count % 10 == 0 or count == len(todo):
                log.info("preprocess: %d of %d", count, len(todo))


def set_training(training: Training, dataset: str, workspace: Workspace, warm_start: str | None = None) -> None:
    """Write the training's settings into the plan, where the trainer reads them; the rest of the plan stays.

    ``warm_start``: a data set of this run whose models the training starts from, fold by fold; without one, what
    ``training.start_from`` names, if anything. Raises TrainingError where that does not exist.
    """
    plans = read_plans(dataset, workspace)
    start = start_file(training.start_from)
    source = start if warm_start is None else workspace.model(warm_start).resolve()
    initial = None if source is None else str(source)
    wanted = plans | {"training": asdict(training) | {"initial_weights": initial}}
    if wanted != plans:
        _write_json(workspace.plans(dataset), wanted)


def start_file(named: str) -> Path | None:
    """The file of ``training.start_from``: a checkpoint, or the network of a bundle's folder. Raises TrainingError."""
    if not named:
        return None
    start = Path(named).resolve()
    if start.is_dir():
        try:
            return start / read_bundle(start).plan.model.file
        except (ValueError, OSError) as error:
            raise TrainingError(f"training.start_from is {named!r}: {error}") from error
    if not start.is_file():
        raise TrainingError(f"training.start_from is {named!r}; expected a training's checkpoint or a bundle's folder")
    return start


def train(dataset: str, fold: int | str, config: Config, workspace: Workspace, warm_start: str | None = None) -> None:
    """Train one fold with nnU-Net's trainer, going on from its last checkpoint; a finished training is left alone.

    ``fold``: an index of the split file, or "all" for one model on every case. ``warm_start``: see ``set_training``,
    which must have been called where folds train side by side. Raises TrainingError.
    """
    if workspace.final_checkpoint(dataset, fold).exists():
        log.info("train: fold %s is done", fold)
        return
    _check_split(dataset, fold, workspace)
    set_training(config.training, dataset, workspace, warm_start)
    initial = read_plans(dataset, workspace)["training"]["initial_weights"]
    workspace.fold(dataset, fold).mkdir(parents=True, exist_ok=True)
    resume = workspace.latest_checkpoint(dataset, fold).exists()
    device = _device(config.training)
    begun = "from scratch" if initial is None else f"from {initial}"
    log.info("train: fold %s on %s, %s", fold, device, "from its last checkpoint" if resume else begun)
    with environment(config, workspace), workspace.nnunet_log(dataset, fold).open("a", encoding="utf-8") as output:
        import torch
        from nnunetv2.run.run_training import run_training

        if device == "cpu":
            torch.set_num_threads(config.training.threads or len(os.sched_getaffinity(0)))
        with contextlib.redirect_stdout(output):
            run_training(
                dataset,
                CONFIGURATION,
                fold,
                TRAINER,
                PLANS,
                continue_training=resume,
                device=torch.device(device),
            )


def read_cases(dataset: str, workspace: Workspace) -> tuple[str, ...]:
    """Training cases of a data set, the labelled ones first. Raises TrainingError when there is none."""
    path = workspace.raw_dataset(dataset)
    try:
        return tuple(json.loads(path.read_text(encoding="utf-8"))["dataset"])
    except (OSError, json.JSONDecodeError) as error:
        raise TrainingError(f"{path}: cannot be read ({error}); expected nnU-Net's data set of the run") from error


def read_plans(dataset: str, workspace: Workspace) -> dict[str, Any]:
    """The plan of a data set. Raises TrainingError when there is none."""
    path = workspace.plans(dataset)
    try:
        plans: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise TrainingError(f"{path}: cannot be read ({error}); expected nnU-Net's plan of the run") from error
    return plans


def load_network(dataset: str, checkpoint: Path, config: Config, workspace: Workspace) -> Any:
    """The trained network as a torch module in float32: (1, 1, z, y, x) -> (1, classes, z, y, x), no deep supervision."""
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    architecture = read_plans(dataset, workspace)["configurations"][CONFIGURATION]["architecture"]
    network = get_network_from_plans(
        architecture["network_class_name"],
        architecture["arch_kwargs"],
        architecture["_kw_requires_import"],
        1,
        len(config.classes),
        allow_init=False,
        deep_supervision=False,
    )
    try:
        # The file is our own; nnU-Net stores its log beside the weights, which torch's safe loading refuses.
        weights = torch.load(checkpoint, map_location="cpu", weights_only=False)["network_weights"]
    except FileNotFoundError as error:
        raise TrainingError(f"{checkpoint}: does not exist; expected the checkpoint of a training") from error
    network.load_state_dict(weights)
    return network.float().eval()


def _deal(cases: Sequence[str], folds: int, random: np.random.Generator) -> list[list[str]]:
    order = [sorted(cases)[index] for index in random.permutation(len(cases))]
    return [order[fold::folds] for fold in range(folds)]


@contextlib.contextmanager
def environment(config: Config, workspace: Workspace) -> Iterator[None]:
    """nnU-Net's environment variables, for as long as it works."""
    variables = {
        "nnUNet_raw": str(workspace.nnunet_raw.resolve()),
        "nnUNet_preprocessed": str(workspace.nnunet_preprocessed.resolve()),
        "nnUNet_results": str(workspace.nnunet_results.resolve()),
        "nnUNet_extTrainer": str(TRAINER_FOLDER),
    }
    workers = 0 if config.training.deterministic else config.training.augmentation_workers
    if workers >= 0:
        variables["nnUNet_n_proc_DA"] = str(workers)
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _fingerprint(dataset: str, config: Config, workspace: Workspace) -> dict[str, Any]:
    """nnU-Net's fingerprint. Its intensities are those of the organs on the scans' own grids, which the run has measured."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    extractor = DatasetFingerprintExtractor(dataset, worker_count(config.prepare.workers, 64))
    extractor.show_progress_bar = False
    for case, files in extractor.dataset.items():
        files["label"] = str(workspace.label(case).resolve())
    log.info("fingerprint: %d cases", len(extractor.dataset))
    extractor.run(overwrite_existing=True)
    fingerprint: dict[str, Any] = json.loads(workspace.fingerprint(dataset).read_text(encoding="utf-8"))
    fingerprint[INTENSITIES] = {"0": read_intensities(workspace.intensities)}
    _write_json(workspace.fingerprint(dataset), fingerprint)
    return fingerprint


def _planned_by_nnunet(dataset: str) -> dict[str, Any]:
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.utilities.json_export import recursive_fix_for_json_export

    planner = ExperimentPlanner(dataset, suppress_transpose=True)
    plans: dict[str, Any] = planner.plan_experiment()
    recursive_fix_for_json_export(plans)
    return plans


def _plans_from_settings(dataset: str, fingerprint: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Plans as nnU-Net writes them, with patch and network from the settings."""
    shape = [round(size) for size in np.median(fingerprint["shapes_after_crop"], axis=0)]
    return {
        "dataset_name": dataset,
        "plans_name": PLANS,
        "original_median_spacing_after_transp": list(config.prepare.spacing),
        "original_median_shape_after_transp": shape,
        "image_reader_writer": READER,
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: _configuration(shape, config)},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        INTENSITIES: fingerprint[INTENSITIES],
    }


def _configuration(shape: Sequence[int], config: Config) -> dict[str, Any]:
    resample = "resample_data_or_seg_to_shape"
    return {
        "data_identifier": f"{PLANS}_{CONFIGURATION}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": config.network.batch_size,
        "patch_size": list(config.network.patch),
        "median_image_size_in_voxels": list(shape),
        "spacing": list(config.prepare.spacing),
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": resample,
        "resampling_fn_seg": resample,
        "resampling_fn_probabilities": resample,
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": False},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": False},
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": False},
        "batch_dice": config.network.batch_dice,
        "architecture": architecture(config),
    }


def architecture(config: Config) -> dict[str, Any]:
    """nnU-Net's plain convolutional U-Net of the settings, as its plans describe it."""
    network = config.network
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": len(network.features),
            "features_per_stage": list(network.features),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [list(kernel) for kernel in network.kernels],
            "strides": [list(stride) for stride in network.strides],
            "n_conv_per_stage": list(network.encoder_convolutions),
            "n_conv_per_stage_decoder": list(network.decoder_convolutions),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _take_over(case: str, dataset: str, earlier: Sequence[str], workspace: Workspace) -> None:
    """Link a preprocessed case of an earlier data set into ``dataset`` where its label map is the same file."""
    target = workspace.preprocessed_cases(dataset)
    label = _label_of(case, dataset, workspace)
    for source in earlier:
        folder = workspace.preprocessed_cases(source)
        if (target / f"{case}.pkl").exists():
            return
        if (folder / f"{case}.pkl").exists() and _label_of(case, source, workspace) == label:
            with contextlib.suppress(OSError):  # no hard links here: preprocessed like the others
                for suffix in CASE_FILES:
                    _link(folder / f"{case}{suffix}", target / f"{case}{suffix}")


@lru_cache(maxsize=4)
def _labels_of(path: Path, modified: int) -> dict[str, str]:
    """Label map by case, as a dataset.json names them."""
    cases = json.loads(path.read_text(encoding="utf-8"))["dataset"]
    return {case: str((path.parent / files["label"]).resolve()) for case, files in cases.items()}


def _label_of(case: str, dataset: str, workspace: Workspace) -> str | None:
    path = workspace.raw_dataset(dataset)
    return _labels_of(path, path.stat().st_mtime_ns).get(case)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    os.link(source, target)


def _preprocess_case(case: str, dataset: str, earlier: Sequence[str], config: Config, workspace: Workspace) -> None:
    """One case through nnU-Net's preprocessor: written apart, then moved, the .pkl that marks it as done last."""
    part = workspace.preprocessed_cases(dataset) / "part"
    for suffix in CASE_FILES:
        (part / f"{case}{suffix}").unlink(missing_ok=True)  # of a process that was killed
    with environment(config, workspace):
        from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        dataset_json = json.loads(workspace.raw_dataset(dataset).read_text(encoding="utf-8"))
        base = workspace.raw_dataset(dataset).parent
        files = dataset_json["dataset"][case]
        plans = PlansManager(str(workspace.plans(dataset)))
        try:
            DefaultPreprocessor(verbose=False).run_case_save(
                str(part / case),
                [str((base / image).resolve()) for image in files["images"]],
                str((base / files["label"]).resolve()),
                plans,
                plans.get_configuration(CONFIGURATION),
                dataset_json,
            )
        except RuntimeError as error:  # blosc2 does not say that a disk is full
            free = shutil.disk_usage(part).free / 1e9
            raise TrainingError(
                f"{part / case}: nnU-Net cannot write the preprocessed case ({error}); {free:.3f} GB of disk are free"
            ) from error
    for source in earlier:
        image = workspace.preprocessed_cases(source) / f"{case}{CASE_FILES[0]}"
        if image.exists():
            with contextlib.suppress(OSError):
                _link(image, part / f"{case}{CASE_FILES[0]}")
            break
    for suffix in CASE_FILES:
        (part / f"{case}{suffix}").replace(part.parent / f"{case}{suffix}")


def _check_split(dataset: str, fold: int | str, workspace: Workspace) -> None:
    """nnU-Net makes up a split of its own for a fold that the file does not have; we refuse."""
    splits = json.loads(workspace.splits(dataset).read_text(encoding="utf-8"))
    if fold == "all":
        return
    if not 0 <= int(fold) < len(splits):
        raise TrainingError(f"fold {fold}; expected 0 to {len(splits) - 1} or all")
    if not splits[int(fold)]["train"] or not splits[int(fold)]["val"]:
        raise TrainingError(
            f"fold {fold} has no case to train on or to validate on; expected at least {len(splits)} cases"
        )


def _device(training: Training) -> str:
    import torch

    if training.device != "auto":
        if training.device == "cuda" and not torch.cuda.is_available():
            raise TrainingError("training.device is 'cuda'; no GPU that torch can use was found")
        return training.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())


def predict(bundle: Bundle, scan: Volume, engine: Engine, separate_z: bool | None) -> Labels:
    """What nnU-Net's own predictor makes of a scan: label map (z, y, x) on the scan's grid, no mirroring, no rules.

    The network is the bundle's, run by ``engine``; preprocessing, sliding window and both resamplings are nnU-Net's.
    ``separate_z`` is the plan's ``force_separate_z``: None, nnU-Net's default, resamples z apart where voxels are longer
    than three times their width; False does not.
    """
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    class Network(torch.nn.Module):
        def forward(self, windows: Any) -> Any:
            logits = [np.array(engine(window[0].numpy())) for window in windows]
            return torch.from_numpy(np.stack(logits))

    plan = bundle.plan
    manager = PlansManager(_plans_of_bundle(plan, separate_z))
    labels = {name: index for index, name in enumerate(plan.classes)}
    with contextlib.redirect_stdout(None):  # it says that it found no GPU
        predictor = nnUNetPredictor(plan.step, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.manual_initialization(
        Network(),
        manager,
        manager.get_configuration(CONFIGURATION),
        [{}],
        {"labels": labels, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"},
        "nnUNetTrainer",
        None,
    )
    image = scan.voxels[None].astype(np.float32)
    found: Labels = predictor.predict_single_npy_array(image, {"spacing": list(scan.spacing)})
    return found


def _plans_of_bundle(plan: Plan, separate_z: bool | None) -> dict[str, Any]:
    """nnU-Net's plans for a bundle's network, with the resampling of our plans or (None) of nnU-Net's own."""
    resample = "resample_data_or_seg_to_shape"
    configuration: dict[str, Any] = {
        "data_identifier": f"{PLANS}_{CONFIGURATION}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(plan.patch),
        "median_image_size_in_voxels": list(plan.patch),
        "spacing": list(plan.spacing),
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": {"network_class_name": "", "arch_kwargs": {}, "_kw_requires_import": []},
    }
    # nnU-Net's default takes scans by cubic splines; a plan of ours says linear, as this core does.
    for kind, order in (("data", 3 if separate_z is None else 1), ("seg", 1), ("probabilities", 1)):
        configuration[f"resampling_fn_{kind}"] = resample
        configuration[f"resampling_fn_{kind}_kwargs"] = {
            "is_seg": kind == "seg",
            "order": order,
            "order_z": 0,
            "force_separate_z": separate_z,
        }
    intensity = plan.intensity
    statistics = {
        "percentile_00_5": intensity.clip_low,
        "percentile_99_5": intensity.clip_high,
        "mean": intensity.mean,
        "std": intensity.std,
    }
    return {
        "dataset_name": "Dataset001_Bundle",
        "plans_name": PLANS,
        "original_median_spacing_after_transp": list(plan.spacing),
        "original_median_shape_after_transp": list(plan.patch),
        "image_reader_writer": READER,
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        INTENSITIES: {"0": statistics},
    }
