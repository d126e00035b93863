// The page: one state, which is in its address; what changes it, and what is drawn of it.

import { asPng, fromHex, largestDifference, paint, saved } from "./canvas.js";
import { at } from "./dom.js";
import { Lost, Refused, Stale, latest, opened } from "./engine.js";
import { samples } from "./grid.js";
import { panels } from "./panels.js";
import { changedStart, howOf, otherStart, recipeOf } from "./recipes.js";
import { fromAddress, initial, toAddress } from "./state.js";
import { commandOf, pythonOf } from "./words.js";

const FRAMES = 24;
const FPS = 12;

const say = (text) => (at("said").textContent = text);
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

async function begun() {
  for (;;) {
    try {
      return await opened();
    } catch (error) {
      complain(error instanceof Lost || error instanceof Refused ? error.message : String(error));
      if (!(error instanceof Lost)) throw error;
      await pause(1000);
    }
  }
}

function complain(text) {
  at("banner").textContent = text;
  at("banner").hidden = !text;
}

const { model, engine } = await begun();
const begin = initial(model);
let state = fromAddress(location.hash, begin, model);
const given = new Map(); // pictures people gave: id to file, original pixels and what is known
const sets = { with: [], without: [] };
let frames = null; // of a trajectory: what it is of, and its pixels
let playing = 0;
let lost = false;

// ---- what goes wrong

async function failed(error) {
  if (error instanceof Stale) return;
  if (error instanceof Refused) {
    complain(error.message);
    return;
  }
  if (!(error instanceof Lost)) {
    complain(`this page has a fault: ${error}`);
    throw error;
  }
  if (lost) return;
  lost = true;
  complain("The server does not answer. This page goes on when it does.");
  for (;;) {
    await pause(1000);
    try {
      const again = await fetch("model.json");
      if (again.ok) {
        if ((await again.json()).model !== model.model) location.reload();
        break;
      }
    } catch {
      // not yet
    }
  }
  lost = false;
  complain("");
  await keptAgain();
  show();
}

// What a server that was started anew no longer knows.
async function keptAgain() {
  for (const { file, how, label } of given.values()) {
    if (model.encodes) await engine.encode(file, how, label).catch(() => null);
  }
}

const guarded = (work) => async (...given) => {
  try {
    await work(...given);
  } catch (error) {
    await failed(error);
  }
};

// ---- what is drawn

const drawPicture = latest(
  guarded(async () => {
    if (state.panel === "time") return drawFrame();
    const now = state;
    const pixels = await engine.images([recipeOf(now, model)], howOf(now, model), "picture");
    paint(at("picture"), pixels, model.resolution);
    at("picture").dataset.shows = toAddress(now, begin);
    at("picture-said").textContent = captionOf(now, pixels);
    complain("");
  }),
);

const drawOther = latest(
  guarded(async () => {
    const pixels = await engine.images([otherStart(state)], howOf(state, model), "other");
    paint(at("other"), pixels, model.resolution);
    at("other").dataset.shows = toAddress(state, begin);
  }),
);

async function drawFrame() {
  const now = state;
  const of = JSON.stringify([changedStart(now), howOf(now, model)]);
  if (frames?.of !== of) {
    say("making every step…");
    frames = { of, pixels: await engine.trajectory(changedStart(now), howOf(now, model)) };
    at("frame").max = frames.pixels.length / (3 * model.resolution ** 2) - 1;
    at("frame").value = at("frame").max;
    say("");
  }
  paint(at("picture"), frames.pixels, model.resolution, Number(at("frame").value));
  at("picture").dataset.shows = toAddress(now, begin);
  at("picture-said").textContent = `after ${Number(at("frame").value) + 1} of ${Number(at("frame").max) + 1} steps`;
}

function captionOf(now, pixels) {
  const what = now.picture ? "from your picture" : `sample ${now.image} of seed ${now.seed}`;
  const changed = Object.keys(now.redrawn).length + now.zeroed.length ? ", changed" : "";
  if (now.panel === "between") return `${Math.round(now.share * 100)} % of the way from ${what}${changed}`;
  if (now.panel === "mix") return `${what}${changed}, mixed with the other one`;
  if (now.panel === "attribute" && now.attribute) return `${what}${changed}, attribute times ${now.gain}`;
  const known = given.get(now.picture);
  if (!known || changed) return `${what}${changed}`;
  const off = largestDifference(pixels, known.original);
  const same = off ? `differs by up to ${off} of 255` : "every 8-bit value comes back";
  const bits = known.bits_per_dim === undefined ? "" : `; ${known.bits_per_dim.toFixed(3)} bits/dim (plug-in estimate)`;
  const far = known.distance === undefined ? "" : `; distance ${known.distance.toFixed(3)}`;
  return `${what}: ${same}${bits}${far}`;
}

