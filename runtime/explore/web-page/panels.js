// The sliders and buttons of every panel: they change the state, and show it.

import { at, made } from "./dom.js";
import { panelsOf } from "./state.js";

const PANELS = { change: "Change", between: "Between", mix: "Mix", attribute: "Attribute", time: "Over time" };

const rounded = (value) => String(Math.round(value * 1000) / 1000);

function slider(label, low, high, step, moved) {
  const value = made("output", { class: "value" });
  const input = made("input", { type: "range", min: low, max: high, step });
  const box = made("label", { class: "slider" }, made("span", {}, label), input, value);
  input.addEventListener("input", () => moved(Number(input.value), false));
  input.addEventListener("change", () => moved(Number(input.value), true));
  const show = (number) => {
    input.value = number;
    value.textContent = rounded(number);
  };
  return { box, show, input };
}

function number(label, moved) {
  const input = made("input", { type: "number", step: "any" });
  const box = made("label", { class: "slider" }, made("span", {}, label), input);
  input.addEventListener("change", () => {
    if (input.value !== "" && Number.isFinite(input.valueAsNumber)) moved(input.valueAsNumber, true);
  });
  return { box, show: (value) => (input.value = value), input };
}

// change(state => ..., whole): whole changes are steps that can be undone; act: what is asked for once
export function panels(model, change, act) {
  const shows = [];
  const available = panelsOf(model);

  const tabs = available.map((name) => {
    const tab = made("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": name }, PANELS[name]);
    tab.addEventListener("click", () => change((state) => (state.panel = name), true));
    tab.addEventListener("keydown", (event) => {
      const [here, last] = [available.indexOf(name), available.length - 1];
      const goal = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: last }[event.key];
      if (goal === undefined) return;
      event.preventDefault();
      const next = available[(goal + available.length) % available.length];
      at(`tab-${next}`).focus();
      at(`tab-${next}`).click();
    });
    return tab;
  });
  at("tabs").append(...tabs);
  shows.push((state) => {
    for (const name of Object.keys(PANELS)) {
      const chosen = name === state.panel;
      at(name).hidden = !chosen;
      at(`tab-${name}`)?.setAttribute("aria-selected", String(chosen));
      if (at(`tab-${name}`)) at(`tab-${name}`).tabIndex = chosen ? 0 : -1;
    }
  });

  for (const latent of model.latents) {
    const box = made("div", { class: "latent" });
    box.append(made("h3", {}, latent.name, " ", made("small", {}, latent.shape.join(" x "))));
    if (latent.std !== null) {
      const std = slider("std", 0.05, 1.5, 0.05, (value, whole) => change((state) => (state.std[latent.name] = value), whole));
      std.input.setAttribute("aria-label", `std of ${latent.name}`);
      box.append(std.box);
      shows.push((state) => std.show(state.std[latent.name]));
    }
    const redraw = made("button", { type: "button" }, "Redraw");
    const zero = made("button", { type: "button" }, "Zero");
    const heat = made("button", { type: "button" }, "Where it acts");
    for (const [button, what] of [[redraw, "redraw"], [zero, "zero"], [heat, "where it acts:"]]) {
      button.setAttribute("aria-label", `${what} ${latent.name}`);
    }
    redraw.addEventListener("click", () =>
      change((state) => {
        state.zeroed = state.zeroed.filter((name) => name !== latent.name);
        state.redrawn[latent.name] = Math.max(state.image, state.redrawn[latent.name] ?? 0, 999) + 1;
      }, true),
    );
    zero.addEventListener("click", () =>
      change((state) => {
        const gone = state.zeroed.includes(latent.name);
        const rest = state.zeroed.filter((name) => name !== latent.name);
        state.zeroed = gone ? rest : [...rest, latent.name];
      }, true),
    );
    heat.addEventListener("click", () => act.heat(latent.name));
    box.append(made("div", { class: "row" }, redraw, zero, heat));
    at("latents").append(box);
    shows.push((state) => {
      redraw.classList.toggle("on", latent.name in state.redrawn);
      zero.setAttribute("aria-pressed", String(state.zeroed.includes(latent.name)));
    });
  }

  for (const control of model.controls) {
    const moved = (value, whole) => change((state) => (state.control[control.name] = value), whole);
    const bounded = control.low !== null && control.high !== null && control.high - control.low < 1e4;
    const field = bounded
      ? slider(control.name, control.low, control.high, (control.high - control.low) / 100, moved)
      : number(control.name, moved);
    at("controls").append(field.box);
    shows.push((state) => field.show(state.control[control.name]));
  }
  if (model.fewer_steps) {
    const field = slider("steps", 1, model.steps, 1, (value, whole) => change((state) => (state.steps = value), whole));
    at("controls").append(field.box);
    shows.push((state) => field.show(state.steps));
  }
  at("plain").addEventListener("click", () => act.plain());

  const bind = (id, name, unit) => {
    const input = at(id);
    input.addEventListener("input", () => change((state) => (state[name] = Number(input.value)), false));
    input.addEventListener("change", () => change((state) => (state[name] = Number(input.value)), true));
    shows.push((state) => {
      input.value = state[name];
      input.setAttribute("aria-valuetext", `${rounded(state[name])}${unit}`);
    });
  };
  bind("share", "share", " of the way");
  bind("levels", "levels", " levels");
  bind("gain", "gain", " times the attribute");
  at("levels").max = model.slots ?? model.latents.length;
  shows.push((state) => {
    const names = model.slots === null ? model.latents.slice(0, state.levels).map((one) => one.name) : [];
    const layers = state.levels ? `layers 0 to ${state.levels - 1}` : "nothing";
    at("levels-said").textContent = `${model.slots === null ? names.join(", ") || "nothing" : layers} of the other one`;
  });

  const choices = (id, name, options) => {
    at(id).append(...options.map((option) => made("option", { value: option }, option)));
    at(id).addEventListener("change", () => change((state) => (state[name] = at(id).value), true));
    shows.push((state) => (at(id).value = state[name]));
  };
  choices("mode", "mode", model.modes);
  choices("space", "space", model.spaces);
  at("space-box").hidden = model.spaces.length < 2;

  const options = Object.values(model.conditions)[0] ?? [];
  at("label-box").hidden = !options.length;
  at("label").append(made("option", { value: "" }, "each in turn"), ...options.map((one) => made("option", { value: one }, one)));
  at("label").addEventListener("change", () => change((state) => (state.label = at("label").value), true));
  shows.push((state) => (at("label").value = state.label));

  return (state) => shows.forEach((show) => show(state));
}
