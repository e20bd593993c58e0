for (const strip of document.querySelectorAll(".strip")) {
  const slider = strip.querySelector("input");
  const frames = strip.querySelectorAll(".frame");
  const show = () => {
    frames.forEach((frame, number) => { frame.hidden = number !== Number(slider.value); });
    const step = "step " + frames[slider.value].dataset.step;
    strip.querySelector("output").textContent = step;
    slider.setAttribute("aria-valuetext", step);
  };
  slider.addEventListener("input", show);
  slider.closest("label").hidden = false;
  show();
}
