#!/usr/bin/env bash
# Make the pictures of docs/latents.md by the commands on that page: docs/make_pictures.sh [MODEL]
set -euo pipefail
pictures=$(cd "$(dirname "$0")" && pwd)/images/latents
model=${1:+$(realpath "$1")}
model=${model:-hflow-emoji}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
hflow-rt() { command hflow-rt "$@" --model "$model"; }

# every indented command of the page, in its order
sed -n '/^```$/,/^```$/{/^```$/!p}' "$(dirname "$pictures")/../latents.md" > commands.sh
echo "$(grep -c '' commands.sh) commands"
. ./commands.sh
mkdir -p "$pictures"
mv ./*.png ./*.webp "$pictures"
ls -l "$pictures"
