"""``python -m inference INPUTS OUTPUTS``: arguments only; the work is in pipeline.py."""

import argparse
import logging
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from inference.bundle import BundleError, read_bundle
from inference.engine import EngineError, import_engine, load_engine
from inference.pipeline import InputError, Options, Reader, Segmenter, check_outputs, find_cases, segment_cases

log = logging.getLogger("inference")

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
# Exit codes: everything done; some case failed; nothing could be started; stopped by a signal (128 + its number).
DONE, CASE_FAILED, NOT_STARTED = 0, 1, 2


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m inference",
        description="Segment abdominal CT scans: CASE_0000.nii.gz in, label map CASE.nii.gz out.",
    )
    parser.add_argument("inputs", type=Path, help="a scan CASE_0000.nii.gz (or .nii), or a folder of them")
    parser.add_argument("outputs", type=Path, help="folder for the masks; other files in it stay untouched")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder with plan.json and its network")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of the CPU engine; 0: the cores this process is given"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "f32", "bf16"),
        default="auto",
        help="f32: float32; bf16: bfloat16 (CPU) or float16 (GPU) where the hardware has it; auto: what the bundle says",
    )
    parser.add_argument("--step", type=float, help="window step as a fraction of the patch; default: the plan's")
    parser.add_argument(
        "--mirror",
        action="store_true",
        help="average the logits over all eight flips (slower; for networks trained with flips)",
    )
    parser.add_argument("--no-postprocessing", action="store_true", help="leave the network's labels as they are")
    parser.add_argument("--no-crop", action="store_true", help="work on the whole field of view, not on the body's box")
    parser.add_argument("--no-fit", action="store_true", help="windows of the plan's patch, however they fit the body")
    parser.add_argument("--report", type=Path, help="JSON with volumes, seconds, memory and warnings, outside OUTPUTS")
    parsed = parser.parse_args(arguments)
    if parsed.threads < 0:
        parser.error(f"--threads is {parsed.threads}; expected 0 or more")
    if parsed.step is not None and not 0 < parsed.step <= 1:
        parser.error(f"--step is {parsed.step}; expected a number above 0 and at most 1")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    start = {"imports": process_age()}
    parsed = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(message)s", stream=sys.stderr)
    # docker stop sends SIGTERM: leave through the same door as Ctrl-C, which removes a half-written mask.
    signal.signal(signal.SIGTERM, _stop)
    try:
        cases, problems = find_cases(parsed.inputs, parsed.outputs)
        check_outputs(parsed.inputs, parsed.outputs, parsed.report)
        with ThreadPoolExecutor(1, thread_name_prefix="bundle") as thread:
            reading = thread.submit(read_bundle, parsed.weights)
            import_engine(parsed.device)
        bundle = reading.result()
        reader = Reader(cases, bundle.plan.orientation)
        engine = load_engine(bundle, parsed.device, parsed.threads, parsed.precision)
        log.info("%s; %d case%s", engine.name, len(cases), "s" * (len(cases) != 1))
        mirror_axes = (0, 1, 2) if parsed.mirror else ()
        options = Options(parsed.step, mirror_axes, not parsed.no_postprocessing, not parsed.no_crop, not parsed.no_fit)
        segmenter = Segmenter(bundle, engine, options)
        del bundle, reading  # the network's bytes, which the engine has taken over
        start["engine"] = round(process_age() - start["imports"], 2)
        start["cpu_seconds"] = round(time.process_time(), 2)
        failed = segment_cases(cases, segmenter, problems, parsed.report, reader, start)
    except (InputError, BundleError, EngineError, OSError) as error:
        log.error("%s", error)
        return NOT_STARTED
    except KeyboardInterrupt:
        log.error("stopped; masks that were finished are whole, no other was written")
        return 128 + signal.SIGINT
    if failed:
        log.error("%d of %d failed", failed, len(cases) + len(problems))
    return CASE_FAILED if failed else DONE


def process_age() -> float:
    """Seconds since the operating system started this process (to 10 ms); 0 where /proc does not say."""
    try:
        # The program's name, in brackets, may hold anything.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return round(uptime - ticks / os.sysconf("SC_CLK_TCK"), 2)


def _stop(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
