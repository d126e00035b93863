// The model in this browser: what the page asks for, done as Python does it. See `recipes.py`.

import { between, difference, joined, rounded, size, spreadOf } from "./algebra.js";
import { pixelsOf, safetensors } from "./files.js";
import { gif } from "./gif.js";
import { follow, inputsOf, opened, run, table } from "./graphs.js";
import { drawnBeside, drawnLatents, drawnRow } from "./noise.js";

const REDRAWS = 16;
const GRID = 1 / 16;
const FRAMES = 48;
const ENLARGED = 256;
// violet, blue, green and yellow, as in `heat_colours`
const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

let model;
let web; // of the model: graphs, spaces, priors
const kept = new Map(); // pictures: id to space, values and scores
const attributes = new Map();

const oneHot = (options, chosen) => Float32Array.from(options, (_, index) => (index === chosen ? 1 : 0));

function beside({ role, name, shape, steps }, seed, image) {
  if (steps === null) return drawnBeside(role, name, shape, seed, image);
  return joined(Array.from({ length: steps }, (_, step) => drawnBeside(role, name, shape, seed, image, step)));
}

async function drawn(start, image, how) {
  const { seed } = start;
  const own = web.drawn.filter(({ prior }) => prior !== "bank");
  const values = drawnLatents(Object.fromEntries(own.map(({ name, shape }) => [name, shape])), seed, image);
  for (const { name, prior_std } of own) {
    const std = Math.fround(prior_std * (start.std[name] ?? 1));
    values[name] = values[name].map((value) => value * std);
  }
  for (const [name, { shape, values: rows }] of Object.entries(await table(web.bank))) {
    const row = drawnRow(shape[0], seed, image);
    values[name] = rows.slice(row * size(shape.slice(1)), (row + 1) * size(shape.slice(1)));
  }
  for (const input of inputsOf("forward", how)) {
    const random = input.role === "noise" || input.role === "uniform";
    if (random && input.default === null) values[input.name] = beside(input, seed, image);
  }
  for (const [name, options] of Object.entries(model.conditions)) {
    values[name] = oneHot(options, start.label ? options.indexOf(start.label) : image % options.length);
  }
  return Object.fromEntries(wantedNames(how).map((name) => [name, values[name]]));
}

// Latents, what is random beside them, and conditions, in the order of Python.
function wantedNames(how) {
  const latents = web.drawn.map(({ name }) => name);
  const others = inputsOf("forward", how).filter((one) => ["noise", "uniform"].includes(one.role) && one.default === null);
  return [...latents, ...others.map(({ name }) => name), ...Object.keys(model.conditions)];
}

// What says nothing: zero, of a bank the mean of its rows.
async function zeroOf(name, values) {
  const { [name]: rows } = await table(web.bank);
  if (!rows) return new Float32Array(values.length);
  const sums = new Float64Array(values.length);
  rows.values.forEach((value, index) => (sums[index % values.length] += value));
  return Float32Array.from(sums, (sum) => sum / rows.shape[0]);
}

async function begun(start, how) {
  const known = start.picture ? taken(kept, start.picture, "picture") : null;
  const made = known ?? { space: model.latent_space, values: await drawn(start, start.image, how) };
  const changed = [...Object.keys(start.redrawn ?? {}), ...(start.zeroed ?? [])];
  if (!changed.length) return made;
  const values = { ...made.values };
  for (const [name, image] of Object.entries(start.redrawn ?? {})) values[name] = (await drawn(start, image, how))[name];
  for (const name of start.zeroed ?? []) values[name] = await zeroOf(name, values[name]);
  return { space: model.latent_space, values };
}

function taken(among, name, what) {
  if (!among.has(name)) throw new Error(`this ${what} is no longer kept here; put it on the page again`);
  return among.get(name);
}

async function within({ space, values }, wanted) {
  if (space === wanted) return values;
  if (space !== model.latent_space) throw new Error(`nothing leads from space ${space} to ${wanted}`);
  const { into } = web.spaces[wanted];
  const replaced = web.graphs[into].inputs.map((one) => one.name);
  const rest = Object.fromEntries(Object.entries(values).filter(([name]) => !replaced.includes(name)));
  return { ...(await run(into, [values]))[0], ...rest };
}

