#!/bin/sh
# Writes requirements.txt: every package that CI installs, by version and hash, for all platforms and Pythons. Needs uv.
# To move one package on: sh supply_chain/lock.sh --upgrade-package NAME; all of them: --upgrade
set -eu
cd "$(dirname "$0")/.."
uv pip compile pyproject.toml supply_chain/build.in --extra dev --extra qnn --universal --python-version 3.11 \
  --generate-hashes --no-annotate --no-header --no-emit-index-url --quiet --output-file supply_chain/requirements.txt "$@" \
  > /dev/null
