#!/usr/bin/env bash
# Builds, verifies, times, tunes and trains on this machine's GPU; ends within eight minutes.
#   benchmarks/gpu/run.sh [OUT] [STAGE...]    call it again while its exit code is 75; then send OUT/results.tar.gz
# Needs torch, triton and pytest; nvcc and compute-sanitizer are used where they are. Nothing is installed.
# Exit code: 0 all well, or no GPU (said); 1 something is wrong; 75 time is up and there is work left.
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.gpu.run "${@:-build/gpu-report}"
