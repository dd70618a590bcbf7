#!/bin/sh
# Builds the library for AArch64 and runs the tests over it in qemu-user, so that NEON is tested on machines without it.
#   kernels/emulate.sh ROOT [pytest arguments]           default: all tests but those of plain C++ (tens of minutes)
# ROOT is the folder of an AArch64 system whose /usr/bin/python3 finds numpy and pytest (there, or on PYTHONPATH). Needs
# aarch64-linux-gnu-g++ and qemu-aarch64. QEMU_CPU chooses the processor: max has dotprod and i8mm, cortex-a72 neither.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$1
shift
[ $# -gt 0 ] || set -- tests -k "not plain"
qemu=$(command -v qemu-aarch64 || command -v qemu-aarch64-static) || { echo "qemu-aarch64 is not installed" >&2; exit 2; }
[ -e "$root/usr/bin/python3" ] || { echo "$root has no usr/bin/python3; expected an AArch64 system" >&2; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cmake -S "$here" -B "$folder" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ > "$folder/log" && cmake --build "$folder" >> "$folder/log" \
  || { cat "$folder/log"; exit 1; }
cd "$here"
QEMU_CPU=${QEMU_CPU:-max} HEADRACE_KERNELS="$folder/libheadrace_kernels.so" PYTHONPATH="$here/src:${PYTHONPATH:-}" \
  OPENBLAS_NUM_THREADS=1 "$qemu" -L "$root" "$root/usr/bin/python3" -m pytest -q -p no:cacheprovider "$@"
