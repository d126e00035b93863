// What the page shows, as its address says it: a link brings it back, and so do back and forward.

const NUMBERS = ["seed", "image", "other", "steps", "share", "levels", "gain", "count", "frame"];
const WORDS = ["picture", "otherPicture", "label", "panel", "mode", "space", "attribute"];
const TABLES = ["std", "control", "redrawn"];

// What can be done with a picture of this model.
export function panelsOf(model) {
  const several = model.latents.length > 1 || model.slots !== null;
  return ["change", "between", ...(several ? ["mix"] : []), "attribute", ...(model.steps > 1 ? ["time"] : [])];
}

export function initial(model) {
  return {
    panel: "change",
    seed: 0,
    image: 0,
    other: 1,
    picture: "",
    otherPicture: "",
    label: "",
    count: model.steps > 1 ? 6 : 16,
    std: Object.fromEntries(model.latents.filter((one) => one.std !== null).map((one) => [one.name, one.std])),
    control: Object.fromEntries(model.controls.map((one) => [one.name, one.default])),
    redrawn: {},
    zeroed: [],
    steps: model.steps,
    share: 0.5,
    mode: model.modes[0],
    space: model.latent_space,
    levels: Math.max(1, Math.floor((model.slots ?? model.latents.length) / 2)),
    attribute: "",
    gain: 1,
    frame: null, // of a picture that comes to be; null: the last
  };
}

// Only what differs from the beginning stands in an address.
export function toAddress(state, begin) {
  const said = new URLSearchParams();
  for (const name of [...NUMBERS, ...WORDS]) {
    if (state[name] !== begin[name] && state[name] !== null) said.set(name, state[name]);
  }
  for (const table of TABLES) {
    for (const [name, value] of Object.entries(state[table])) {
      if (value !== begin[table][name]) said.set(`${table}.${name}`, value);
    }
  }
  if (state.zeroed.length) said.set("zeroed", state.zeroed.join(","));
  const text = said.toString();
  return text ? `#${text}` : "#";
}

// What an address does not say, or says wrongly, is as in the beginning.
export function fromAddress(hash, begin, model) {
  const state = structuredClone(begin);
  const levels = model.latents.map((one) => one.name);
  const known = { std: Object.keys(begin.std), control: Object.keys(begin.control), redrawn: levels };
  for (const [key, text] of new URLSearchParams(hash.replace(/^#/, ""))) {
    const [table, ...rest] = key.split(".");
    const number = Number(text);
    if (NUMBERS.includes(key) && text !== "" && Number.isFinite(number)) state[key] = number;
    else if (WORDS.includes(key)) state[key] = text;
    else if (TABLES.includes(table) && known[table].includes(rest.join(".")) && Number.isFinite(number)) {
      state[table][rest.join(".")] = number;
    } else if (key === "zeroed") state.zeroed = text.split(",").filter((name) => levels.includes(name));
  }
  const whole = (name, low, high) => {
    if (state[name] === null) return;
    state[name] = Math.min(Math.max(low, Math.round(state[name])), high);
  };
  for (const name of ["seed", "image", "other"]) whole(name, 0, Number.MAX_SAFE_INTEGER);
  whole("count", 1, 256);
  whole("steps", 1, model.fewer_steps ? model.steps : 1);
  if (!model.fewer_steps) state.steps = begin.steps;
  whole("levels", 0, model.slots ?? model.latents.length);
  whole("frame", 0, model.steps - 1);
  state.share = Math.min(Math.max(0, state.share), 1);
  state.gain = Math.min(Math.max(-3, state.gain), 3);
  for (const [name, value] of Object.entries(state.std)) state.std[name] = Math.min(Math.max(0.05, value), 1.5);
  for (const { name, low, high } of model.controls) {
    state.control[name] = Math.min(Math.max(low ?? -Infinity, state.control[name]), high ?? Infinity);
  }
  for (const [name, image] of Object.entries(state.redrawn)) {
    if (!Number.isSafeInteger(image) || image < 0) delete state.redrawn[name];
  }
  if (!panelsOf(model).includes(state.panel)) state.panel = begin.panel;
  if (!model.modes.includes(state.mode)) state.mode = begin.mode;
  if (!model.spaces.includes(state.space)) state.space = begin.space;
  if (!Object.values(model.conditions).flat().includes(state.label)) state.label = "";
  return state;
}
