"""A picture as latents and back, and what one level of them holds.

python encode.py photo.png without_detail.png
"""

import sys

import numpy as np

import hflow_rt

source, target = sys.argv[1:]
session = hflow_rt.load("hflow-emoji")
image = session.read(source)  # float32 [1, 3, R, R] in [0, 1]
encoded = session.inverse(image)
again = session.forward(encoded.latents)
print(f"{source}: {float(session.bits_per_dim(encoded.log_prob)[0]):.3f} bits/dim")
print("every 8-bit value comes back:", bool((np.rint(again * 255) == np.rint(image * 255)).all()))

finest = list(session.latent_shapes)[-1]
session.save(session.forward(encoded.latents | {finest: np.zeros_like(encoded.latents[finest])}), target)
