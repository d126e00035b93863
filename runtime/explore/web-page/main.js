// The page: one state, which is in its address; what changes it, and what is drawn of it.

import { asPng, largestDifference, paint, saved } from "./canvas.js";
import { at } from "./dom.js";
import { Lost, Refused, latest, opened } from "./engine.js";
import { samples } from "./grid.js";
import { panels } from "./panels.js";
import { pictures } from "./pictures.js";
import { player } from "./playing.js";
import { changedStart, howOf, otherStart, recipeOf } from "./recipes.js";
import { complain, failed, forgive, guarded, onLoss, say } from "./saying.js";
import { fromAddress, initial, toAddress } from "./state.js";
import { commandOf, pythonOf } from "./words.js";

const FRAMES = 24;
const FPS = 12;

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

async function begun() {
  for (;;) {
    try {
      const found = await opened();
      complain("server", "");
      return found;
    } catch (error) {
      complain("server", error instanceof Lost || error instanceof Refused ? error.message : String(error));
      if (!(error instanceof Lost)) throw error;
      await pause(1000);
    }
  }
}

const { model, engine } = await begun();
const begin = initial(model);
let state = fromAddress(location.hash, begin, model);
const given = pictures(model, engine);
const sets = { with: [], without: [] };
let frames = null; // of a trajectory: what it is of, and its pixels
let lost = false;

onLoss(async () => {
  if (lost) return;
  lost = true;
  complain("server", "The server does not answer. This page goes on when it does.");
  for (;;) {
    await pause(1000);
    try {
      const again = await fetch("model.json");
      if (again.ok) {
        if ((await again.json()).model !== model.model) location.reload();
        break;
      }
      complain("server", (await again.json()).error);
    } catch {
      // not yet
    }
  }
  lost = false;
  complain("server", "");
  await given.again();
  if (state.attribute && sets.with.length) await engine.attribute(sets.with, sets.without).catch(() => null);
  show();
});

// ---- what is drawn

const drawPicture = latest(
  guarded("picture", async () => {
    const address = toAddress(state, begin);
    const now = await given.suited(state);
    if (now.panel === "time") await drawFrame(now);
    else {
      const pixels = await engine.images([recipeOf(now, model)], howOf(now, model), "picture");
      paint(at("picture"), pixels, model.resolution);
      at("picture-said").textContent = captionOf(now, pixels);
    }
    at("picture").dataset.shows = address;
  }),
);

const drawOther = latest(
  guarded("other", async () => {
    const address = toAddress(state, begin);
    const now = await given.suited(state);
    const pixels = await engine.images([otherStart(now)], howOf(now, model), "other");
    paint(at("other"), pixels, model.resolution);
    at("other").dataset.shows = address;
  }),
);

async function drawFrame(now) {
  const of = JSON.stringify([changedStart(now), howOf(now, model)]);
  if (frames?.of !== of) {
    say("making every step…");
    const pixels = await engine.trajectory(changedStart(now), howOf(now, model)).finally(() => say(""));
    frames = { of, pixels };
  }
  const last = frames.pixels.length / (3 * model.resolution ** 2) - 1;
  const frame = Math.min(now.frame ?? last, last);
  at("frame").max = last;
  at("frame").value = frame;
  paint(at("picture"), frames.pixels, model.resolution, frame);
  at("picture-said").textContent = `after ${frame + 1} of ${last + 1} steps`;
}

const nameOf = (picture, image, now) => (picture ? "your picture" : `sample ${image} of seed ${now.seed}`);

