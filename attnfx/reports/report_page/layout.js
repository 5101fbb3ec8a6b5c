"use strict";
// A layered drawing (Sugiyama et al. 1981): rows by the longest path, then each row in the order of its neighbours' centres.
function layered(count, edges, width) {
  const before = Array.from({ length: count }, () => []), after = Array.from({ length: count }, () => []);
  for (const [a, b] of edges) if (a < b) { before[b].push(a); after[a].push(b); }
  const level = new Array(count).fill(0);
  for (let n = 0; n < count; n++) for (const a of before[n]) level[n] = Math.max(level[n], level[a] + 1);
  for (let n = count - 1; n >= 0; n--) // what only feeds something far below stands right above it
    if (!before[n].length && after[n].length) level[n] = Math.min(...after[n].map(m => level[m])) - 1;
  const rows = [];
  level.forEach((l, n) => (rows[l] = rows[l] || []).push(n));
  const x = new Array(count).fill(0);
  const place = row => {
    let at = 0;
    for (const n of row) { x[n] = at + width(n) / 2; at += width(n) + 24; }
    const middle = (at - 24) / 2;
    for (const n of row) x[n] -= middle;
  };
  rows.forEach(place);
  for (let sweep = 0; sweep < 4; sweep++) {
    const down = sweep % 2 === 0, sides = down ? before : after;
    for (const row of down ? rows : [...rows].reverse()) {
      if (!row) continue;
      const centre = new Map(row.map(n => [n, sides[n].length ? sides[n].reduce((s, m) => s + x[m], 0) / sides[n].length : x[n]]));
      row.sort((a, b) => centre.get(a) - centre.get(b) || a - b);
      place(row);
      const shift = row.reduce((s, n) => s + centre.get(n) - x[n], 0) / row.length;
      for (const n of row) x[n] += shift;
    }
  }
  return { x, y: level.map(l => l * 62) };
}
