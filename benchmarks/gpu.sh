#!/usr/bin/env bash
# Every check and measurement that waits for a GPU (CUDA, Python 3.12, jax 0.11), in
# under 10 minutes: `bash benchmarks/gpu.sh`. `--tiny` runs all of it on any backend.
# Exit code 1: something failed or was not equal, as the last lines of the output say.
# PYTHON names an interpreter that has jax and this package's requirements.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
missing=$("$python" - <<'PY'
import importlib.util
names = ("jax", "flax", "optax", "grain", "clu", "ml_collections", "jaxtyping", "absl")
print(" ".join(name for name in names if importlib.util.find_spec(name) is None))
PY
)
if [ -n "$missing" ]; then
  echo "$python lacks: $missing; install requirements.txt, or set PYTHON" >&2
  exit 2
fi
echo "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(date -u +%F)"
nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>/dev/null || true
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# Several steps start from the same state: it is compiled once.
if [ -z "${JAX_COMPILATION_CACHE_DIR:-}" ]; then
  JAX_COMPILATION_CACHE_DIR=$(mktemp -d)
  export JAX_COMPILATION_CACHE_DIR
  trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT
fi
"$python" benchmarks/gpu.py "$@"
