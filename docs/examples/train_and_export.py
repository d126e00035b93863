"""Train a small model on a folder of images for some minutes, and export engines that are proved to be the model.

python train_and_export.py photos/ runs/mine 2
"""

import sys

import hflow_rt

photos, run, minutes = sys.argv[1:]
hflow_rt.train("hflow-demo", data=photos, out=run, minutes=float(minutes))
hflow_rt.export(run)  # raises ParityError where an engine is not the model
report = hflow_rt.check(run)  # which can be asked again at any time, on any backend
print(f"proved on {report['backend']}: {report['passed']}")
session = hflow_rt.load(run)
session.save(session.sample(16), f"{run}/samples.png")
