// What is done with latents, as `hflow_rt.runtime.latents` does it: numbers by name, of one picture each.

const fround = Math.fround;
const SAME = 1e-3;
const PARALLEL = 1e-6;

export const size = (shape) => shape.reduce((all, side) => all * side, 1);

// To the nearest whole number, of two the even one.
export const rounded = (value) => {
  const down = Math.floor(value);
  const rest = value - down;
  return rest === 0.5 ? down + (down % 2) : Math.round(value);
};

// Arrays one after the other.
export function joined(parts) {
  const all = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let start = 0;
  for (const part of parts) {
    all.set(part, start);
    start += part.length;
  }
  return all;
}

export const zipped = (a, b, of) => Float32Array.from(a, (value, index) => of(value, b[index]));

export function line(a, b, share) {
  const [first, last] = [fround(1 - share), fround(share)];
  return zipped(a, b, (from, to) => fround(first * from) + fround(last * to));
}

// By cosine and sine, which keeps the variance of noise.
function turn(a, b, share) {
  if (a.every((value, index) => value === b[index])) return a;
  const [first, last] = [fround(Math.cos((share * Math.PI) / 2)), fround(Math.sin((share * Math.PI) / 2))];
  return zipped(a, b, (from, to) => fround(first * from) + fround(last * to));
}

// Several tensors as one vector on the arc between two (Shoemake 1985).
function arc(a, b, group, share) {
  let [dot, lengthA, lengthB, apart, count] = [0, 0, 0, 0, 0];
  for (const name of group) {
    a[name].forEach((from, index) => {
      const to = b[name][index];
      dot += from * to;
      lengthA += from * from;
      lengthB += to * to;
      apart += Math.abs(from - to);
      count += 1;
    });
  }
  const lengths = Math.sqrt(lengthA) * Math.sqrt(lengthB);
  const angle = Math.acos(Math.min(1, Math.max(-1, lengths > 0 ? dot / lengths : 1)));
  const sine = Math.sin(angle);
  let first = sine < PARALLEL ? 1 - share : Math.sin((1 - share) * angle) / sine;
  let last = sine < PARALLEL ? share : Math.sin(share * angle) / sine;
  if (apart / count < SAME) [first, last] = [1, 0];
  return Object.fromEntries(group.map((name) => [name, zipped(a[name], b[name], (from, to) => first * from + last * to)]));
}

// how: names that go in a line in any mode, names that turn, and groups that are one vector
export function between(a, b, share, mode, { straight, turned, joined }) {
  const made = {};
  const rest = Object.keys(a).filter((name) => !turned.includes(name));
  for (const name of turned) made[name] = turn(a[name], b[name], share);
  const lines = mode === "lerp" ? rest : rest.filter((name) => straight.includes(name));
  for (const name of lines) made[name] = line(a[name], b[name], share);
  const left = rest.filter((name) => !lines.includes(name));
  if (left.length) {
    const groups = joined.filter((group) => group.every((name) => left.includes(name)));
    const alone = left.filter((name) => !groups.flat().includes(name)).map((name) => [name]);
    for (const group of [...groups, ...alone]) Object.assign(made, arc(a, b, group, share));
  }
  return Object.fromEntries(Object.keys(a).map((name) => [name, made[name]]));
}

function mean(points) {
  const sum = new Float64Array(points[0].length);
  for (const point of points) point.forEach((value, index) => (sum[index] += value));
  return sum.map((value) => value / points.length);
}

const dot = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);

function variance(values) {
  const middle = values.reduce((sum, value) => sum + value, 0) / values.length;
  return values.reduce((sum, value) => sum + (value - middle) ** 2, 0) / (values.length - 1);
}

// What sets two sets of points apart, how far in stds, and how far where each point is judged by the others.
export function difference(positive, negative) {
  const vector = mean(positive).map((value, index) => value - mean(negative)[index]);
  const norm = Math.sqrt(dot(vector, vector));
  if (!norm) return null;
  const along = vector.map((value) => value / norm);
  const spreads = [positive, negative].map((points) => variance(points.map((point) => dot(along, point))));
  const spread = Math.max(Math.sqrt((spreads[0] + spreads[1]) / 2), 1e-6 * norm);
  let past = 0;
  for (const a of positive) {
    const others = mean(positive.filter((point) => point !== a));
    for (const b of negative) {
      const without = mean(negative.filter((point) => point !== b));
      const way = others.map((value, index) => value - without[index]);
      const length = Math.sqrt(dot(way, way)) || 1;
      past += way.reduce((sum, value, index) => sum + value * (a[index] - b[index]), 0) / length;
    }
  }
  const heldOut = past / (positive.length * negative.length) / spread;
  return { vector: Float32Array.from(vector), norm, apart: norm / spread, held_out: heldOut };
}

// Standard deviation of every pixel over pictures, averaged over the colours: `[R * R]`.
export function spreadOf(pictures, pixels) {
  const colours = pictures[0].length / pixels;
  const found = new Float64Array(pixels);
  for (let colour = 0; colour < colours; colour++) {
    for (let pixel = 0; pixel < pixels; pixel++) {
      const values = pictures.map((picture) => picture[colour * pixels + pixel]);
      const middle = values.reduce((sum, value) => sum + value, 0) / values.length;
      const square = values.reduce((sum, value) => sum + (value - middle) ** 2, 0) / values.length;
      found[pixel] += Math.sqrt(square) / colours;
    }
  }
  return found;
}
