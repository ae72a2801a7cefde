#!/usr/bin/env bash
# Runs every stage of run.sh end to end without a GPU: Triton's interpreter, the emulated CUDA library, tiny
# shapes, the CPU's clock. What that leaves untried: rehearsal.py. Then files the archive. No figure of it means anything.
#   benchmarks/gpu/rehearse.sh [FOLDER]       default: a new one under /tmp
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
folder="${1:-$(mktemp -d)}"
mkdir -p "$folder/bin"
# In the place of compute-sanitizer: runs what follows its options.
printf '#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift 2; done\nexec "$@"\n' > "$folder/bin/compute-sanitizer"
chmod +x "$folder/bin/compute-sanitizer"
export PATH="$folder/bin:$PATH" SHIFT_GPU_REHEARSAL=1 OMP_NUM_THREADS=1
"$here/run.sh" "$folder/out" --work "$folder/work" --seconds 1200
cd "$here/../.."
PYTHONPATH="$PWD" "${PYTHON:-python3}" -m benchmarks.gpu.collect "$folder/out/results.tar.gz" --results "$folder/results"
