#!/bin/sh
# Builds the library with clang's sanitizers and lets libFuzzer look for programs and spans that it does not survive.
#   kernels/fuzz.sh [runs]                               default: 100000; CXX names clang++ 14 or newer
set -eu
here=$(cd "$(dirname "$0")" && pwd)
runs=${1:-100000}
: "${CXX:=$(command -v clang++ || command -v clang++-16 || command -v clang++-14)}"
export CXX
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cmake -S "$here" -B "$folder" -DSANITIZE="address;undefined;fuzzer-no-link" > "$folder/log" && cmake --build "$folder" -j "${JOBS:-2}" >> "$folder/log" \
  || { cat "$folder/log"; exit 1; }
"$CXX" -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=undefined "$here/fuzz/program_fuzzer.cpp" \
  -L"$folder" -lheadrace_kernels -Wl,-rpath,"$folder" -o "$folder/fuzz"
mkdir "$folder/corpus"
"$folder/fuzz" -runs="$runs" -max_len=512 -len_control=0 -rss_limit_mb=2048 -timeout=200 -print_final_stats=1 "$folder/corpus"