function captionOf(now, pixels) {
  const changed = Object.keys(now.redrawn).length + now.zeroed.length ? ", changed" : "";
  const what = `${nameOf(now.picture, now.image, now)}${changed}`;
  const other = nameOf(now.otherPicture, now.other, now);
  if (now.panel === "between") return `${Math.round(now.share * 100)} % of the way from ${what} to ${other}`;
  if (now.panel === "mix" && now.levels) return `${what}, mixed with ${other}`;
  if (now.panel === "attribute" && now.attribute) return `${what}, attribute times ${now.gain}`;
  const known = given.about(now.picture);
  if (!known || changed) return what;
  const off = largestDifference(pixels, known.original);
  const same = off ? `differs by up to ${off} of 255` : "every 8-bit value comes back";
  const bits = known.bits_per_dim === undefined ? "" : `; ${known.bits_per_dim.toFixed(3)} bits/dim (plug-in estimate)`;
  const far = known.distance === undefined ? "" : `; distance ${known.distance.toFixed(3)}`;
  return `${what}: ${same}${bits}${far}`;
}

const showGrid = samples(model, engine, choose, (error) => failed("samples", error));
const showPanels = panels(model, change, { heat: guarded("heat", showHeat), plain });
const stops = [player(at("share"), at("play")), player(at("frame"), at("play-time"))];

function show() {
  showPanels(state);
  at("seed").value = state.seed;
  const known = given.about(state.picture);
  at("original-box").hidden = !known;
  if (known) paint(at("original"), known.original, model.resolution);
  at("forget").hidden = !state.picture && !state.otherPicture;
  at("std-said").hidden = !state.picture || !Object.keys(begin.std).length;
  const both = state.panel === "between" || state.panel === "mix" || state.otherPicture !== "";
  at("other-box").hidden = !both;
  at("other-said").textContent = `the other one: ${nameOf(state.otherPicture, state.other, state)}`;
  at("picture").setAttribute("aria-label", nameOf(state.picture, state.image, state));
  at("original").setAttribute("aria-label", "your picture as you gave it");
  at("other").setAttribute("aria-label", at("other-said").textContent);
  at("command").textContent = commandOf(state, model);
  at("python").textContent = pythonOf(state, model, given.about);
  at("save-gif").disabled = !["between", "time"].includes(state.panel);
  at("save-attribute").disabled = !state.attribute;
  for (const canvas of [at("picture"), at("other")]) delete canvas.dataset.shows; // until it is drawn
  at("undo").disabled = !place();
  at("redo").disabled = place() >= furthest;
  drawPicture();
  if (both) drawOther();
  showGrid(state);
}

// ---- what changes it, and how far back and forward there is to go

const place = () => history.state?.place ?? 0;
let current = toAddress(state, begin);
history.replaceState({ place: place() }, "", current); // in the one way of saying it
let furthest = place();

// whole: a step of its own, to which undo leads back; the rest is a slider on its way
function change(make, whole) {
  const next = structuredClone(state);
  make(next);
  if (next.panel !== state.panel) stops.forEach((stop) => stop());
  state = next;
  at("heat-box").hidden = true;
  const address = toAddress(state, begin);
  if (whole && address !== current) {
    furthest = place() + 1;
    history.pushState({ place: furthest }, "", address);
    current = address;
    forgive();
  }
  show();
}

addEventListener("popstate", () => {
  stops.forEach((stop) => stop());
  state = fromAddress(location.hash, begin, model);
  current = toAddress(state, begin);
  furthest = Math.max(furthest, place());
  at("heat-box").hidden = true;
  forgive();
  show();
});

const undo = () => place() && history.back();
const redo = () => place() < furthest && history.forward();

function plain() {
  const { std, control, steps } = begin;
  change((now) => Object.assign(now, structuredClone({ redrawn: {}, zeroed: [], std, control, steps })), true);
}

function choose(image, asOther) {
  const other = asOther || at("chooses-other").checked;
  change((now) => {
    if (other) Object.assign(now, { other: image, otherPicture: "" });
    else Object.assign(now, { image, picture: "", redrawn: {}, zeroed: [] });
  }, true);
}

async function showHeat(latent) {
  const asked = state;
  say(`redrawing ${latent}…`);
  const now = await given.suited(asked);
  const { pixels, largest } = await engine.heat(changedStart(now), howOf(now, model), latent).finally(() => say(""));
  if (asked !== state) return;
  paint(at("heat"), pixels, model.resolution);
  at("heat").setAttribute("aria-label", `where ${latent} decides the picture`);
  at("heat-said").textContent = `where ${latent} acts: yellow most, std up to ${largest.toFixed(3)}`;
  at("heat-box").hidden = false;
}

