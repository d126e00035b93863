// The engine of a page without a server: a worker of this browser runs the model.

import { Refused, Stale } from "./engine.js";

export async function browser(model) {
  const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  const asked = new Map();
  let count = 0;

  worker.addEventListener("message", ({ data: { id, result, error, stale } }) => {
    const { done, fail } = asked.get(id);
    asked.delete(id);
    if (stale) fail(new Stale());
    else if (error !== undefined) fail(new Refused(error));
    else done(result);
  });
  worker.addEventListener("error", (event) => {
    const error = new Refused(`the model cannot run in this browser: ${event.message ?? "it does not start"}`);
    for (const { fail } of asked.values()) fail(error);
    asked.clear();
  });

  const ask = (work, given, channel = null) =>
    new Promise((done, fail) => {
      asked.set(++count, { done, fail });
      worker.postMessage({ id: count, work, given, channel });
    });

  await ask("open", [model]);
  return {
    images: (recipes, how, channel) => ask("images", [recipes, how], channel),
    trajectory: (recipe, how) => ask("trajectory", [recipe, how], "trajectory"),
    animation: (recipes, how, onTheWay, fps) => ask("animation", [recipes, how, onTheWay, fps]),
    heat: (recipe, how, latent) => ask("heat", [recipe, how, latent], "heat"),
    latents: (recipes, how) => ask("latents", [recipes, how]),
    encode: (file, how, label) => ask("encode", [file, how, label]),
    attribute: (withIt, without) => ask("attribute", [withIt, without]),
    attributeFile: (id) => ask("attributeFile", [id]),
  };
}
