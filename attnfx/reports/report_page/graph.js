"use strict";
// The drawing of one module at a time: modules below it are boxes where there are too many nodes to read.
(() => {
  const source = document.getElementById("graph-data");
  if (!source) return;
  const data = JSON.parse(source.textContent);
  const NAME = 0, CALLS = 1, MODULE = 2, SOURCE = 3, ROLE = 4, READS = 5, BEFORE = 6, ROLES = ["kept", "removed", "new"];
  const READABLE = 90, MOST = 400;
  const nodes = [];
  for (const graph of data.graphs) {
    const offset = nodes.length;
    for (const node of graph) {
      node[READS] = node[READS].map(n => n + offset);
      node[BEFORE] = node[BEFORE].map(n => n + offset);
      nodes.push(node);
    }
  }
  const drawing = document.getElementById("drawing"), scope = document.getElementById("scope"), detail = document.getElementById("node");
  const SVG = "http://www.w3.org/2000/svg";
  let show = "after", chosen = -1, svg = null, view = null, whole = null;
  const moduleOf = n => data.modules[nodes[n][MODULE]];
  const inside = (module, path) => !path || module === path || module.startsWith(path + ".");
  const shown = n => show === "both" || nodes[n][ROLE] !== (show === "before" ? 2 : 1);
  const reads = n => show === "before" && nodes[n][BEFORE].length ? nodes[n][BEFORE]
    : show === "both" ? [...new Set([...nodes[n][READS], ...nodes[n][BEFORE]])] : nodes[n][READS];

  const paths = new Map([["", 0]]);
  for (const node of nodes) {
    const parts = data.modules[node[MODULE]].split(".");
    for (let k = 1; k <= parts.length && parts[0]; k++) {
      const path = parts.slice(0, k).join(".");
      paths.set(path, (paths.get(path) || 0) + 1);
    }
  }
  for (const [path, count] of paths) {
    const option = document.createElement("option");
    option.value = path;
    option.textContent = path ? `${path} (${count})` : "the whole model";
    scope.append(option);
  }

  function element(name, attributes, parent, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  }

  function boxes(path) {
    const members = [];
    for (let n = 0; n < nodes.length; n++)
      if (shown(n) && nodes[n][CALLS] !== "input" && inside(moduleOf(n), path)) members.push(n);
    const fold = members.length > READABLE;
    const found = [], of = new Map(), modules = new Map();
    for (const n of members) {
      const rest = moduleOf(n).slice(path ? path.length + 1 : 0).split(".")[0];
      const below = fold && moduleOf(n) !== path && rest ? (path ? path + "." : "") + rest : null;
      if (below !== null && modules.has(below)) { of.set(n, modules.get(below)); found[modules.get(below)].members.push(n); continue; }
      if (found.length >= MOST) break;
      if (below !== null) modules.set(below, found.length);
      of.set(n, found.length);
      found.push({ members: [n], module: below });
    }
    if (!fold) {
      const outer = new Map();
      for (const n of members) for (const m of reads(n)) if (!of.has(m) && shown(m)) outer.set(m, true);
      const stubs = [...outer.keys()].sort((a, b) => a - b).map(m => ({ members: [m], module: null, outside: true }));
      for (const box of found) for (const n of box.members) of.set(n, of.get(n) + stubs.length);
      stubs.forEach((stub, k) => of.set(stub.members[0], k));
      found.unshift(...stubs);
    }
    return { found, of, left: members.length - [...found].reduce((s, b) => s + (b.outside ? 0 : b.members.length), 0) };
  }

  function draw(focus) {
    const { found, of, left } = boxes(scope.value);
    const label = box => box.module !== null ? box.module.slice(scope.value ? scope.value.length + 1 : 0) : nodes[box.members[0]][box.outside ? NAME : CALLS];
    const below = box => box.module !== null ? `${box.members.length} nodes` : nodes[box.members[0]][box.outside ? CALLS : NAME];
    const short = text => text.length > 34 ? "…" + text.slice(-33) : text;
    const wide = box => Math.max(60, 7.4 * short(label(box)).length + 16, 6.2 * short(below(box)).length + 16);
    const edges = new Map();
    found.forEach((box, b) => { if (!box.outside) for (const n of box.members) for (const m of reads(n)) {
      const a = of.get(m);
      if (a !== undefined && a !== b) edges.set(`${a} ${b}`, [a, b]);
    } });
    const { x, y } = layered(found.length, [...edges.values()], b => wide(found[b]));
    drawing.replaceChildren();
    svg = element("svg", { role: "group", tabindex: "0", "aria-label": `Graph of ${scope.value || "the whole model"}, ${found.length} boxes` }, drawing);
    for (const [a, b] of edges.values()) {
      const top = y[a] + 17, bottom = y[b] - 17, middle = (top + bottom) / 2;
      element("path", { class: "edge", d: `M${x[a]} ${top}C${x[a]} ${middle} ${x[b]} ${middle} ${x[b]} ${bottom}` }, svg);
    }
    let start = -1;
    found.forEach((box, b) => {
      const roles = new Set(box.members.map(n => nodes[n][ROLE]));
      const role = box.outside ? "outside" : roles.has(2) ? "new" : roles.has(1) ? "removed" : "";
      const here = box.members.includes(focus);
      if (here || (start < 0 && (role === "new" || role === "removed"))) start = b;
      const g = element("g", { class: `${role} ${box.module !== null ? "inner" : ""} ${here ? "chosen" : ""}`, tabindex: "0", role: "button",
        transform: `translate(${x[b]} ${y[b]})`, "aria-label": `${label(box)}, ${below(box)}${role ? ", " + role : ""}` }, svg);
      const w = wide(box);
      element("rect", { x: -w / 2, y: -17, width: w, height: 34, rx: 5 }, g);
      element("text", { "text-anchor": "middle", y: -2 }, g, short(label(box)));
      element("text", { class: "sub", "text-anchor": "middle", y: 11 }, g, short(below(box)));
      const act = () => box.module !== null ? open(box.module) : select(box.members[0], g);
      g.addEventListener("click", act);
      g.addEventListener("keydown", event => { if (event.key === "Enter" || event.key === " ") { act(); event.preventDefault(); } });
    });
    const half = found.map(box => wide(box) / 2);
    const low = Math.min(...x.map((v, b) => v - half[b]), 0) - 20, high = Math.max(...x.map((v, b) => v + half[b]), 0) + 20;
    whole = [low, Math.min(...y, 0) - 40, high - low, Math.max(...y, 0) - Math.min(...y, 0) + 80];
    const box = drawing.getBoundingClientRect(), at = start < 0 ? 0 : start;
    view = found.length ? [x[at] - box.width / 2, y[at] - box.height / 2, box.width || 800, box.height || 500] : [...whole];
    if (whole[2] <= view[2] && whole[3] <= view[3]) view = [...whole];
    look();
    if (left > 0) detail.textContent = `${left} more nodes are not drawn; choose a module.`;
  }
  function look() { svg.setAttribute("viewBox", view.join(" ")); }
  function zoom(by) { view = [view[0] + view[2] * (1 - by) / 2, view[1] + view[3] * (1 - by) / 2, view[2] * by, view[3] * by]; look(); }
  function open(path, focus = -1) { scope.value = path; draw(focus); }

  function select(n, g) {
    chosen = n;
    for (const old of svg.querySelectorAll(".chosen")) old.classList.remove("chosen");
    if (g) g.classList.add("chosen");
    const node = nodes[n], said = document.createElement("div");
    const line = document.createElement("code");
    line.textContent = data.sources[node[SOURCE]];
    const name = document.createElement("b");
    name.textContent = node[NAME];
    said.append(name, ` = ${node[CALLS]}, ${ROLES[node[ROLE]]}, in ${moduleOf(n) || "the model itself"} `, document.createElement("br"), line, " ");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Show in the code";
    button.addEventListener("click", () => document.dispatchEvent(new CustomEvent("show-line", { detail: [node[NAME], node[ROLE]] })));
    said.append(button);
    detail.replaceChildren(said);
  }
  function reach(n) {
    if (!shown(n)) press(nodes[n][ROLE] === 2 ? "after" : "before");
    let path = moduleOf(n);
    open(path, n);
    select(n, svg.querySelector(".chosen"));
  }
  function press(which) {
    show = which;
    for (const b of document.querySelectorAll("[data-show]")) b.setAttribute("aria-pressed", String(b.dataset.show === which));
  }

  for (const b of document.querySelectorAll("[data-show]")) b.addEventListener("click", () => { press(b.dataset.show); draw(chosen); });
  for (const b of document.querySelectorAll("[data-zoom]")) b.addEventListener("click", () => {
    if (b.dataset.zoom === "fit") { view = [...whole]; look(); } else zoom(b.dataset.zoom === "in" ? 0.8 : 1.25);
  });
  scope.addEventListener("change", () => draw(-1));
  drawing.addEventListener("wheel", event => { if (event.ctrlKey || event.metaKey || document.activeElement === svg) { zoom(event.deltaY < 0 ? 0.9 : 1.1); event.preventDefault(); } }, { passive: false });
  drawing.addEventListener("keydown", event => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (moves) { view[0] += moves[0] * view[2] / 8; view[1] += moves[1] * view[3] / 8; look(); }
    else if (event.key === "+" || event.key === "=") zoom(0.8);
    else if (event.key === "-") zoom(1.25);
    else return;
    event.preventDefault();
  });
  let from = null;
  drawing.addEventListener("pointerdown", event => { from = [event.clientX, event.clientY]; });
  addEventListener("pointermove", event => {
    if (!from || !event.buttons) { from = null; return; }
    const box = drawing.getBoundingClientRect(), scale = Math.max(view[2] / box.width, view[3] / box.height);
    view[0] -= (event.clientX - from[0]) * scale;
    view[1] -= (event.clientY - from[1]) * scale;
    from = [event.clientX, event.clientY];
    look();
  });
  addEventListener("pointerup", () => { from = null; });

  const find = document.getElementById("find"), list = document.getElementById("found");
  find.addEventListener("input", () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    list.replaceChildren();
    if (!words.length) return;
    const hits = [];
    for (let n = 0; n < nodes.length && hits.length < 50; n++) {
      const node = nodes[n], text = [node[NAME], node[CALLS], moduleOf(n), data.sources[node[SOURCE]], ROLES[node[ROLE]]].join(" ").toLowerCase();
      if (words.every(word => text.includes(word))) hits.push(n);
    }
    for (const n of hits) {
      const item = document.createElement("li"), button = document.createElement("button");
      button.type = "button";
      button.textContent = `${nodes[n][NAME]} = ${nodes[n][CALLS]}  ${moduleOf(n)}`;
      button.addEventListener("click", () => reach(n));
      item.append(button);
      list.append(item);
    }
    if (!hits.length) list.append(Object.assign(document.createElement("li"), { textContent: "No node has all of these words." }));
  });
  for (const b of document.querySelectorAll(".to-graph")) b.addEventListener("click", () => {
    const named = nodes.findIndex(node => node[NAME] === b.dataset.node);
    const fresh = nodes.findIndex((node, n) => node[ROLE] === 2 && moduleOf(n) === b.dataset.module);
    const at = named >= 0 && nodes[named][ROLE] === 0 ? named : fresh >= 0 ? fresh : named;
    if (at >= 0) { reach(at); drawing.scrollIntoView({ block: "center" }); svg.focus({ preventScroll: true }); }
  });
  const first = nodes.findIndex((node, n) => node[ROLE] === 2 && shown(n));
  const begin = () => open(first >= 0 ? moduleOf(first) : "", first);
  new IntersectionObserver((seen, watcher) => { if (seen.some(s => s.isIntersecting) && !svg) { watcher.disconnect(); begin(); } }).observe(drawing);
})();
