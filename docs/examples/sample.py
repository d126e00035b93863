"""Samples of the bundled model at three temperatures, as one picture.

python sample.py samples.png
"""

import sys

import numpy as np

import hflow_rt

session = hflow_rt.load("hflow-emoji")  # or load("runs/my-run", backend="trt", device="cuda")
rows = [session.sample(8, std=std, seed=1) for std in (0.5, 0.7, 1.0)]  # the same noise, three times
session.save(np.concatenate(rows), sys.argv[1])
