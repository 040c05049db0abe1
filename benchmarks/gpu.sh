#!/usr/bin/env bash
# The zoo on a CUDA device: delest's estimate of what is allocated and reserved, against what is. Without one it says so and ends with 0.
#     bash benchmarks/gpu.sh [python]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${1:-$(command -v .venv-bench/bin/python || command -v python3)}"
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "no CUDA device that this build of torch can use: nothing was run (delest doctor says why)"
  exit 0
fi
exec "$PYTHON" benchmarks/footprint_gpu.py
