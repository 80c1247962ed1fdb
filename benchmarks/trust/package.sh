#!/bin/sh
# package.sh PYTHON FILE: install a wheel or an sdist into an empty environment, quantize, and generate images.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$1" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet -c constraints.txt torch
"$folder/venv/bin/python" -m pip install --quiet -c constraints.txt "$2"
cd "$folder" # so that nothing is imported from the checkout
venv/bin/stepquant --version
venv/bin/stepquant zoo
venv/bin/stepquant quantize zoo:fashion-ddpm --recipe minmax --bits w4a8 --samples 8 --steps 4 --out model
venv/bin/stepquant sample model --count 4 --steps 4 --out grid.png
test -s grid.png
venv/bin/python -m pip check
echo "$2: installs, quantizes and generates"
