# The commands of the README. They need Python 3.11, and `make images` docker or podman.
#   make demo [SEED=n | SCAN=scan.nii.gz]   fresh synthetic scans, or a scan of yours, segmented with the shipped weights
#   make test, make test-long, make lint    what CI runs, what is too slow for it, style and types
#   make images [RUNTIMES=cpu]              organs:cpu and organs:gpu
#   make bench                              speed and memory beside nnU-Net's: docs/bench.json, and tables
PYTHON ?= $(shell command -v python3.11 || command -v python3)
SEED ?= 1
CASES ?= 2
RUNTIMES ?= cpu gpu

python := .venv/bin/python
pip := $(python) -m pip --disable-pip-version-check install
export ORT_DISABLE_TELEMETRY = 1

.PHONY: demo test test-long lint images bench

demo: .venv/demo-installed
	rm -rf demo
ifdef SCAN
	mkdir -p demo/inputs
	ln -s "$$(realpath "$(SCAN)")" demo/inputs/scan_0000.nii$(if $(filter %.gz,$(SCAN)),.gz)
	sh predict.sh demo/inputs demo/outputs
	$(python) -m train picture "$(SCAN)" demo/outputs/scan.nii.gz -o demo/picture.png
else
	$(python) -m train phantom demo --labelled 0 --test $(CASES) --seed $(SEED) --jobs 2
	sh predict.sh demo/imagesTs demo/outputs
	$(python) -m train evaluate --predictions demo/outputs --references demo/labelsTs --out demo/scores
	$(python) -m train picture demo/imagesTs/FLARE22_Ts_0001_0000.nii.gz demo/outputs/FLARE22_Ts_0001.nii.gz \
	  --reference demo/labelsTs/FLARE22_Ts_0001.nii.gz -o demo/picture.png
endif
	@echo "masks: demo/outputs    picture: demo/picture.png"

test: .venv/test-installed
	$(python) -m pytest

test-long: .venv/test-installed
	$(python) -m pytest -m long

bench: .venv/test-installed
	$(python) -m benchmarks.whole

lint: .venv/test-installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/shellcheck predict.sh .ci/run
	.venv/bin/hadolint Dockerfile.*

# CONTAINER_ENGINE: any command that understands docker's `build`. Without it, the first of docker and podman that answers.
images:
	@engine=$${CONTAINER_ENGINE:-}; \
	for each in docker podman; do \
	  [ -z "$$engine" ] && $$each info >/dev/null 2>&1 && engine=$$each; \
	done; \
	[ -n "$$engine" ] || { echo "make images: neither docker nor podman answers; CONTAINER_ENGINE names another" >&2; exit 1; }; \
	version=$$(git describe --always --dirty 2>/dev/null || echo unknown); \
	for runtime in $(RUNTIMES); do \
	  echo "$$engine build: organs:$$runtime"; \
	  $$engine build -f Dockerfile.infer -t "organs:$$runtime" \
	    --build-arg "RUNTIME=$$runtime" --build-arg "VERSION=$$version" . || exit 1; \
	done

# One environment, .venv: the demo's few packages (550 MB), and for tests and training the rest (7 GB, most of it torch's CUDA).
# --no-deps last: openvino must come without openvino-telemetry (inference/requirements-cpu.txt says why).
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 is needed, PYTHON=... names it; found " + sys.version)'
	$(PYTHON) -m venv .venv

.venv/demo-installed: inference/requirements-cpu.txt train/requirements.txt | .venv/bin/python
	@echo "Installing the packages of the demo into .venv"
	$(pip) --quiet --no-warn-conflicts -c inference/requirements-cpu.txt -c train/requirements.txt matplotlib scipy
	$(pip) --quiet --no-deps -r inference/requirements-cpu.txt
	touch $@

.venv/test-installed: inference/requirements-cpu.txt train/requirements.txt tests/requirements.txt | .venv/bin/python
	@echo "Installing torch, nnU-Net and the test tools into .venv: 7 GB, several minutes the first time"
	$(pip) --quiet --no-warn-conflicts -c inference/requirements-cpu.txt -r train/requirements.txt -r tests/requirements.txt
	$(pip) --quiet --no-deps -r inference/requirements-cpu.txt
	touch $@ .venv/demo-installed
