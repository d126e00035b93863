// A slider that moves by itself from its place to its end, until somebody stops it.

const FRAMES = 24;
const PAUSE = 80; // ms

export function player(slider, button) {
  let round = 0;

  function stop() {
    if (button.textContent !== "Stop") return;
    round++;
    button.textContent = "Play";
    slider.dispatchEvent(new Event("change"));
  }

  button.addEventListener("click", async () => {
    if (button.textContent === "Stop") {
      stop();
      return;
    }
    const mine = ++round;
    button.textContent = "Stop";
    if (Number(slider.value) >= Number(slider.max)) slider.value = slider.min;
    const step = Math.max((slider.max - slider.min) / FRAMES, Number(slider.step));
    while (mine === round && Number(slider.value) < Number(slider.max)) {
      slider.value = Number(slider.value) + step;
      slider.dispatchEvent(new Event("input"));
      await new Promise((done) => setTimeout(done, PAUSE));
    }
    if (mine === round) stop();
  });
  return stop;
}
