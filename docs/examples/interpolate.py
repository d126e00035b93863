"""From one picture to another through the latents, as an animation that goes there and back.

python interpolate.py a.png b.png walk.gif
"""

import sys

import numpy as np

import hflow_rt
from hflow_rt.runtime.images.pictures import to_uint8
from hflow_rt.runtime.images.video import save_animation
from hflow_rt.runtime.latents.latent_views import between
from hflow_rt.runtime.latents.operations import ping_pong

first, last, target = sys.argv[1:]
session = hflow_rt.load("hflow-emoji")
ends = session.inverse(session.read(first, last)).latents
frames = np.concatenate([to_uint8(frame) for frame in between(session, ends, 24, mode="slerp")])
save_animation(target, frames, fps=12, order=ping_pong(24))
