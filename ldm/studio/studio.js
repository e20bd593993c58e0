() => {
  // Names for screen readers that Gradio's components lack.
  const name = () => {
    document.querySelectorAll(".empty[aria-label]:not([role])").forEach((part) => part.setAttribute("role", "img"));
    document.querySelectorAll(".image-container button:not([aria-label])").forEach((part) =>
      part.setAttribute("aria-label", "Image"));
  };
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  name();
}
