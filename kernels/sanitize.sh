#!/bin/sh
# Builds the library with sanitizers and runs the tests over it: addresses and undefined behaviour, then threads.
#   kernels/sanitize.sh [python] [pytest arguments]      default: python3, all tests
# The thread sanitizer runs the tests of whole decoders, of hostile use, of arriving weights and of those that are copied, where threads meet.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=$(command -v "${1:-python3}")
case $python in /*) ;; *) python=$PWD/$python ;; esac  # the tests run in another folder
[ $# -gt 0 ] && shift
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
library() { # name of a sanitizer's runtime: where the compiler keeps it
  "${CXX:-c++}" -print-file-name="$1"
}
run() { # name, sanitizers, runtimes, tests
  name=$1 sanitizers=$2 runtimes=$3
  shift 3
  echo "== $name"
  cmake -S "$here" -B "$folder/$name" -DSANITIZE="$sanitizers" > "$folder/$name.log" && cmake --build "$folder/$name" -j "${JOBS:-2}" >> "$folder/$name.log" \
    || { cat "$folder/$name.log"; exit 1; }
  (cd "$here" && LD_PRELOAD=$runtimes ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
    TSAN_OPTIONS=halt_on_error=1:ignore_noninstrumented_modules=1 OPENBLAS_NUM_THREADS=1 \
    HEADRACE_KERNELS="$folder/$name/libheadrace_kernels.so" PYTHONPATH="$here/src" \
    "$python" -m pytest -q -p no:cacheprovider "$@")
}
run address "address;undefined" "$(library libasan.so) $(library libubsan.so)" tests "$@"
run thread thread "$(library libtsan.so)" tests/test_arrival.py tests/test_decoder.py tests/test_hostile.py tests/test_huge_pages.py \
  -k "company or cancel or merged or broken_spans or at_once or later or nobody_waits" "$@"
