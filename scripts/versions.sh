#!/usr/bin/env bash
# The package as a user gets it: wheel and sdist are built, the wheel is installed into a fresh
# environment and draws a picture there with no compiler on PATH and no network, and the Triton
# tests run with each release of Triton that is named.
#
#   scripts/versions.sh [FOLDER]      where to build; a new temporary one without it
#
# PYTHON: the interpreter (python3). TORCH: a release of torch, in place of that of constraints.txt.
# TRITONS: releases to test with, oldest first ("3.6.0 3.7.1"). SUITE: with it the whole test suite
# runs at the end, on so many workers, with the last of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root="$PWD"
work="${1:-$(mktemp -d)}"
python="${PYTHON:-python3}"
tritons="${TRITONS-3.6.0 3.7.1}"
mkdir -p "$work"
constraints="$root/constraints.txt"
if [ -n "${TORCH:-}" ]; then # with the Triton and the CUDA libraries that it asks for
  constraints="$work/constraints.txt"
  { sed '/^torch=\|^triton=\|^cuda-\|^nvidia-/d' constraints.txt; echo "torch==$TORCH"; } >"$constraints"
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

say() { printf '== %s\n' "$*"; }

say "sdist, and a wheel from nothing but the sdist"
"$python" -m venv "$work/build"
"$work/build/bin/pip" install --quiet build
"$work/build/bin/python" -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 ||
  { tail -n 30 "$work/build.log"; exit 1; }
(cd "$work/dist" && ls -s --block-size=1K)

say "a fresh environment with the wheel"
"$python" -m venv "$work/user"
user="$work/user/bin"
"$user/pip" install --quiet -c "$constraints" torch "$work"/dist/*.whl
"$user/pip" check

say "without a compiler, without a network"
bare=(env -i "PATH=$user" "HOME=$work" "OMP_NUM_THREADS=$OMP_NUM_THREADS")
for tool in cc gcc g++ clang nvcc; do
  if "${bare[@]}" "$user/python" -c "import shutil, sys; sys.exit(not shutil.which('$tool'))"; then
    echo "a compiler is on PATH: $tool"
    exit 1
  fi
done
offline=()
if unshare --net true 2>/dev/null; then offline=(unshare --net); else echo "(no right to cut the network)"; fi
cd "$work" # the checkout must not be what is imported
"${offline[@]}" "${bare[@]}" "$user/fastdiff" doctor
"${offline[@]}" "${bare[@]}" "$user/fastdiff" sample --steps 4 --seeds 0-1 --out "$work/samples.png" |
  tee "$work/sample.log"
grep -q 'step kernel: cpu' "$work/sample.log"
test -s "$work/samples.png"

say "tests with each Triton"
"$user/pip" install --quiet -c "$constraints" pytest hypothesis scipy numpy
for release in $tritons; do
  "$user/pip" install --quiet --no-deps "triton==$release"
  say "triton $release, $("$user/python" -c 'import torch; print("torch", torch.__version__)')"
  # the installed package is tested, so the checkout's own folders stay off the path
  (cd "$root/tests" && "$user/python" -P -m pytest -q -c "$root/pyproject.toml" \
    --rootdir "$root" -p no:cacheprovider test_triton.py test_backends.py 2>&1 | tail -n 15)
done

if [ -n "${SUITE:-}" ]; then
  say "the whole suite"
  "$user/pip" install --quiet -c "$constraints" torchdiffeq scipy tqdm
  "$user/pip" install --quiet --no-deps k-diffusion==0.1.1.post1 torchsde trampoline
  (cd "$root" && "$user/pip" install --quiet -c "$constraints" -e '.[test]' &&
    "$user/python" -m pytest -q -n "$SUITE" -p no:cacheprovider 2>&1 | tail -n 40)
fi
say "done"