const showGrid = samples(model, engine, choose, (error) => failed(error));
const showPanels = panels(model, change, {
  heat: guarded(showHeat),
  plain: () => change((now) => Object.assign(now, { redrawn: {}, zeroed: [], std: { ...begin.std }, control: { ...begin.control }, steps: begin.steps }), true),
});

function show() {
  if (!at(state.panel)?.matches("[role=tabpanel]") || !at(`tab-${state.panel}`)) state.panel = begin.panel;
  showPanels(state);
  at("seed").value = state.seed;
  const known = given.get(state.picture);
  at("original-box").hidden = !known;
  if (known) paint(at("original"), known.original, model.resolution);
  at("forget").hidden = !state.picture && !state.otherPicture;
  const both = state.panel === "between" || state.panel === "mix";
  at("other-box").hidden = !both;
  at("other-said").textContent = state.otherPicture ? "the other one: your picture" : `the other one: sample ${state.other}`;
  at("picture").setAttribute("aria-label", state.picture ? "your picture through the model" : `sample ${state.image} of seed ${state.seed}`);
  at("original").setAttribute("aria-label", "your picture as you gave it");
  at("other").setAttribute("aria-label", at("other-said").textContent);
  at("command").textContent = commandOf(state, model);
  at("python").textContent = pythonOf(state, model);
  at("save-gif").disabled = !["between", "time"].includes(state.panel);
  at("save-attribute").disabled = !state.attribute;
  drawPicture();
  if (both) drawOther();
  showGrid(state);
}

// ---- what changes it

// whole: a step of its own, to which undo leads back; the rest is a slider on its way
function change(make, whole) {
  const next = structuredClone(state);
  make(next);
  state = next;
  at("heat-box").hidden = true;
  const address = toAddress(state, begin);
  if (whole && address !== current) {
    history.pushState(null, "", address);
    current = address;
  }
  show();
}
let current = toAddress(state, begin);

addEventListener("popstate", () => {
  state = fromAddress(location.hash, begin, model);
  current = toAddress(state, begin);
  at("heat-box").hidden = true;
  show();
});

function choose(image, asOther) {
  const other = asOther || at("chooses-other").checked;
  change((now) => {
    if (other) Object.assign(now, { other: image, otherPicture: "" });
    else Object.assign(now, { image, picture: "", redrawn: {}, zeroed: [] });
  }, true);
}

async function showHeat(latent) {
  say(`redrawing ${latent}…`);
  const now = state;
  const { pixels, largest } = await engine.heat(changedStart(now), howOf(now, model), latent);
  say("");
  if (now !== state) return;
  paint(at("heat"), pixels, model.resolution);
  at("heat").setAttribute("aria-label", `where ${latent} decides the picture`);
  at("heat-said").textContent = `where ${latent} acts: yellow most, std up to ${largest.toFixed(3)}`;
  at("heat-box").hidden = false;
}

// A picture of theirs, encoded or searched for; what is known of it.
async function take(file) {
  const how = howOf(state, model);
  say(`reading ${file.name}…`);
  let found;
  if (model.encodes) {
    found = await engine.encode(file, how, state.label);
  } else if (model.projects) {
    at("search").hidden = at("give-up").hidden = false;
    const ended = new AbortController();
    at("give-up").onclick = () => ended.abort();
    const began = performance.now();
    const news = ({ step, of, distance }) => {
      at("search").value = step / of;
      const left = Math.round((((performance.now() - began) / step) * (of - step)) / 1000);
      say(`searching: ${step} of ${of}, distance ${distance.toFixed(3)}, about ${left} s left`);
    };
    try {
      found = await engine.project(file, how, state.label, news, ended.signal);
    } finally {
      at("search").hidden = at("give-up").hidden = true;
      say("");
    }
  } else {
    say("");
    throw new Refused(model.encodes_not ?? "this model takes no pictures");
  }
  say("");
  given.set(found.picture, { ...found, original: fromHex(found.original), file, how, label: state.label });
  return found.picture;
}

const takeFiles = guarded(async (files) => {
  complain("");
  for (const file of [...files].slice(0, 2)) {
    const other = at("chooses-other").checked || file !== files[0];
    const picture = await take(file).finally(() => say(""));
    change((now) => {
      if (other) now.otherPicture = picture;
      else Object.assign(now, { picture, redrawn: {}, zeroed: [] });
    }, true);
  }
});

// ---- wiring