async function cooked(recipe, how) {
  let made = await begun(recipe, how);
  if (recipe.mixed) {
    const other = await begun(recipe.mixed.other, how);
    if (recipe.mixed.slots?.length) {
      const space = Object.keys(web.spaces).find((name) => web.spaces[name].slots);
      const [base, given] = [await within(made, space), await within(other, space)];
      const [{ name, shape }] = web.graphs[web.spaces[space].into].outputs;
      const mixed = base[name].slice();
      const row = size(shape) / shape[0];
      for (const slot of recipe.mixed.slots) mixed.set(given[name].subarray(slot * row, (slot + 1) * row), slot * row);
      made = { space, values: { ...base, [name]: mixed } };
    } else {
      const levels = [...(recipe.mixed.levels ?? [])];
      if (levels.includes(model.latents[0].name)) levels.push(...Object.keys(model.conditions));
      const chosen = levels.map((name) => [name, other.values[name]]);
      made = { space: made.space, values: { ...made.values, ...Object.fromEntries(chosen) } };
    }
  }
  if (recipe.between) {
    const { share, mode, space } = recipe.between;
    const ends = [await within(made, space), await within(await begun(recipe.between.other, how), space)];
    made = { space, values: between(...ends, share, mode, { ...web.ways, joined: web.joined[space] }) };
  }
  if (recipe.moved) {
    const { space, name, vector } = taken(attributes, recipe.moved.attribute, "attribute");
    const values = { ...(await within(made, space)) };
    const gain = Math.fround(recipe.moved.gain);
    values[name] = values[name].map((value, index) => value + Math.fround(gain * vector[index]));
    made = { space, values };
  }
  return made;
}

function asked(inputs, how) {
  const values = {};
  for (const { name: input, shape, role, default: given } of inputs) {
    if (role === "control") values[input] = new Float32Array(size(shape)).fill(how.controls[input] ?? given ?? 0);
  }
  return values;
}

// Float pixels `[C, R, R]` of what was cooked, those of one space together.
async function decoded(made, how) {
  const found = new Array(made.length);
  for (const space of new Set(made.map((one) => one.space))) {
    const places = [...made.keys()].filter((index) => made[index].space === space);
    let rows = places.map((index) => made[index].values);
    const decode = web.spaces[space]?.decode;
    if (space !== model.latent_space && !decode) {
      const back = await run(web.spaces[space].back, rows);
      rows = rows.map((row, index) => ({ ...row, ...back[index] }));
    }
    const controls = asked(decode ? web.graphs[decode].inputs : inputsOf("forward", how), how);
    rows = rows.map((row) => ({ ...row, ...controls }));
    const images = decode ? await run(decode, rows) : await follow("forward", rows, how);
    places.forEach((place, index) => (found[place] = images[index].image));
  }
  return found;
}

function asBytes(pictures) {
  const pixels = model.resolution ** 2;
  const bytes = new Uint8ClampedArray(pictures.length * pixels * 3);
  pictures.forEach((picture, number) => {
    for (let pixel = 0; pixel < pixels; pixel++) {
      for (let colour = 0; colour < 3; colour++) {
        const value = picture[(model.channels === 1 ? 0 : colour) * pixels + pixel];
        bytes[3 * (number * pixels + pixel) + colour] = rounded(Math.fround(value * 255));
      }
    }
  });
  return bytes;
}

function heatColours(values, top) {
  const bytes = new Uint8ClampedArray(values.length * 3);
  values.forEach((value, pixel) => {
    const place = Math.min(1, value / (top || 1)) * (RAMP.length - 1);
    const below = Math.min(Math.floor(place), RAMP.length - 2);
    for (let colour = 0; colour < 3; colour++) {
      const [from, to] = [RAMP[below][colour], RAMP[below + 1][colour]];
      bytes[3 * pixel + colour] = rounded(from + (place - below) * (to - from));
    }
  });
  return bytes;
}

const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");

const digest = async (bytes) => hex(new Uint8Array(await crypto.subtle.digest("SHA-256", bytes))).slice(0, 16);

