for (const slider of document.querySelectorAll("input[type=range]")) {
  const compare = slider.closest("figure").querySelector(".compare");
  const move = () => compare.style.setProperty("--at", slider.value + "%");
  slider.addEventListener("input", move);
  move();
}
