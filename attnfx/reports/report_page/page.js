"use strict";
// What is chosen and filtered: the address says which attention, the box above the modules which of them are listed.
(() => {
  const main = document.getElementById("main");
  const filter = document.getElementById("filter");
  const leaves = [...document.querySelectorAll("nav .leaf")];

  function choose() {
    const id = decodeURIComponent(location.hash.slice(1));
    const target = id && document.getElementById(id);
    const card = target && /^(site|missed)-\d+$/.test(id) ? target.closest(".card") : null;
    for (const each of main.querySelectorAll("article.card")) each.hidden = card !== null && each !== card;
    for (const row of document.querySelectorAll("tr.chosen")) row.classList.remove("chosen");
    for (const link of document.querySelectorAll("nav a[aria-current]")) link.removeAttribute("aria-current");
    for (const here of document.querySelectorAll(".here")) here.hidden = true;
    if (target && /^kernel-\d+$/.test(id)) target.open = true;
    if (!card) {
      if (target) target.scrollIntoView();
      return;
    }
    const link = document.querySelector(`nav a[href="#${id}"]`);
    if (link) link.setAttribute("aria-current", "true");
    const members = target.closest("details.members");
    if (members) target.classList.add("chosen");
    const here = card.querySelector(".here");
    if (here && target.dataset.module && card.querySelectorAll("tbody tr[data-module]").length > 1) {
      here.textContent = `Here: ${target.dataset.module}, ${target.dataset.node}`;
      here.hidden = false;
    }
    card.scrollIntoView({ block: "start" });
    if (document.readyState !== "complete") addEventListener("load", () => setTimeout(() => card.scrollIntoView({ block: "start" })), { once: true });
  }
  addEventListener("hashchange", choose);

  function narrow() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const leaf of leaves) {
      const link = leaf.querySelector("a");
      const path = [];
      for (let at = leaf.parentElement; at && at.closest("nav details"); at = at.closest("nav details").parentElement.parentElement)
        path.unshift(at.closest("nav details").querySelector("summary").textContent);
      const text = (path.join(".") + "." + link.textContent + " " + link.className).toLowerCase();
      leaf.hidden = !words.every(word => text.includes(word));
      shown += !leaf.hidden;
    }
    for (const branch of document.querySelectorAll("nav details"))
      branch.parentElement.hidden = !branch.querySelector(".leaf:not([hidden])");
    document.getElementById("filter-count").textContent = words.length ? `${shown} of ${leaves.length}` : "";
  }
  filter.addEventListener("input", narrow);
  filter.addEventListener("keydown", event => {
    if (event.key === "Escape") { filter.value = ""; narrow(); }
    if (event.key === "Enter" || event.key === "ArrowDown") {
      const first = leaves.find(leaf => !leaf.hidden);
      if (first) { first.querySelector("a").focus(); event.preventDefault(); }
    }
  });
  document.querySelector("nav").addEventListener("keydown", event => {
    if (!["ArrowDown", "ArrowUp"].includes(event.key) || event.target === filter) return;
    const links = leaves.filter(leaf => !leaf.hidden).map(leaf => leaf.querySelector("a"));
    const next = links[links.indexOf(event.target) + (event.key === "ArrowDown" ? 1 : -1)];
    if (next) { next.focus(); event.preventDefault(); }
  });
  addEventListener("keydown", event => {
    if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && !event.ctrlKey && !event.metaKey) {
      filter.focus();
      event.preventDefault();
    }
  });
  const themes = ["system", "light", "dark"];
  document.getElementById("theme").addEventListener("click", event => {
    const now = document.documentElement.dataset.theme || "system";
    const next = themes[(themes.indexOf(now) + 1) % themes.length];
    if (next === "system") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = next;
    event.target.textContent = `Theme: ${next}`;
  });
  choose();
})();
