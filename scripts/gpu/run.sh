#!/usr/bin/env bash
# What only a GPU can show, in parts of at most ten minutes, on a machine without a network.
#
#   scripts/gpu/run.sh wheels FOLDER [MORE]  where there is a network: what the machine may lack,
#                                          and more packages by name, such as cuda-core
#   scripts/gpu/run.sh all OUT [FOLDER]    the parts below in turn; a part that fails stops no other
#   scripts/gpu/run.sh build OUT [FOLDER]  build and install into build/gpu, offline from FOLDER
#   scripts/gpu/run.sh tests OUT           the tests marked gpu
#   scripts/gpu/run.sh triton OUT          noise and loops of Triton against the hashes of the CPU
#   scripts/gpu/run.sh cuda OUT            those of CUDA C++
#   scripts/gpu/run.sh bench OUT           kernels, loops and modes, as JSON
#   scripts/gpu/run.sh sanitize OUT        the kernels' tests under compute-sanitizer; not in "all"
#
# $PYTHON (python3) needs torch with CUDA, Triton, pip and a C++17 compiler. README.md says what
# each part writes into OUT.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${PYTHON:-python3}"
site="$root/build/gpu"
part="${1:?wheels, all, build, tests, triton, cuda, bench or sanitize}"
out="$(mkdir -p "${2:?a folder}" && cd "$2" && pwd)"
wheels=""
if [ "$part" != wheels ] && [ -n "${3:-}" ]; then
  wheels="$(cd "$3" && pwd)"
fi
limit=570  # seconds of a part

# the installed package, not the checkout's, which has no extension
run() {
  (cd "$root" && PYTHONPATH="$site:$root/tests" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 \
    timeout "$limit" "$@")
}

logged() {
  local log="$out/$1.log" code=0
  shift
  run "$@" 2>&1 | tee "$log" || code=$?
  echo "ended with $code" >>"$log"
  return "$code"
}

case "$part" in
  wheels)
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --dest "$out" \
      --implementation cp --python-version "${PYTHON_VERSION:-3.12}" \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
      --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
      nanobind scikit-build-core packaging pathspec ninja tqdm pytest pluggy iniconfig "${@:3}"
    ;;
  all)
    code=0
    for each in build tests triton cuda bench; do
      "${BASH_SOURCE[0]}" "$each" "$out" ${wheels:+"$wheels"} || code=1
    done
    exit "$code"
    ;;
  build)
    rm -rf "$site"
    if [ -n "$wheels" ]; then
      run "$python" -m pip install --quiet --no-index --no-deps --target "$site" "$wheels"/*.whl
    fi
    logged build env PATH="$site/bin:$PATH" "$python" -m pip install --quiet --no-deps \
      --no-index --no-build-isolation --upgrade --target "$site" "$root"
    run "$python" -m fastdiff doctor | tee "$out/doctor.txt"
    ;;
  tests)
    logged tests "$python" -m pytest -m gpu -p no:cacheprovider -q "$root/tests/test_gpu.py" \
      "$root/tests/test_modulate_gpu.py" "$root/tests/test_sampler_gpu.py"
    ;;
  triton | cuda)
    logged "$part" "$python" "$root/scripts/gpu/hashes.py" compare --backends "$part"
    ;;
  bench)
    logged bench "$python" "$root/scripts/gpu/bench.py" --out "$out/gpu_bench.json"
    ;;
  sanitize)
    # torch's cache of memory would hide what is written beside a tensor; large cases take too long
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    code=0 limit=190
    for tool in memcheck racecheck initcheck; do
      logged "sanitize-$tool" compute-sanitizer --tool "$tool" --error-exitcode 86 \
        "$python" -m pytest -m gpu -p no:cacheprovider -q "$root/tests/test_gpu.py" \
        "$root/tests/test_modulate_gpu.py" -k "not n4194304 and not n1048579" || code=1
    done
    exit "$code"
    ;;
  *)
    echo "gpu: part must be wheels, all, build, tests, triton, cuda, bench or sanitize, got $part" >&2
    exit 2
    ;;
esac
