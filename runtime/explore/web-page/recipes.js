// A state as recipes: what a picture is made of, in the words that the engine understands.

export function startOf(state, image = state.image, picture = state.picture) {
  const start = { seed: state.seed, image, std: { ...state.std } };
  if (picture) start.picture = picture;
  if (state.label) start.label = state.label;
  return start;
}

export function changedStart(state) {
  const start = startOf(state);
  if (Object.keys(state.redrawn).length) start.redrawn = { ...state.redrawn };
  if (state.zeroed.length) start.zeroed = [...state.zeroed];
  return start;
}

export const otherStart = (state) => startOf(state, state.other, state.otherPicture);

export function mixedLevels(state, model) {
  if (model.slots !== null) return { slots: Array.from({ length: state.levels }, (_, slot) => slot) };
  return { levels: model.latents.slice(0, state.levels).map((one) => one.name) };
}

export function recipeOf(state, model) {
  const recipe = changedStart(state);
  if (state.panel === "between") {
    const { share, mode, space } = state;
    recipe.between = { other: otherStart(state), share, mode, space };
  }
  if (state.panel === "mix" && state.levels > 0) {
    recipe.mixed = { other: otherStart(state), ...mixedLevels(state, model) };
  }
  if (state.panel === "attribute" && state.attribute) {
    recipe.moved = { attribute: state.attribute, gain: state.gain };
  }
  return recipe;
}

export const gridRecipes = (state, images) => images.map((image) => startOf(state, image, ""));

export function howOf(state, model) {
  const controls = {};
  for (const one of model.controls) {
    if (state.control[one.name] !== one.default) controls[one.name] = state.control[one.name];
  }
  return state.steps === model.steps ? { controls } : { controls, steps: state.steps };
}
