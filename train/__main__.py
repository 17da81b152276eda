"""``python -m train COMMAND``: each command lives in the module that does the work, and is imported when it is called.

So `phantom`, `evaluate` and `picture` run where torch and nnU-Net are not installed.
"""

import argparse
import importlib
import logging
import signal
import sys

log = logging.getLogger("train")

# command: (module with add_arguments(parser) and run(args) -> exit code, one line of help)
COMMANDS = {
    "phantom": ("train.phantom", "write a FLARE22 data set of synthetic abdomens with known truth"),
    "phantom-sheet": ("train.phantom.sheet", "a contact sheet of synthetic abdomens, as PNG"),
    "phantom-volumes": (
        "train.phantom.census",
        "organ volumes of many synthetic abdomens beside the literature, as a table",
    ),
    "alter": (
        "train.alter",
        "copies of scans and masks as a coarser scanner, or a body of another size, would give them",
    ),
    "fit": ("train.fit", "prepare a data set, train one nnU-Net, export its bundle"),
    "loop": ("train.loop", "self-training: from labelled and unlabelled scans to one bundle"),
    "status": ("train.status", "where a loop is: iteration, fold, epoch, cases, time left"),
    "export": ("train.export", "turn a trained checkpoint into a bundle: plan.json and model.onnx"),
    "average": ("train.average", "one bundle whose weights are the mean of several bundles' weights"),
    "evaluate": ("train.evaluate", "DSC and NSD per case and organ, as the challenge measures them"),
    "picture": ("train.picture", "a scan and its mask in three planes, as PNG"),
    "parity": ("train.parity", "compare this core with nnU-Net's own predictor, same weights, same scan"),
    "efficiency": (
        "train.efficiency",
        "time, GPU memory, CPU and RAM of a container per case, as the challenge measures them",
    ),
    "report": ("train.report", "a run of the loop as one HTML page: numbers, charts, cases to look at"),
    "ablate": ("train.ablate", "accuracy and time over a grid of inference settings: the paper's table 5"),
    "check": ("train.check", "would this image survive the challenge's machine? one line per demand, with the reason"),
    "baseline": ("train.baseline", "segment by thresholds and average positions: what a network has to beat"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code (2: wrong usage, 130: stopped by Ctrl-C, 143: by SIGTERM)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m train")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=line)
        if arguments and arguments[0] == name:
            importlib.import_module(module).add_arguments(command)
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(message)s", stream=sys.stderr)
    received = [signal.SIGINT]

    def stop(number: int, frame: object) -> None:
        # As Ctrl-C does: Ray, within whose calls the loop spends its time, passes no other exception on.
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        code: int = importlib.import_module(COMMANDS[parsed.command][0]).run(parsed)
    except KeyboardInterrupt:
        log.error("stopped; what was finished is kept, start the same command again to go on")
        return 128 + received[-1]
    return code


if __name__ == "__main__":
    sys.exit(main())
