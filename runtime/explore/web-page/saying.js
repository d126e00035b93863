// What the page says: one line of what it does, and a banner of what went wrong, which stays until that is right.

import { at } from "./dom.js";
import { Lost, Refused, Stale } from "./engine.js";

const wrong = new Map(); // what failed, and the sentence
let whenLost = async () => {};

export const say = (text) => (at("said").textContent = text);

export function complain(what, text) {
  wrong.delete(what);
  if (text) wrong.set(what, text);
  at("banner").textContent = [...wrong.values()].join(" ");
  at("banner").hidden = !wrong.size;
}

export const forgive = () => [...wrong.keys()].filter((what) => what !== "server").forEach((what) => complain(what, ""));

// what to do where the server no longer answers
export const onLoss = (work) => (whenLost = work);

export async function failed(what, error) {
  if (error instanceof Stale) return;
  if (error instanceof Lost) {
    await whenLost();
    return;
  }
  complain(what, error instanceof Refused ? error.message : `this page has a fault: ${error}`);
  if (!(error instanceof Refused)) throw error;
}

// Work whose failure is said, and whose success takes that back; `doing` is said meanwhile.
export const guarded = (what, work, doing = "") => async (...given) => {
  if (doing) say(doing);
  try {
    await work(...given);
    complain(what, "");
  } catch (error) {
    await failed(what, error);
  } finally {
    if (doing) say("");
  }
};
