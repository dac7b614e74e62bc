"use strict";
const button = document.getElementById("show-code");
const code = document.querySelectorAll("details.code");
if (code.length) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const open = button.getAttribute("aria-pressed") !== "true";
    code.forEach((each) => { each.open = open; });
    button.setAttribute("aria-pressed", String(open));
    button.textContent = open ? "Hide all code" : "Show all code";
  });
}
const filter = document.getElementById("filter");
if (filter) {
  filter.closest("p").hidden = false;
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    let found = 0;
    document.querySelectorAll("#contents li[data-words]").forEach((item) => {
      item.hidden = !words.every((word) => (" " + item.dataset.words).includes(" " + word));  // from the start of a word
      found += item.hidden ? 0 : 1;
    });
    document.querySelectorAll("#contents > li").forEach((page) => {
      page.hidden = !page.querySelector("li[data-words]:not([hidden])");
    });
    document.getElementById("found").textContent = found === 0 ? "no section" : found === 1 ? "1 section" : found + " sections";
  });
}
