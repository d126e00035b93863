// Animations: frames of at most 256 colours each, by median cut (Heckbert 1982), packed as GIF89a asks.

const COLOURS = 256;

// The colours of a frame, and for each pixel the number of its own.
function palette(pixels) {
  const count = pixels.length / 3;
  const channel = (pixel, colour) => pixels[3 * pixel + colour];
  const spread = (box) => {
    const widths = [0, 1, 2].map((colour) => {
      let [low, high] = [255, 0];
      for (const pixel of box) {
        low = Math.min(low, channel(pixel, colour));
        high = Math.max(high, channel(pixel, colour));
      }
      return high - low;
    });
    const width = Math.max(...widths);
    return { box, width, colour: widths.indexOf(width) };
  };
  const boxes = [spread(Uint32Array.from({ length: count }, (_, pixel) => pixel))];
  while (boxes.length < COLOURS) {
    const place = boxes.reduce((best, one, index) => (one.width > boxes[best].width ? index : best), 0);
    const { box, width, colour } = boxes[place];
    if (!width) break;
    box.sort((a, b) => channel(a, colour) - channel(b, colour));
    let middle = box.length >> 1;
    while (middle > 1 && channel(box[middle], colour) === channel(box[middle - 1], colour)) middle--;
    while (middle < box.length && channel(box[middle], colour) === channel(box[middle - 1], colour)) middle++;
    boxes.splice(place, 1, spread(box.slice(0, middle)), spread(box.slice(middle)));
  }
  const table = new Uint8Array(3 * COLOURS);
  const numbers = new Uint8Array(count);
  boxes.forEach(({ box }, number) => {
    for (let colour = 0; colour < 3; colour++) {
      table[3 * number + colour] = Math.round(box.reduce((sum, pixel) => sum + channel(pixel, colour), 0) / box.length);
    }
    for (const pixel of box) numbers[pixel] = number;
  });
  return { table, numbers };
}

// Lempel, Ziv and Welch's codes of 9 to 12 bits, in blocks of 255 bytes.
function packed(numbers) {
  const [clear, end] = [COLOURS, COLOURS + 1];
  const bytes = [];
  let [held, bits, width] = [0, 0, 9];
  const put = (code) => {
    held |= code << bits;
    bits += width;
    while (bits >= 8) {
      bytes.push(held & 255);
      held >>>= 8;
      bits -= 8;
    }
  };
  let known = new Map();
  let next = end + 1;
  put(clear);
  let run = numbers[0];
  for (const number of numbers.subarray(1)) {
    const longer = run * COLOURS + number;
    if (known.has(longer)) {
      run = known.get(longer);
      continue;
    }
    put(run);
    if (next === 4096) {
      put(clear);
      [known, next, width] = [new Map(), end + 1, 9];
    } else {
      if (next === 1 << width) width++;
      known.set(longer, next++);
    }
    run = number;
  }
  put(run);
  if (next === 1 << width && width < 12) width++;
  put(end);
  if (bits) bytes.push(held & 255);
  const blocks = [8];
  for (let start = 0; start < bytes.length; start += 255) {
    const block = bytes.slice(start, start + 255);
    blocks.push(block.length, ...block);
  }
  return [...blocks, 0];
}

function enlarged(numbers, side, scale) {
  const wide = side * scale;
  return Uint8Array.from({ length: wide * wide }, (_, place) => {
    const [y, x] = [Math.floor(place / wide), place % wide];
    return numbers[Math.floor(y / scale) * side + Math.floor(x / scale)];
  });
}

const word = (number) => [number & 255, number >> 8];

// frames: bytes of three colours a pixel, `side` x `side` each; for ever, there being no other end
export function gif(frames, side, scale, fps) {
  const wide = side * scale;
  const text = (words) => [...new TextEncoder().encode(words)];
  const parts = [Uint8Array.from([...text("GIF89a"), ...word(wide), ...word(wide), 0x70, 0, 0])];
  parts.push(Uint8Array.from([0x21, 0xff, 11, ...text("NETSCAPE2.0"), 3, 1, 0, 0, 0]));
  frames.forEach((frame, index) => {
    const { table, numbers } = palette(frame);
    const time = Math.round(((index + 1) * 100) / fps) - Math.round((index * 100) / fps);
    parts.push(Uint8Array.from([0x21, 0xf9, 4, 0, ...word(time), 0, 0]));
    parts.push(Uint8Array.from([0x2c, 0, 0, 0, 0, ...word(wide), ...word(wide), 0x87]), table);
    parts.push(Uint8Array.from(packed(enlarged(numbers, side, scale))));
  });
  return new Blob([...parts, Uint8Array.from([0x3b])], { type: "image/gif" });
}
