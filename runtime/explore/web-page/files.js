// Files in and out of the page without a server: pictures as the model takes them, tensors as safetensors.

const LOBES = 3;

function lanczos(x) {
  if (x === 0) return 1;
  if (Math.abs(x) >= LOBES) return 0;
  const turned = Math.PI * x;
  return (LOBES * Math.sin(turned) * Math.sin(turned / LOBES)) / (turned * turned);
}

// One row of weights for each pixel of the smaller side, and where it begins.
function weights(from, to) {
  const scale = from / to;
  return Array.from({ length: to }, (_, pixel) => {
    const centre = (pixel + 0.5) * scale;
    const first = Math.max(0, Math.round(centre - LOBES * scale));
    const last = Math.min(from, Math.round(centre + LOBES * scale));
    const row = Array.from({ length: last - first }, (_, index) => lanczos((first + index - centre + 0.5) / scale));
    const sum = row.reduce((all, value) => all + value, 0);
    return { first, row: row.map((value) => value / sum) };
  });
}

// Four bytes a pixel, `side` x `side`, to three bytes a pixel, `to` x `to`: along x, then along y.
function reduced(pixels, side, to) {
  const rows = weights(side, to);
  const across = new Uint8ClampedArray(side * to * 3);
  for (let y = 0; y < side; y++) {
    rows.forEach(({ first, row }, x) => {
      for (let colour = 0; colour < 3; colour++) {
        let sum = 0;
        row.forEach((weight, index) => (sum += weight * pixels[4 * (y * side + first + index) + colour]));
        across[3 * (y * to + x) + colour] = sum;
      }
    });
  }
  const made = new Uint8ClampedArray(to * to * 3);
  rows.forEach(({ first, row }, y) => {
    for (let place = 0; place < to * 3; place++) {
      let sum = 0;
      row.forEach((weight, index) => (sum += weight * across[(first + index) * to * 3 + place]));
      made[y * to * 3 + place] = sum;
    }
  });
  return made;
}

const LARGEST = 2 ** 26; // pixels

// A file as three bytes a pixel: upright, in sRGB, on white, the largest square in the middle, reduced.
export async function pixelsOf(file, side) {
  let image;
  try {
    image = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "default" });
  } catch {
    throw new Error(`${file.name} is not a whole image of a kind that this browser knows; convert it`);
  }
  const square = Math.min(image.width, image.height);
  if (image.width * image.height > LARGEST) throw new Error(`${file.name} cannot be used: it is too large; reduce it`);
  if (square < side) {
    throw new Error(`${file.name} cannot be used: it is ${image.width}x${image.height}, smaller than ${side}`);
  }
  const canvas = new OffscreenCanvas(square, square);
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.fillStyle = "white";
  pen.fillRect(0, 0, square, square);
  pen.drawImage(image, -Math.floor((image.width - square) / 2), -Math.floor((image.height - square) / 2));
  const pixels = pen.getImageData(0, 0, square, square).data;
  if (square !== side) return reduced(pixels, square, side);
  return Uint8ClampedArray.from({ length: 3 * side * side }, (_, at) => pixels[4 * Math.floor(at / 3) + (at % 3)]);
}

// tensors: name to { shape, values }
export function safetensors(tensors, metadata) {
  const header = { __metadata__: metadata };
  let end = 0;
  for (const [name, { shape, values }] of Object.entries(tensors)) {
    header[name] = { dtype: "F32", shape, data_offsets: [end, end + 4 * values.length] };
    end += 4 * values.length;
  }
  let text = JSON.stringify(header);
  text += " ".repeat((8 - (new TextEncoder().encode(text).length % 8)) % 8);
  const head = new TextEncoder().encode(text);
  const length = new BigUint64Array([BigInt(head.length)]);
  return new Blob([length, head, ...Object.values(tensors).map(({ values }) => values)]);
}

// The tensors of such a file by name, as `safetensors` takes them.
export function tensorsOf(buffer) {
  const length = Number(new BigUint64Array(buffer.slice(0, 8))[0]);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const found = {};
  for (const [name, { dtype, shape, data_offsets: [start, end] }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    if (dtype !== "F32") throw new Error(`${name} is ${dtype}, which this page does not read`);
    found[name] = { shape, values: new Float32Array(buffer.slice(8 + length + start, 8 + length + end)) };
  }
  return found;
}
