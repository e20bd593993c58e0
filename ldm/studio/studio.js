() => {
  // Names for screen readers that Gradio's components lack.
  const name = () => {
    document.querySelectorAll(".empty[aria-label]:not([role])").forEach((part) => part.setAttribute("role", "img"));
    document.querySelectorAll(".image-container button:not([aria-label])").forEach((part) =>
      part.setAttribute("aria-label", "Image"));
  };
  document.addEventListener("input", (event) => {
    const slider = event.target.closest(".studio-slider");
    if (slider) slider.style.setProperty("--at", event.target.value + "%");
  });
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  name();
}
