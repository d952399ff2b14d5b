#!/usr/bin/env bash
# Everything that needs a GPU, inside ten minutes on one card: the tests marked gpu, then the benchmark on the shape of
# Llama-3.2-3B. The figures are kept under the card's name in tests/benchmark_results/.
set -uo pipefail
cd "$(dirname "$0")/.."

if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "no CUDA device: nothing was measured" >&2
    exit 2
fi
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"

timeout 240 python -m pytest -m gpu -rA tests
tests=$?
timeout 345 python tests/benchmark.py --backbone 3b --rounds 3 --with compiled
benchmark=$?

echo "-- summary"
python -c 'import torch; print("card:     ", torch.cuda.get_device_name())'
echo "tests:     $([ $tests -eq 0 ] && echo passed || echo "FAILED, exit code $tests")"
echo "benchmark: $([ $benchmark -eq 0 ] && echo done || echo "FAILED, exit code $benchmark (124: out of time)")"
[ $tests -eq 0 ] && [ $benchmark -eq 0 ]
