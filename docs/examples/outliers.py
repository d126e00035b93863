"""The pictures of a folder by what the model makes of them: those that it did not expect come first.

python outliers.py photos/
"""

import sys
from pathlib import Path

import hflow_rt

session = hflow_rt.load("hflow-emoji")
found = []
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        image = session.read(path)
    except hflow_rt.errors.DataError as error:
        print(error, file=sys.stderr)
        continue
    found.append((float(session.bits_per_dim(session.inverse(image).log_prob)[0]), path.name))
for bits, name in sorted(found, reverse=True):
    print(f"{bits:7.3f} bits/dim  {name}")
