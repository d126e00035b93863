// The samples of a seed: as many at a time as the model makes in a moment.

import { paint } from "./canvas.js";
import { at, made } from "./dom.js";
import { gridRecipes, howOf } from "./recipes.js";

const MOMENT = 100; // ms that a call may take: what a slider asks for waits no longer
const QUIET = 200; // ms without a change after which samples follow

export function samples(model, engine, choose, failed) {
  const grid = at("grid");
  const buttons = [];
  let each = model.steps > 1 ? MOMENT : MOMENT / 4; // ms an image takes, as far as is known
  let round = 0;
  let shown = "";

  function button(image) {
    const canvas = made("canvas", { width: model.resolution, height: model.resolution });
    const found = made("button", { type: "button" }, canvas, made("span", {}, String(image)));
    found.addEventListener("click", (event) => choose(image, event.shiftKey));
    found.addEventListener("keydown", (event) => {
      const columns = getComputedStyle(grid).gridTemplateColumns.split(" ").length;
      const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
      if (event.key in steps) {
        buttons[image + steps[event.key]]?.focus();
        event.preventDefault();
      } else if (event.key === "Enter" && event.shiftKey) {
        choose(image, true);
        event.preventDefault();
      }
    });
    return found;
  }

  function marked(state) {
    buttons.forEach((found, image) => {
      const isThis = !state.picture && image === state.image;
      const isOther = !state.otherPicture && image === state.other;
      found.classList.toggle("is-this", isThis);
      found.classList.toggle("is-other", isOther);
      found.setAttribute("aria-pressed", String(isThis));
      const role = isThis ? ", the picture" : isOther ? ", the other one" : "";
      found.setAttribute("aria-label", `sample ${image} of seed ${state.seed}${role}`);
    });
  }

  // Draws what is not drawn yet; another call ends it, because that draws what is wanted now.
  return async function show(state) {
    while (buttons.length < state.count) {
      buttons.push(button(buttons.length));
      grid.append(buttons.at(-1));
    }
    while (buttons.length > state.count) buttons.pop().remove();
    marked(state);
    const how = howOf(state, model);
    const what = JSON.stringify([gridRecipes(state, [0]), how]);
    if (what !== shown) buttons.forEach((found) => delete found.dataset.drawn);
    shown = what;
    const mine = ++round;
    delete grid.dataset.drawn;
    if (mine > 1) await new Promise((done) => setTimeout(done, QUIET));
    if (mine !== round) return;
    for (;;) {
      const waiting = buttons.map((found, image) => image).filter((image) => !buttons[image].dataset.drawn);
      if (!waiting.length) {
        grid.dataset.drawn = "yes";
        return;
      }
      const now = waiting.slice(0, Math.max(1, Math.min(16, Math.floor(MOMENT / each))));
      const began = performance.now();
      let pixels;
      try {
        pixels = await engine.images(gridRecipes(state, now), how, "samples");
      } catch (error) {
        if (mine === round) failed(error);
        return;
      }
      if (mine !== round) return;
      each = (performance.now() - began) / now.length;
      now.forEach((image, number) => {
        paint(buttons[image].querySelector("canvas"), pixels, model.resolution, number);
        buttons[image].dataset.drawn = "yes";
      });
    }
  };
}