const works = {
  async open(description) {
    model = description;
    web = description.web;
    opened(description);
  },
  async images(recipes, how) {
    const made = [];
    for (const recipe of recipes) made.push(await cooked(recipe, how));
    return asBytes(await decoded(made, how));
  },
  async trajectory(recipe, how) {
    const { values } = await cooked(recipe, how);
    const frames = [];
    const row = { ...values, ...asked(inputsOf("forward", how), how) };
    await follow("forward", [row], how, ([{ image }]) => frames.push(image));
    return asBytes(frames);
  },
  async animation(recipes, how, onTheWay, fps) {
    const pixels = onTheWay ? await works.trajectory(recipes[0], how) : await works.images(recipes, how);
    const length = 3 * model.resolution ** 2;
    const all = Array.from({ length: pixels.length / length }, (_, at) => pixels.subarray(at * length, (at + 1) * length));
    const shown = Math.min(all.length, onTheWay ? FRAMES : all.length);
    const place = (index) => rounded(shown === 1 ? 0 : (index * (all.length - 1)) / (shown - 1));
    const frames = Array.from({ length: shown }, (_, index) => all[place(index)]);
    return gif(frames, model.resolution, Math.ceil(ENLARGED / model.resolution), fps);
  },
  async heat(recipe, how, name) {
    const made = await cooked(recipe, how);
    const first = 1 + Math.max(recipe.image, ...Object.values(recipe.redrawn ?? {}));
    const alone = { seed: recipe.seed, std: {} };
    const rows = [];
    for (let index = 0; index < REDRAWS; index++) {
      const { [name]: redrawn } = await drawn(alone, first + index, how);
      rows.push({ space: model.latent_space, values: { ...made.values, [name]: redrawn } });
    }
    const spread = spreadOf(await decoded(rows, how), model.resolution ** 2);
    const largest = spread.reduce((most, value) => Math.max(most, value), 0);
    return { pixels: heatColours(spread, largest), largest };
  },
  async latents(recipes, how) {
    const made = [];
    for (const recipe of recipes) made.push(await cooked(recipe, how));
    const [{ space }] = made;
    const tensors = {};
    for (const name of Object.keys(made[0].values)) {
      const shape = shapeOf(space, name, how);
      const values = new Float32Array(made.length * size(shape));
      made.forEach((one, index) => values.set(one.values[name], index * size(shape)));
      tensors[name] = { shape: [made.length, ...shape], values };
    }
    const about = { family: model.family, model: model.model, ...(Object.keys(how.controls).length ? { controls: how.controls } : {}) };
    if (space !== model.latent_space) about.space = space;
    if (how.steps) about.steps = how.steps;
    const header = JSON.stringify({ order: Object.keys(tensors), metadata: about });
    return safetensors(tensors, { "hflow_rt.latents": header });
  },
  async encode(file, how, label) {
    const levels = await pixelsOf(file, model.resolution);
    const pixels = model.resolution ** 2;
    if (model.channels === 1) {
      for (let pixel = 0; pixel < pixels; pixel++) {
        const [red, green, blue] = levels.subarray(3 * pixel);
        levels.fill((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16, 3 * pixel, 3 * pixel + 3);
      }
    }
    const image = Float32Array.from({ length: model.channels * pixels }, (_, at) =>
      Math.fround(levels[3 * (at % pixels) + Math.floor(at / pixels)] / 255),
    );
    const row = { image, ...asked(inputsOf("inverse", how), how) };
    for (const [name, options] of Object.entries(model.conditions)) row[name] = oneHot(options, label ? options.indexOf(label) : 0);
    for (const input of inputsOf("inverse", how)) {
      const { name, shape, role, default: given } = input;
      if (role === "grid") row[name] = new Float32Array(size(shape)).fill(GRID);
      if (role !== "noise" && role !== "uniform") continue;
      row[name] = given === null ? beside(input, 0, 0) : new Float32Array(size(shape) * (input.steps ?? 1)).fill(given);
    }
    const [found] = await follow("inverse", [row], how);
    const values = Object.fromEntries(wantedNames(how).map((name) => [name, found[name] ?? row[name]]));
    const picture = await digest(joined(Object.values(values)));
    kept.set(picture, { space: model.latent_space, values });
    const logProb = found.log_prob?.[0];
    const dims = model.channels * pixels * Math.LN2;
    const bits = logProb === undefined ? {} : { bits_per_dim: model.bits - logProb / dims };
    return { picture, space: model.latent_space, original: hex(levels), ...bits };
  },
  async attribute(withIt, without) {
    const { space, name } = web.address;
    const sides = [];
    for (const names of [withIt, without]) {
      if (names.length < 2) throw new Error("an attribute needs at least 2 images on each side; add some");
      const points = [];
      for (const picture of names) points.push((await within(taken(kept, picture, "picture"), space))[name]);
      sides.push(points);
    }
    const found = difference(...sides);
    if (!found) throw new Error("the two sets need different means and different images within them; choose others");
    const id = await digest(found.vector);
    attributes.set(id, { ...found, space, name, counts: sides.map((side) => side.length) });
    return { attribute: id, in: name, apart: found.apart, held_out: found.held_out };
  },
  async attributeFile(id) {
    const { vector, space, name, norm, apart, held_out, counts } = taken(attributes, id, "attribute");
    const about = {
      format: 1, family: model.family, model: model.model, space, name,
      positive: "with it", negative: "without it", positives: counts[0], negatives: counts[1],
      norm, separation: apart, held_out_separation: held_out,
    };
    const tensors = { direction: { shape: shapeOf(space, name, { controls: {} }), values: vector } };
    return safetensors(tensors, { "hflow_rt.direction": JSON.stringify(about) });
  },
};

function shapeOf(space, name, how) {
  const here = space === model.latent_space ? [] : web.graphs[web.spaces[space].into].outputs;
  const { shape, steps } = [...here, ...inputsOf("forward", how), ...web.drawn].find((one) => one.name === name);
  return steps ? [steps, ...shape] : shape;
}

// One call at a time; of those of one channel that wait only the latest is made.
const waiting = [];
let busy = false;

async function next() {
  if (busy || !waiting.length) return;
  busy = true;
  const { id, work, given } = waiting.shift();
  try {
    postMessage({ id, result: await works[work](...given) });
  } catch (error) {
    postMessage({ id, error: String(error?.message ?? error) });
  }
  busy = false;
  next();
}

addEventListener("message", ({ data }) => {
  const before = waiting.findIndex((one) => data.channel && one.channel === data.channel);
  if (before >= 0) postMessage({ id: waiting.splice(before, 1)[0].id, stale: true });
  waiting.push(data);
  next();
});
