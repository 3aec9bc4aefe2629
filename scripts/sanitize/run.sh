#!/usr/bin/env bash
# The op tests on a CPU extension built with sanitizers of gcc.
#
#   scripts/sanitize/run.sh address             AddressSanitizer and UndefinedBehaviorSanitizer
#   scripts/sanitize/run.sh thread              ThreadSanitizer, for the split of work over threads
#   scripts/sanitize/run.sh address --one-in 20 every 20th test; other words go to pytest
#
# $PYTHON (python3) needs torch and what the tests need. The build goes into build/sanitize/<kind>,
# never into an environment; delete the folder to build anew.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="$(command -v "${PYTHON:-python3}")"
kind="${1:?address or thread}"
shift

case "$kind" in
  address) flags=address,undefined library=libasan.so ;;
  thread) flags=thread library=libtsan.so ;;
  *) echo "sanitize: kind must be address or thread, got $kind" >&2; exit 2 ;;
esac

site="$root/build/sanitize/$kind"
if [ ! -d "$site/fastdiff" ]; then
  isolation=()
  if "$python" -c "import nanobind, ninja, scikit_build_core" 2>/dev/null; then
    isolation=(--no-build-isolation)
  fi
  "$python" -m pip install --quiet --no-deps "${isolation[@]}" --target "$site" \
    -C install.strip=false -C "cmake.define.FASTDIFF_SANITIZE=$flags" "$root"
fi

# what is compiled at run time has no part in the extension, and takes minutes here
tests=()
for op in add_noise brownian dynamic_threshold film_norm guidance_rescale mixed_batches modulate \
          noise reparameterize reverse_step torch_noise; do
  for file in "$root/tests/test_$op.py" "$root/tests/test_${op}"_*.py; do
    case "$file" in
      *_battery.py | *_compile.py | *_gpu.py | *_on_host.py | *"*"*) ;;
      *) tests+=("$file") ;;
    esac
  done
done

# The library of C++ must be there before the sanitizer looks for its exceptions. Leaks are not
# looked for: Python and torch leave memory to the end of the process. ThreadSanitizer's layout of
# memory allows for less random addresses than kernels give. Its threads are its own: torch's would
# wait for each other in libgomp, where it does not look.
fixed=(setarch -R)
"${fixed[@]}" true 2>/dev/null || fixed=()  # some containers forbid it
sanitized() {
  LD_PRELOAD="$(gcc -print-file-name=$library) $(gcc -print-file-name=libstdc++.so.6)" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
  UBSAN_OPTIONS=print_stacktrace=1 \
  TSAN_OPTIONS="halt_on_error=1:ignore_noninstrumented_modules=1" \
  OMP_NUM_THREADS="$([ "$kind" = thread ] && echo 1 || echo 3)" \
  FASTDIFF_SITE="$site" PYTHONPATH="$site:$root/scripts/sanitize" PYTHONDONTWRITEBYTECODE=1 \
    "${fixed[@]}" "$python" "$@"
}

cd "$site"
if sanitized "$root/scripts/sanitize/control.py" "$kind" 2>"$site/control.log" ||
  ! grep -q "SUMMARY: .*Sanitizer" "$site/control.log"; then
  cat "$site/control.log" >&2
  echo "sanitize: the control must be stopped by the sanitizer, and was not" >&2
  exit 1
fi
grep "SUMMARY: .*Sanitizer" "$site/control.log" | sed 's/^/as it must be: /'

sanitized -m pytest -q -p one_in -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" \
  -k "not compil and not opcheck and not hundred_million" "$@" "${tests[@]}"