const takeFiles = guarded("file", async (files) => {
  const other = at("chooses-other").checked;
  for (const [number, file] of [...files].slice(0, 2).entries()) {
    const picture = await given.take(file, state);
    change((now) => {
      if (other || number) now.otherPicture = picture;
      else Object.assign(now, { picture, redrawn: {}, zeroed: [] });
    }, true);
  }
});

// ---- wiring

at("name").textContent = model.name;
document.title = `${model.name} – hflow-rt explore`;
const proved = model.verified ? "verified" : "NOT verified";
at("about").textContent = `${model.family} ${model.resolution}x${model.resolution} on ${model.backend}, ${proved}`;
at("undo").addEventListener("click", undo);
at("redo").addEventListener("click", redo);
addEventListener("keydown", (event) => {
  if (!(event.ctrlKey || event.metaKey) || event.key.toLowerCase() !== "z" || event.target.type === "number") return;
  event.preventDefault();
  if (event.shiftKey) redo();
  else undo();
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
at("model-said").hidden = model.said !== "MODEL"; // else nothing, or the name of a bundled one
at("open").disabled = !model.encodes && !model.projects;
at("open").title = at("open").disabled ? (model.encodes_not ?? "") : "or drop one anywhere on this page";
at("frame").addEventListener("input", () => change((now) => (now.frame = Number(at("frame").value)), false));
at("frame").addEventListener("change", () => change((now) => (now.frame = Number(at("frame").value)), true));

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
  if (box) addTo(box.id === "with-box" ? "with" : "without", files, sets[box.id === "with-box" ? "with" : "without"]);
  else if (files.length) takeFiles(files);
});

// ---- attributes

const rounds = { with: 0, without: 0 };

// A choice that was made since takes the place of this one; a file that cannot be used does not end the others.
async function addTo(side, files, before) {
  const mine = ++rounds[side];
  const found = [...before];
  complain("sets", "");
  for (const file of files) {
    try {
      found.push(await given.take(file, state));
    } catch (error) {
      await failed("sets", error);
    }
  }
  if (mine !== rounds[side]) return;
  sets[side] = found;
  at("attribute-said").textContent = `${sets.with.length} pictures with it, ${sets.without.length} without it`;
}
for (const side of ["with", "without"]) {
  at(side).addEventListener("change", () => addTo(side, [...at(side).files], []));
}
at("measure").addEventListener(
  "click",
  guarded("attribute", async () => {
    const found = await engine.attribute(sets.with, sets.without);
    change((now) => (now.attribute = found.attribute), true);
    const [apart, heldOut] = [found.apart.toFixed(2), found.held_out.toFixed(2)];
    const others = `${heldOut} where each picture is judged by the others`;
    at("attribute-said").textContent = `the sets are ${apart} stds apart in ${found.in}, ${others}`;
  }),
);

// ---- to take away

const taken = (button, name, make, doing = "") =>
  at(button).addEventListener("click", guarded(button, async () => saved(await make(await given.suited(state)), name), doing));

taken("save-attribute", "attribute.safetensors", () => engine.attributeFile(state.attribute));
taken("save-png", "picture.png", () => asPng(at("picture")));
taken("save-latents", "picture.safetensors", (now) => engine.latents([recipeOf(now, model)], howOf(now, model)));
const animation = (now) => {
  if (now.panel === "time") return engine.animation([changedStart(now)], howOf(now, model), true, FPS);
  const way = Array.from({ length: FRAMES }, (_, index) => recipeOf({ ...now, share: index / (FRAMES - 1) }, model));
  return engine.animation([...way, ...way.slice(1, -1).reverse()], howOf(now, model), false, FPS);
};
taken("save-gif", "animation.gif", animation, "making a GIF…");
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

show();
document.body.dataset.ready = "yes";
