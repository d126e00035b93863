// Pictures that people gave: encoded, or searched for; kept here, too, because a server may be started anew.

import { fromHex } from "./canvas.js";
import { at } from "./dom.js";
import { Refused } from "./engine.js";
import { howOf } from "./recipes.js";
import { say } from "./saying.js";

export function pictures(model, engine) {
  const known = new Map(); // id to what is known, the file, and how it was encoded
  const variants = new Map(); // an id and how the model runs now, to the id of the same file encoded so
  let searching = false;

  async function searched(file, how, label) {
    if (searching) throw new Refused("A search is going on: wait for it, or give it up.");
    searching = true;
    const ended = new AbortController();
    const began = performance.now();
    at("search").hidden = at("give-up").hidden = false;
    at("give-up").onclick = () => ended.abort();
    const news = ({ step, of, distance }) => {
      at("search").value = step / of;
      const left = Math.round((((performance.now() - began) / step) * (of - step)) / 1000);
      say(`searching: ${step} of ${of}, distance ${distance.toFixed(3)}, about ${left} s left`);
    };
    try {
      return await engine.project(file, how, label, news, ended.signal);
    } finally {
      searching = false;
      at("search").hidden = at("give-up").hidden = true;
    }
  }

  async function put(file, how, label) {
    const found = model.encodes ? await engine.encode(file, how, label) : await searched(file, how, label);
    known.set(found.picture, { ...found, original: fromHex(found.original), file, how, label });
    return found.picture;
  }

  return {
    about: (id) => known.get(id),

    async take(file, state) {
      if (!model.encodes && !model.projects) throw new Refused(model.encodes_not ?? "This model takes no pictures.");
      say(`reading ${file.name}…`);
      try {
        return await put(file, howOf(state, model), state.label);
      } finally {
        say("");
      }
    },

    // The state with its pictures encoded as the model runs now: other controls or steps have other latents.
    async suited(state) {
      const how = howOf(state, model);
      const fitting = async (id) => {
        const one = known.get(id);
        if (!one || !model.encodes || JSON.stringify(one.how) === JSON.stringify(how)) return id;
        const key = `${id} ${JSON.stringify(how)}`;
        if (!variants.has(key)) variants.set(key, await put(one.file, how, one.label));
        return variants.get(key);
      };
      return { ...state, picture: await fitting(state.picture), otherPicture: await fitting(state.otherPicture) };
    },

    // What a server that was started anew no longer knows.
    async again() {
      if (!model.encodes) return;
      for (const { file, how, label } of known.values()) await engine.encode(file, how, label).catch(() => null);
    },
  };
}
