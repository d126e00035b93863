// The graphs and routes of the model, run by onnxruntime-web.

import * as ort from "./ort/ort.wasm.min.mjs";
import { joined, rounded, size } from "./algebra.js";
import { tensorsOf } from "./files.js";

const BATCH = 16;

ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = new URL("ort/", import.meta.url).href;

let web; // what the description says of graphs and routes
const sessions = new Map();

export function opened(description) {
  web = description.web;
}

const loaded = new Map();
function fetched(name) {
  if (!loaded.has(name)) {
    const found = fetch(name).then(
      (answer) => {
        if (!answer.ok) throw new Error(`${name} is missing on this web host`);
        return answer.arrayBuffer();
      },
      () => {
        throw new Error(`${name} could not be loaded; try again`);
      },
    );
    loaded.set(name, found);
    found.catch(() => loaded.delete(name)); // or nobody could try again
  }
  return loaded.get(name);
}

function session(name) {
  if (!sessions.has(name)) {
    const { file, weights } = web.graphs[name];
    const made = async () => {
      const graph = new Uint8Array(await fetched(file));
      const held = await Promise.all(weights.map(fetched));
      const data = weights.map((path, index) => ({ path, data: new Uint8Array(held[index]) }));
      return ort.InferenceSession.create(graph, { executionProviders: ["wasm"], externalData: data });
    };
    const found = made();
    sessions.set(name, found);
    found.catch(() => sessions.delete(name));
  }
  return sessions.get(name);
}

// rows: one object of values by name for each picture; the outputs likewise. shared: values of the whole call
export async function run(name, rows, shared = {}) {
  const { inputs, outputs } = web.graphs[name];
  const found = [];
  for (let start = 0; start < rows.length; start += BATCH) {
    const part = rows.slice(start, start + BATCH);
    const feeds = {};
    for (const { name: input, shape, role } of inputs) {
      if (role === "schedule") {
        feeds[input] = new ort.Tensor("float32", shared[input], [1, ...shape]);
        continue;
      }
      const all = new Float32Array(part.length * size(shape));
      part.forEach((row, index) => {
        if (row[input]?.length !== size(shape)) throw new Error(`${input} does not fit the model as it runs now`);
        all.set(row[input], index * size(shape));
      });
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

const graphsOf = (route) => (route.graph ? [route.graph] : [route.start, route.step]);

// The inputs of a route, each once; of those that every call of a loop draws `steps` says how often.
export function inputsOf(name, how) {
  const route = web.routes[name];
  const found = new Map();
  for (const graph of graphsOf(route)) {
    for (const input of web.graphs[graph].inputs) {
      const drawn = input.role === "noise" || input.role === "uniform";
      const steps = drawn && graph === route.step ? stepsOf(route, how) : null;
      if (!found.has(input.name)) found.set(input.name, { ...input, steps });
    }
  }
  return [...found.values()];
}

const stepsOf = (route, how) => how.steps ?? route.steps;

// The tables of a loop, which may take fewer calls than its file has.
async function scheduleOf(route, how) {
  const tables = await table(route.schedule);
  const calls = Object.values(tables)[0].shape[0];
  const steps = stepsOf(route, how);
  const place = (index) => rounded(steps === 1 ? 0 : (index * (calls - 1)) / (steps - 1));
  const rows = Array.from({ length: steps }, (_, index) => place(index));
  return rows.map((row, index) => {
    const end = index + 1 < steps ? rows[index + 1] - 1 : calls - 1;
    return Object.fromEntries(Object.entries(tables).map(([name, { shape, values }]) => {
      const length = size(shape.slice(1));
      const from = route.leads_to.includes(name) ? end : row;
      return [name, values.slice(from * length, (from + 1) * length)];
    }));
  });
}

// A route on rows of values, its outputs likewise; `seen` hears of what each call of a loop yields.
export async function follow(name, rows, how, seen = () => {}) {
  const route = web.routes[name];
  if (route.graph) return run(route.graph, rows);
  const begun = await run(route.start, rows);
  const schedule = await scheduleOf(route, how);
  const drawn = web.graphs[route.step].inputs.filter(({ role }) => role === "noise" || role === "uniform");
  const entered = (made) => Object.fromEntries(Object.entries(route.carry).map(([left, into]) => [into, made[left]]));
  let current = rows.map((row, index) => ({ ...row, ...begun[index], ...entered(begun[index]) }));
  const each = rows.map(() => Object.fromEntries(Object.values(route.every).map((into) => [into, []])));
  let made = [];
  for (let call = 0; call < schedule.length; call++) {
    const now = current.map((row) => {
      const ours = drawn.map(({ name: noise, shape }) => [noise, row[noise].subarray(call * size(shape), (call + 1) * size(shape))]);
      return { ...row, ...Object.fromEntries(ours) };
    });
    made = await run(route.step, now, schedule[call]);
    seen(made);
    made.forEach((one, index) => {
      for (const [output, into] of Object.entries(route.every)) each[index][into].push(one[output]);
    });
    current = current.map((row, index) => ({ ...row, ...entered(made[index]) }));
  }
  return rows.map((_, index) => {
    const last = Object.fromEntries(route.last.map((output) => [output, made[index][output]]));
    const all = Object.entries(each[index]).map(([into, parts]) => [into, joined(parts)]);
    return { ...begun[index], ...last, ...Object.fromEntries(all) };
  });
}

// The arrays of a file of tensors, none where there is no such file.
export const table = async (file) => (file ? tensorsOf(await fetched(file)) : {});
