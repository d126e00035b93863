// The command and the Python lines that make the same picture.

import { howOf, mixedLevels } from "./recipes.js";

// The std is said only where it is not the model's own.
const stdOf = (state, model) =>
  model.latents.some((one) => one.std !== null && one.std !== state.std[one.name]) ? state.std : {};

const quoted = (text) => JSON.stringify(text);
const asWord = (text) => `'${text.replaceAll("'", "'\\''")}'`; // of a shell

function pythonDict(values) {
  return `{${Object.entries(values)
    .map(([name, value]) => `${quoted(name)}: ${value}`)
    .join(", ")}}`;
}

const pythonList = (names) => `[${names.map((one) => (typeof one === "number" ? one : quoted(one))).join(", ")}]`;

export function commandOf(state, model) {
  const { controls, steps } = howOf(state, model);
  const found = model.said ? ` ${model.said}` : "";
  const plain = !state.picture && !Object.keys(state.redrawn).length && !state.zeroed.length;
  const itself = { change: true, time: true, mix: !state.levels, attribute: !state.attribute }[state.panel];
  if (plain && itself) {
    const words = [`hflow-rt sample${found} --seed ${state.seed} --first ${state.image} -n 1`];
    for (const [name, value] of Object.entries(stdOf(state, model))) words.push(`--std ${name}=${value}`);
    for (const [name, value] of Object.entries(controls)) words.push(`--control ${name}=${value}`);
    if (steps !== undefined) words.push(`--steps ${steps}`);
    if (state.label) words.push(`--label ${asWord(state.label)}`);
    const finished = state.panel === "time" && state.frame !== null ? "# the finished picture\n" : "";
    return `${finished}${words.join(" ")} -o picture.png`;
  }
  const option = model.said ? ` --model ${model.said}` : "";
  const file = "picture.safetensors";
  return `# with the latents file from the button above\nhflow-rt decode ${file}${option} -o picture.png`;
}

// about: what is known of a picture by its id
export function pythonOf(state, model, about) {
  const lines = ["import hflow_rt"];
  const { controls, steps } = howOf(state, model);
  const load = `session = hflow_rt.load(${model.said ? quoted(model.said) : ""})`;
  const made = [];
  if (steps !== undefined) made.push(`session = session.in_steps(${steps})`);
  if (Object.keys(controls).length) made.push(`session = session.with_controls(${pythonDict(controls)})`);
  const stds = stdOf(state, model);
  const std = Object.keys(stds).length ? `, std=${pythonDict(stds)}` : "";
  const drawn = (image) =>
    `next(session.draw([${image}], seed=${state.seed}${std}${state.label ? `, option=${quoted(state.label)}` : ""}))`;
  const read = (file, picture) => {
    const options = Object.values(model.conditions)[0];
    if (!options) return `session.inverse(session.read(${quoted(file)})).latents`;
    lines.push("from hflow_rt.conditions import of_option");
    const label = quoted(about(picture)?.label || options[0]);
    return `session.inverse(session.read(${quoted(file)}), of_option(session.conditions, ${label}, 1)).latents`;
  };
  const searched = (picture) => picture && !model.encodes;
  if (searched(state.picture) || (searched(state.otherPicture) && ["between", "mix"].includes(state.panel))) {
    return [
      "import hflow_rt",
      "from hflow_rt.runtime.latents.files import load_latents",
      "",
      "# with the latents file from the button above",
      load,
      ...made,
      'values, about = load_latents("picture.safetensors")',
      'image = session.decode(about.get("space", "z"), values)',
      'session.save(image, "picture.png")',
    ].join("\n");
  }
  const one = (name, image, picture, file) => made.push(`${name} = ${picture ? read(file, picture) : drawn(image)}`);
  one("latents", state.image, state.picture, "yours.png");
  for (const [name, image] of Object.entries(state.redrawn)) {
    made.push(`latents[${quoted(name)}] = ${drawn(image)}[${quoted(name)}]`);
  }
  const imports = [];
  if (state.zeroed.length) {
    imports.push("zeroed");
    for (const name of state.zeroed) {
      made.push(`latents[${quoted(name)}] = zeroed(session, ${quoted(name)}, latents[${quoted(name)}])`);
    }
  }
  let space = model.latent_space;
  if (state.panel === "mix" && state.levels > 0) {
    one("other", state.other, state.otherPicture, "other.png");
    const { slots, levels } = mixedLevels(state, model);
    if (slots !== undefined) {
      imports.push("slots_mixed", "space_of_slots");
      made.push("space = space_of_slots(session)");
      made.push("ends = [session.into_space(space, one) for one in (other, latents)]");
      made.push(`latents = slots_mixed(session, space, *ends, ${pythonList(slots)})`);
      space = null;
    } else {
      imports.push("styled");
      made.push(`latents = styled(session, other, latents, ${pythonList(levels)})`);
    }
  }
  if (state.panel === "between") {
    one("other", state.other, state.otherPicture, "other.png");
    imports.push("way_in");
    space = state.space;
    made.push(`ends = [session.into_space(${quoted(space)}, one) for one in (latents, other)]`);
    made.push(`latents = way_in(session, ${quoted(space)}, ${quoted(state.mode)})(*ends, ${state.share})`);
  }
  const moved = state.panel === "attribute" && state.attribute;
  if (moved) {
    lines.push("from hflow_rt.runtime.latents.attributes import load_attribute, move");
    made.push('attribute = load_attribute("attribute.safetensors")  # from the button above');
    made.push(`latents = move(session, latents, attribute, ${state.gain})`);
  }
  if (imports.length) {
    lines.push(`from hflow_rt.runtime.latents.latent_views import ${imports.sort().join(", ")}`);
  }
  const name = moved ? "attribute.about.space" : space === null ? "space" : quoted(space);
  if (state.panel === "time" && state.frame !== null) {
    lines.push("from itertools import islice");
    made.push(`*_, image = islice(session.trajectory(latents), ${state.frame + 1})`);
    return [...new Set(lines), "", load, ...made, 'session.save(image, "picture.png")'].join("\n");
  }
  const straight = !moved && space === model.latent_space;
  made.push(straight ? "image = session.forward(latents)" : `image = session.decode(${name}, latents)`);
  return [...new Set(lines), "", load, ...made, 'session.save(image, "picture.png")'].join("\n");
}
