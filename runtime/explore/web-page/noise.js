// The noise of every picture as Python draws it: Philox4x64-10 (Salmon et al. 2011) keyed by seed and image, normals by
// the ziggurat method (Marsaglia and Tsang 2000) in single precision with 256 layers.

const MASK = 0xffffffffffffffffn;
const MULTIPLIERS = [0xd2e7470ee14c6c93n, 0xca5a826395121157n];
const WEYL = [0x9e3779b97f4a7c15n, 0xbb67ae8584caa73bn];
const ROUNDS = 10;

const EDGE = 3.6541528853610088; // where the tail begins
const AREA = 0.00492867323399141; // of every layer
const BITS = 2 ** 23;

const fround = Math.fround; // every step rounds as single precision does, or a near decision falls otherwise

const density = (x) => Math.exp(-0.5 * x * x);

// Layer i ends at x[i]; each has the same area, so that the next edge follows from the last.
function layers() {
  const edges = new Float64Array(256);
  edges[255] = EDGE;
  for (let layer = 255; layer > 1; layer--) {
    edges[layer - 1] = Math.sqrt(-2 * Math.log(AREA / edges[layer] + density(edges[layer])));
  }
  const inside = new Uint32Array(256);
  const width = new Float32Array(256);
  const height = new Float32Array(256);
  inside[0] = Math.round(((EDGE * density(EDGE)) / AREA) * BITS);
  width[0] = AREA / density(EDGE) / BITS;
  height[0] = 1;
  for (let layer = 1; layer < 256; layer++) {
    inside[layer] = Math.round((edges[layer - 1] / edges[layer]) * BITS);
    width[layer] = edges[layer] / BITS;
    height[layer] = density(edges[layer]);
  }
  return { inside, width, height };
}

const { inside, width, height } = layers();

class Stream {
  constructor(seed, image, counter) {
    this.key = [BigInt(seed), BigInt(image)];
    this.counter = counter.map(BigInt);
    this.words = new Uint32Array(8);
    this.at = 8;
  }

  next() {
    if (this.at === 8) this.fill();
    return this.words[this.at++];
  }

  fill() {
    for (let word = 0; word < 4; word++) {
      this.counter[word] = (this.counter[word] + 1n) & MASK;
      if (this.counter[word] !== 0n) break;
    }
    let [a, b, c, d] = this.counter;
    let [k, l] = this.key;
    for (let round = 0; round < ROUNDS; round++) {
      const first = MULTIPLIERS[0] * a;
      const second = MULTIPLIERS[1] * c;
      [a, b, c, d] = [(second >> 64n) ^ b ^ k, second & MASK, (first >> 64n) ^ d ^ l, first & MASK];
      k = (k + WEYL[0]) & MASK;
      l = (l + WEYL[1]) & MASK;
    }
    [a, b, c, d].forEach((word, index) => {
      this.words[2 * index] = Number(word & 0xffffffffn);
      this.words[2 * index + 1] = Number(word >> 32n);
    });
    this.at = 0;
  }

  uniform() {
    return (this.next() >>> 8) / 2 ** 24;
  }

  normal() {
    for (;;) {
      const word = this.next();
      const layer = word & 0xff;
      const whole = word >>> 9;
      const x = (word & 0x100 ? -1 : 1) * fround(whole * width[layer]);
      if (whole < inside[layer]) return x;
      if (layer === 0) {
        for (;;) {
          const past = fround(-fround(1 / EDGE) * fround(Math.log1p(-this.uniform())));
          const y = -fround(Math.log1p(-this.uniform()));
          const far = fround(fround(EDGE) + past);
          if (fround(y + y) > fround(past * past)) return (whole >>> 8) & 1 ? -far : far;
        }
      }
      const step = fround(fround(height[layer - 1] - height[layer]) * this.uniform());
      const y = fround(step + height[layer]);
      if (y < density(x)) return x;
    }
  }
}

const size = (shape) => shape.reduce((all, side) => all * side, 1);

// Latents by name in the order of `shapes`, one stream for all of them.
export function drawnLatents(shapes, seed, image) {
  const stream = new Stream(seed, image, [0, 0, 0, 0]);
  const drawn = {};
  for (const [name, shape] of Object.entries(shapes)) {
    drawn[name] = Float32Array.from({ length: size(shape) }, () => stream.normal());
  }
  return drawn;
}

// What is random beside latents has a stream for each name, and in a loop for each of its calls.
export function drawnBeside(kind, name, shape, seed, image, step = 0) {
  const stream = new Stream(seed, image, [0, 0, step, 1 + crc32(name)]);
  return Float32Array.from({ length: size(shape) }, () => (kind === "uniform" ? stream.uniform() : stream.normal()));
}

// The row that an image has of a table with so many (Lemire 2019).
export function drawnRow(rows, seed, image) {
  const stream = new Stream(seed, image, [0, 0, 0, 1 + crc32("bank")]);
  const unfair = (2 ** 32 - rows) % rows;
  for (;;) {
    const product = stream.next() * rows;
    if (product % 2 ** 32 >= unfair) return Math.floor(product / 2 ** 32);
  }
}

function crc32(text) {
  let sum = 0xffffffff;
  for (const byte of new TextEncoder().encode(text)) {
    sum ^= byte;
    for (let bit = 0; bit < 8; bit++) sum = (sum >>> 1) ^ (sum & 1 ? 0xedb88320 : 0);
  }
  return (sum ^ 0xffffffff) >>> 0;
}
