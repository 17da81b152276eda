#!/bin/sh
# Segment abdominal CT scans: CASE_0000.nii.gz in, CASE.nii.gz out.
#   sh predict.sh [INPUTS OUTPUTS] [option ...]
# Without INPUTS OUTPUTS: /workspace/inputs and /workspace/outputs, or /inputs and /outputs where only those are mounted.
# Options are those of `python -m inference --help`. From a clone it runs .venv's Python where there is one; PYTHON=... picks another.
set -eu

home=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)

case ${1:--} in
-h | --help) ;;
-*)
  if [ -d /workspace/inputs ]; then
    set -- /workspace/inputs /workspace/outputs "$@"
  elif [ -d /inputs ]; then
    set -- /inputs /outputs "$@"
  else
    echo "predict.sh: neither /workspace/inputs nor /inputs is mounted; usage: sh predict.sh INPUTS OUTPUTS [option ...]" >&2
    exit 2
  fi
  ;;
esac

if [ -z "${PYTHON:-}" ]; then
  PYTHON=$home/.venv/bin/python
  [ -x "$PYTHON" ] || PYTHON=python3
fi

# One thread beside the engines, as in the paper. OpenVINO has threads of its own, which these do not touch: --threads counts those.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
export ORT_DISABLE_TELEMETRY=1
# glibc asks for pages of 2 MiB: clearing small ones took a twentieth of the CPU time. Other C libraries pass over it.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:+$GLIBC_TUNABLES:}glibc.malloc.hugetlb=1"
export PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}"

# -P: a folder `inference` where the caller stands is not the program.
exec "$PYTHON" -P -m inference "$@"
