#!/usr/bin/env bash
# Builds, runs the GPU tests, plain and under compute-sanitizer, times every case, prints one table. Under nine
# minutes.
#   benchmarks/gpu/run.sh [OUT]      results: OUT/*.jsonl, OUT/table.md, OUT/slope.txt, OUT/summary.json
# Needs torch, triton, pytest; nvcc and compute-sanitizer are used where they are. Nothing is installed.
# Exit code: 0 all well, or no GPU (said); 1 a test or a case failed.
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu.run "${1:-benchmarks/results/gpu}"
