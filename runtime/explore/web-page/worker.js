// The model in this browser: graphs run by onnxruntime-web, all else as Python does it. See `recipes.py`.

import * as ort from "./ort/ort.wasm.min.mjs";
import { between, difference, spreadOf } from "./algebra.js";
import { pixelsOf, safetensors } from "./files.js";
import { drawnBeside, drawnLatents } from "./noise.js";

const REDRAWS = 16;
const GRID = 1 / 16;
const BATCH = 16;
// violet, blue, green and yellow, as in `heat_colours`
const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = new URL("ort/", import.meta.url).href;

let model;
let web; // of the model: graphs, spaces, priors
const sessions = new Map();
const kept = new Map(); // pictures: id to space, values and scores
const attributes = new Map();
const size = (shape) => shape.reduce((all, side) => all * side, 1);

const loaded = new Map();
function fetched(name) {
  if (!loaded.has(name)) {
    loaded.set(name, fetch(name).then((answer) => {
      if (!answer.ok) throw new Error(`${name} is missing on this web host`);
      return answer.arrayBuffer();
    }));
  }
  return loaded.get(name);
}

function session(name) {
  if (!sessions.has(name)) {
    const { file, weights } = web.graphs[name];
    const made = async () => {
      const graph = new Uint8Array(await fetched(file));
      const data = weights ? [{ path: weights, data: new Uint8Array(await fetched(weights)) }] : undefined;
      return ort.InferenceSession.create(graph, { executionProviders: ["wasm"], externalData: data });
    };
    sessions.set(name, made());
  }
  return sessions.get(name);
}

// rows: one object of values by name for each picture; the outputs likewise
async function run(name, rows) {
  const { inputs, outputs } = web.graphs[name];
  const found = [];
  for (let start = 0; start < rows.length; start += BATCH) {
    const part = rows.slice(start, start + BATCH);
    const feeds = {};
    for (const { name: input, shape } of inputs) {
      const all = new Float32Array(part.length * size(shape));
      part.forEach((row, index) => all.set(row[input], index * size(shape)));
      feeds[input] = new ort.Tensor("float32", all, [part.length, ...shape]);
    }
    const results = await (await session(name)).run(feeds);
    part.forEach((_, index) => {
      found.push(Object.fromEntries(outputs.map(({ name: output, shape }) => {
        const length = size(shape);
        return [output, results[output].data.slice(index * length, (index + 1) * length)];
      })));
    });
  }
  return found;
}

const oneHot = (options, chosen) => Float32Array.from(options, (_, index) => (index === chosen ? 1 : 0));

function drawn(start, image) {
  const { seed } = start;
  const values = drawnLatents(web.shapes, seed, image);
  for (const [name, numbers] of Object.entries(values)) {
    const std = Math.fround(web.prior_std[name] * (start.std[name] ?? 1));
    values[name] = numbers.map((value) => value * std);
  }
  for (const { name, shape, role, default: given } of web.graphs[web.forward].inputs) {
    if ((role === "noise" || role === "uniform") && given === null) {
      values[name] = drawnBeside(role, name, shape, seed, image);
    }
  }
  for (const [name, options] of Object.entries(model.conditions)) {
    values[name] = oneHot(options, start.label ? options.indexOf(start.label) : image % options.length);
  }
  return values;
}

async function begun(start) {
  const made = start.picture ? taken(kept, start.picture, "picture") : { space: model.latent_space, values: drawn(start, start.image) };
  const changed = [...Object.keys(start.redrawn ?? {}), ...(start.zeroed ?? [])];
  if (!changed.length) return made;
  const values = { ...made.values };
  for (const [name, image] of Object.entries(start.redrawn ?? {})) values[name] = drawn(start, image)[name];
  for (const name of start.zeroed ?? []) values[name] = new Float32Array(values[name].length);
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

async function cooked(recipe) {
  let made = await begun(recipe);
  if (recipe.mixed) {
    const other = await begun(recipe.mixed.other);
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
    const ends = [await within(made, space), await within(await begun(recipe.between.other), space)];
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

function asked(name, how) {
  const values = {};
  for (const { name: input, shape, role, default: given } of web.graphs[name].inputs) {
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
    let graph = web.forward;
    if (space !== model.latent_space && web.spaces[space].decode) {
      graph = web.spaces[space].decode;
    } else if (space !== model.latent_space) {
      const back = await run(web.spaces[space].back, rows);
      rows = rows.map((row, index) => ({ ...row, ...back[index] }));
    }
    const images = await run(graph, rows.map((row) => ({ ...row, ...asked(graph, how) })));
    places.forEach((place, index) => (found[place] = images[index].image));
  }
  return found;
}

const rounded = (value) => {
  const down = Math.floor(value);
  const rest = value - down;
  return rest === 0.5 ? down + (down % 2) : Math.round(value); // as numpy does
};

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
  },
  async images(recipes, how) {
    const made = [];
    for (const recipe of recipes) made.push(await cooked(recipe));
    return asBytes(await decoded(made, how));
  },
  async heat(recipe, how, name) {
    const made = await cooked(recipe);
    const first = 1 + Math.max(recipe.image, ...Object.values(recipe.redrawn ?? {}));
    const alone = { seed: recipe.seed, std: {} };
    const rows = Array.from({ length: REDRAWS }, (_, index) => ({
      space: model.latent_space,
      values: { ...made.values, [name]: drawn(alone, first + index)[name] },
    }));
    const spread = spreadOf(await decoded(rows, how), model.resolution ** 2);
    const largest = spread.reduce((most, value) => Math.max(most, value), 0);
    return { pixels: heatColours(spread, largest), largest };
  },
  async latents(recipes, how) {
    const made = [];
    for (const recipe of recipes) made.push(await cooked(recipe));
    const [{ space }] = made;
    const tensors = {};
    for (const name of Object.keys(made[0].values)) {
      const shape = shapeOf(space, name);
      const values = new Float32Array(made.length * size(shape));
      made.forEach((one, index) => values.set(one.values[name], index * size(shape)));
      tensors[name] = { shape: [made.length, ...shape], values };
    }
    const about = { family: model.family, model: model.model, ...(Object.keys(how.controls).length ? { controls: how.controls } : {}) };
    if (space !== model.latent_space) about.space = space;
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
    const row = { image, ...asked(web.inverse, how) };
    for (const [name, options] of Object.entries(model.conditions)) row[name] = oneHot(options, label ? options.indexOf(label) : 0);
    for (const { name, shape, role, default: given } of web.graphs[web.inverse].inputs) {
      if (role === "grid") row[name] = new Float32Array(size(shape)).fill(GRID);
      if (role !== "noise" && role !== "uniform") continue;
      row[name] = given === null ? drawnBeside(role, name, shape, 0, 0) : new Float32Array(size(shape)).fill(given);
    }
    const [found] = await run(web.inverse, [row]);
    const wanted = web.graphs[web.forward].inputs.filter(({ role }) => role !== "control").map((one) => one.name);
    const values = Object.fromEntries(wanted.map((name) => [name, found[name] ?? row[name]]));
    const picture = await digest(levels);
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
    const tensors = { direction: { shape: shapeOf(space, name), values: vector } };
    return safetensors(tensors, { "hflow_rt.direction": JSON.stringify(about) });
  },
};

function shapeOf(space, name) {
  const here = space === model.latent_space ? [] : web.graphs[web.spaces[space].into].outputs;
  return [...here, ...web.graphs[web.forward].inputs].find((one) => one.name === name).shape;
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
    postMessage({ id, error: error.message });
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
