"""A hosted demo with gradio: samples, and pictures through the model.

pip install gradio 'hflow-rt[cpu]' && python gradio_app.py
"""

import gradio as gr
import numpy as np
from PIL import Image

import hflow_rt
from hflow_rt.runtime.images.pictures import grid, to_uint8

session = hflow_rt.load("hflow-emoji")


def samples(seed: float, std: float) -> Image.Image:
    """Twelve images of a seed."""
    return grid(to_uint8(session.sample(12, std=std, seed=int(seed))), columns=4)


def through(picture: Image.Image, keep: float) -> tuple[Image.Image, str]:
    """A picture encoded, its finer latents faded, and decoded."""
    side = session.resolution
    pixels = np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS))[None]
    encoded = session.inverse(pixels)
    *coarse, finest = encoded.latents
    latents = encoded.latents | {finest: np.float32(keep) * encoded.latents[finest]}
    said = f"{float(session.bits_per_dim(encoded.log_prob)[0]):.3f} bits/dim; {', '.join(coarse)} as they are"
    return Image.fromarray(to_uint8(session.forward(latents))[0]), said


with gr.Blocks(title="hflow-rt") as demo:
    with gr.Tab("Samples"):
        gr.Interface(samples, [gr.Number(1, label="seed"), gr.Slider(0.1, 1.2, 0.7, label="std")], gr.Image())
    with gr.Tab("Your picture"):
        gr.Interface(through, [gr.Image(type="pil"), gr.Slider(0, 1, 1, label="detail")], [gr.Image(), gr.Text()])

if __name__ == "__main__":
    demo.launch()
