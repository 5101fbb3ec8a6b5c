"use strict";
// The listing: made into lines when it is opened first; what is hidden is one side of the change, or what has not changed.
(() => {
  const pre = document.getElementById("lines");
  if (!pre) return;
  const details = document.getElementById("listing"), buttons = [...document.querySelectorAll("[data-code]")], NEAR = 3;
  let lines = null, show = "changes";

  function make() {
    if (lines) return;
    lines = pre.textContent.split("\n").map(text => {
      const line = document.createElement("span");
      line.textContent = text[0] === "-" ? "−" + text.slice(1) : text;
      if (text[0] === "-") line.className = "gone";
      if (text[0] === "+") line.className = "fresh";
      return line;
    });
    const code = document.createElement("code");
    code.append(...lines);
    pre.replaceChildren(code);
    render();
  }
  function render() {
    const near = new Set();
    if (show === "changes") lines.forEach((line, n) => {
      if (line.className.match(/gone|fresh/)) for (let m = n - NEAR; m <= n + NEAR; m++) near.add(m);
    });
    lines.forEach((line, n) => {
      const gone = line.classList.contains("gone"), fresh = line.classList.contains("fresh");
      line.classList.toggle("hidden", show === "changes" ? near.size > 0 && !near.has(n) : show === "before" ? fresh : show === "after" && gone);
    });
    for (const b of buttons) b.setAttribute("aria-pressed", String(b.dataset.code === show));
  }
  details.addEventListener("toggle", () => { if (details.open) make(); });
  for (const b of buttons) b.addEventListener("click", () => { show = b.dataset.code; details.open = true; make(); render(); });
  document.addEventListener("show-line", event => {
    const [name, role] = event.detail, mark = "−";
    details.open = true;
    make();
    const last = name.split(".").pop();
    const at = lines.findIndex(line => {
      const text = line.textContent, code = text.slice(1).trimStart();
      return (text[0] === mark) === (role === 1) && (code.startsWith(last + ":") || code.startsWith(last + " ="));
    });
    if (at < 0) return;
    if (lines[at].classList.contains("hidden")) { show = "both"; render(); }
    for (const line of pre.querySelectorAll(".there")) line.classList.remove("there");
    lines[at].classList.add("there");
    lines[at].scrollIntoView({ block: "center" });
  });
})();
