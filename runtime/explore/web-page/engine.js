// What runs the model: a server, or this browser itself. Both are asked alike and answer alike.

export class Lost extends Error {} // nobody answers
export class Refused extends Error {} // a sentence for people
export class Stale extends Error {} // something else was asked for since

export async function opened() {
  let answer;
  try {
    answer = await fetch("model.json");
  } catch {
    throw new Lost("the server does not answer");
  }
  if (!answer.ok) throw new Refused((await answer.json()).error ?? `the server refused this (${answer.status})`);
  const model = await answer.json();
  const found = model.engine === "server" ? import("./server.js") : import("./browser.js");
  const { server, browser } = await found;
  return { model, engine: server ?? (await browser(model)) };
}

// One call at a time; of those that come meanwhile only the latest is made.
export function latest(work) {
  let running = false;
  let waiting = null;
  return async function call(...given) {
    if (running) {
      waiting = given;
      return;
    }
    running = true;
    try {
      await work(...given);
    } finally {
      running = false;
      if (waiting !== null) {
        const next = waiting;
        waiting = null;
        call(...next);
      }
    }
  };
}
