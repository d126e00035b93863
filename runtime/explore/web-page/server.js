// The engine of a page that a server of hflow-rt answers.

import { Lost, Refused, Stale } from "./engine.js";

const tab = crypto.getRandomValues(new Uint32Array(2)).join("-");
const pause = (ms) => new Promise((done) => setTimeout(done, ms));

async function ask(what, body, address = "", signal = undefined) {
  const raw = body instanceof Blob;
  for (let tries = 0; ; tries++) {
    let answer;
    try {
      answer = await fetch(`api/${what}${address}`, {
        method: "POST",
        headers: { "Content-Type": raw ? "application/octet-stream" : "application/json" },
        body: raw ? body : JSON.stringify(body),
        signal,
      });
    } catch {
      if (signal?.aborted) throw new Stale();
      throw new Lost("the server does not answer");
    }
    if (answer.ok) return answer;
    if (answer.status === 409) throw new Stale();
    if (answer.status === 503 && tries < 20) {
      await pause(250);
      continue;
    }
    let sentence = `the server refused this (${answer.status})`;
    try {
      sentence = (await answer.json()).error ?? sentence;
    } catch {
      // it was no sentence
    }
    throw new Refused(sentence);
  }
}

async function bytes(what, body) {
  const answer = await ask(what, body);
  try {
    return [new Uint8ClampedArray(await answer.arrayBuffer()), answer];
  } catch {
    throw new Lost("the server does not answer");
  }
}

const who = (channel) => `${tab} ${channel}`;

const told = (name, how, label, more = {}) =>
  `?how=${encodeURIComponent(JSON.stringify({ name: name.slice(0, 250), ...how, ...(label ? { label } : {}), ...more }))}`;

export const server = {
  async images(recipes, how, channel) {
    return (await bytes("images", { recipes, ...how, who: who(channel) }))[0];
  },
  async trajectory(recipe, how) {
    return (await bytes("trajectory", { recipes: [recipe], ...how, who: who("trajectory") }))[0];
  },
  async heat(recipe, how, latent) {
    const [pixels, answer] = await bytes("heat", { recipes: [recipe], ...how, latent, who: who("heat") });
    return { pixels, largest: Number(answer.headers.get("X-Largest")) };
  },
  async animation(recipes, how, onTheWay, fps) {
    return (await ask("animation", { recipes, ...how, on_the_way: onTheWay, fps })).blob();
  },
  async latents(recipes, how) {
    return (await ask("latents", { recipes, ...how })).blob();
  },
  async encode(file, how, label) {
    return (await ask("pictures", file, told(file.name, how, label))).json();
  },
  async project(file, how, label, news, signal) {
    const { controls } = how;
    const answer = await ask("projections", file, told(file.name, { controls }, label), signal);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch {
        if (signal.aborted) throw new Stale();
        throw new Lost("the server does not answer");
      }
      if (part.done) throw new Lost("the server does not answer");
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((text) => JSON.parse(text))) {
        if (line.error !== undefined) throw new Refused(line.error);
        if (line.step === undefined) return line;
        news(line);
      }
    }
  },
  async attribute(withIt, without) {
    return (await ask("attributes", { with_it: withIt, without })).json();
  },
  async attributeFile(name) {
    const answer = await fetch(`api/attributes/${encodeURIComponent(name)}`);
    if (!answer.ok) throw new Refused((await answer.json()).error);
    return answer.blob();
  },
};
