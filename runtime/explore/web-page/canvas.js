// Pixels of three bytes onto canvases, and files out of them.

export function paint(canvas, pixels, side, number = 0) {
  const from = number * side * side * 3;
  const shown = new ImageData(side, side);
  for (let pixel = 0; pixel < side * side; pixel++) {
    shown.data[4 * pixel] = pixels[from + 3 * pixel];
    shown.data[4 * pixel + 1] = pixels[from + 3 * pixel + 1];
    shown.data[4 * pixel + 2] = pixels[from + 3 * pixel + 2];
    shown.data[4 * pixel + 3] = 255;
  }
  if (canvas.width !== side) canvas.width = side;
  if (canvas.height !== side) canvas.height = side;
  canvas.getContext("2d", { colorSpace: "srgb" }).putImageData(shown, 0, 0);
}

export const asPng = (canvas) => new Promise((done) => canvas.toBlob(done, "image/png"));

export function saved(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

export const fromHex = (text) => Uint8ClampedArray.from(text.match(/../g) ?? [], (byte) => Number.parseInt(byte, 16));

export function largestDifference(a, b) {
  let largest = 0;
  for (let index = 0; index < a.length; index++) largest = Math.max(largest, Math.abs(a[index] - b[index]));
  return largest;
}