at("name").textContent = model.name;
document.title = `${model.name} – hflow-rt explore`;
at("about").textContent = `${model.family} ${model.resolution}x${model.resolution} on ${model.backend}${model.verified ? ", verified" : ", NOT verified"}`;
at("undo").addEventListener("click", () => history.back());
at("redo").addEventListener("click", () => history.forward());
addEventListener("keydown", (event) => {
  if (!(event.ctrlKey || event.metaKey) || event.key.toLowerCase() !== "z" || event.target.type === "number") return;
  event.preventDefault();
  if (event.shiftKey) history.forward();
  else history.back();
});
at("seed").addEventListener("change", () => {
  const seed = at("seed").valueAsNumber;
  if (Number.isSafeInteger(seed) && seed >= 0) change((now) => Object.assign(now, { seed, redrawn: {} }), true);
  else at("seed").value = state.seed;
});
at("another").addEventListener("click", () => {
  change((now) => Object.assign(now, { seed: Math.floor(Math.random() * 1e6), redrawn: {} }), true);
});
at("more").addEventListener("click", () => change((now) => (now.count = Math.min(256, now.count + begin.count)), true));
at("forget").addEventListener("click", () => change((now) => Object.assign(now, { picture: "", otherPicture: "" }), true));
at("open").addEventListener("click", () => at("file").click());
at("file").addEventListener("change", () => {
  takeFiles([...at("file").files]);
  at("file").value = "";
});
at("model-said").hidden = !model.said;
at("open").disabled = !model.encodes && !model.projects;
at("open").title = at("open").disabled ? (model.encodes_not ?? "") : "or drop one anywhere on this page";

addEventListener("dragover", (event) => {
  event.preventDefault();
  at("stage").classList.add("over");
});
addEventListener("dragleave", () => at("stage").classList.remove("over"));
addEventListener("drop", (event) => {
  event.preventDefault();
  at("stage").classList.remove("over");
  const files = [...event.dataTransfer.files];
  const box = event.target.closest?.(".drop");
  if (box) addTo(box.id === "with-box" ? "with" : "without", files);
  else if (files.length) takeFiles(files);
});

// ---- attributes

const addTo = guarded(async (side, files) => {
  for (const file of files) sets[side].push(await take(file).finally(() => say("")));
  at("attribute-said").textContent = `${sets.with.length} pictures with it, ${sets.without.length} without it`;
});
for (const side of ["with", "without"]) {
  at(side).addEventListener("change", () => {
    sets[side] = [];
    addTo(side, [...at(side).files]);
  });
}
at("measure").addEventListener("click", guarded(async () => {
  const found = await engine.attribute(sets.with, sets.without);
  complain("");
  change((now) => (now.attribute = found.attribute), true);
  at("attribute-said").textContent = `the sets are ${found.apart.toFixed(2)} stds apart in ${found.in}, ${found.held_out.toFixed(2)} where each picture is judged by the others`;
}));
at("save-attribute").addEventListener("click", guarded(async () => {
  saved(await engine.attributeFile(state.attribute), "attribute.safetensors");
}));

// ---- movement

async function play(slider, button, ms) {
  const mine = ++playing;
  if (button.textContent === "Stop") {
    button.textContent = "Play";
    return;
  }
  button.textContent = "Stop";
  if (Number(slider.value) >= Number(slider.max)) slider.value = slider.min;
  const step = (slider.max - slider.min) / FRAMES;
  while (mine === playing && button.isConnected && Number(slider.value) < Number(slider.max)) {
    slider.value = Number(slider.value) + Math.max(step, Number(slider.step));
    slider.dispatchEvent(new Event("input"));
    await pause(ms);
  }
  if (mine === playing) {
    slider.dispatchEvent(new Event("change"));
    button.textContent = "Play";
  }
}
at("play").addEventListener("click", () => play(at("share"), at("play"), 1000 / FPS));
at("play-time").addEventListener("click", () => play(at("frame"), at("play-time"), 1000 / FPS));
at("frame").addEventListener("input", () => drawPicture());

// ---- to take away

at("save-png").addEventListener("click", async () => saved(await asPng(at("picture")), "picture.png"));
at("save-gif").addEventListener("click", guarded(async () => {
  say("making a GIF…");
  const way = Array.from({ length: FRAMES }, (_, index) => recipeOf({ ...state, share: index / (FRAMES - 1) }, model));
  const onTheWay = state.panel === "time";
  const recipes = onTheWay ? [changedStart(state)] : [...way, ...way.slice(1, -1).reverse()];
  const blob = await engine.animation(recipes, howOf(state, model), onTheWay, FPS).finally(() => say(""));
  saved(blob, "animation.gif");
}));
at("save-latents").addEventListener("click", guarded(async () => {
  saved(await engine.latents([recipeOf(state, model)], howOf(state, model)), "picture.safetensors");
}));
for (const [button, text] of [
  ["copy-link", () => location.href],
  ["copy-command", () => at("command").textContent],
  ["copy-python", () => at("python").textContent],
]) {
  at(button).addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      say("copied");
    } catch {
      say("this browser does not let the page copy; select the text");
    }
  });
}

history.replaceState(null, "", current); // in the one way of saying it
show();
document.body.dataset.ready = "yes";
