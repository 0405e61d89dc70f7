"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (name) => document.getElementById(name);
const element = (tag, text = "", parent = null) => {
  const made = document.createElement(tag);
  made.textContent = text;
  if (parent) parent.append(made);
  return made;
};

// The table -----------------------------------------------------------------------------------------------------------
const number = (value) => (Number.isInteger(value) ? String(value) : value.toFixed(3));
const shown = (cell) => {
  if (cell === null) return "–";
  if (!Array.isArray(cell)) return typeof cell === "number" ? number(cell) : cell;
  const [value, low, high] = cell.map((part) => (part === null ? null : part.toFixed(1)));
  return value === null ? "–" : low === null ? value : `${value} (${low} to ${high})`;
};
const key = (cell) => (Array.isArray(cell) ? cell[0] : cell);
const order = { column: -1, ascending: true };
let chosen = null;

function compare(one, other) {
  const [a, b] = [one, other].map((s) => (order.column < 0 ? s.name : key(s.cells[order.column])));
  if (a === null || b === null) return (a === null) - (b === null); // undefined last, in both directions
  const sign = order.ascending ? 1 : -1;
  return sign * (typeof a === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
}

function listed() {
  const wanted = byId("search").value.trim().toLowerCase();
  const found = data.subjects.filter((s) => [s.name, ...s.cells.map(shown)].join("\n").toLowerCase().includes(wanted));
  return found.sort(compare);
}

function fillTable() {
  const body = document.querySelector("#subjects tbody");
  const found = listed();
  body.replaceChildren();
  for (const subject of found) {
    const row = element("tr", "", body);
    row.setAttribute("aria-selected", subject === chosen);
    const button = element("button", subject.name, element("td", "", row));
    row.addEventListener("click", () => choose(subject));
    button.type = "button";
    for (const cell of subject.cells) {
      const made = element("td", shown(cell), row);
      if (typeof key(cell) === "number") made.className = "number";
    }
  }
  byId("count").textContent = `${found.length} of ${data.subjects.length}`;
}

function fillHead() {
  const head = document.querySelector("#subjects thead tr");
  ["subject", ...data.columns].forEach((title, index) => {
    const cell = element("th", "", head);
    cell.scope = "col";
    const button = element("button", title, cell);
    button.type = "button";
    button.addEventListener("click", () => {
      order.ascending = order.column === index - 1 ? !order.ascending : true;
      order.column = index - 1;
      for (const other of head.children) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", order.ascending ? "ascending" : "descending");
      for (const other of head.querySelectorAll("button")) other.textContent = other.textContent.replace(/ [▲▼]$/, "");
      button.textContent += order.ascending ? " ▲" : " ▼";
      fillTable();
    });
  });
}

// The viewer ----------------------------------------------------------------------------------------------------------
const COLOURS = ["#ffb000", "#00c8ff", "#ff4fa3", "#8cff66", "#ffffff", "#ff8040", "#b090ff", "#40ffd0"];
const LAYERS = { mask: "M", truth: "T", uncertainty: "U", samples: "S" };
const on = { mask: true, truth: true, uncertainty: false, samples: false };
const canvas = byId("canvas");
let pictures = {};
let slice = 0;

async function pixels(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const surface = document.createElement("canvas");
  surface.width = image.width;
  surface.height = image.height;
  const context = surface.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return { surface, context };
}

async function choose(subject) {
  chosen = subject;
  fillTable();
  byId("viewer-title").textContent = subject.name;
  const values = document.querySelector("#values tbody");
  values.replaceChildren();
  for (const [name, value] of Object.entries(subject.all)) {
    const row = element("tr", "", values);
    element("th", name, row).scope = "row";
    element("td", typeof value === "number" ? number(value) : value, row);
  }
  const layers = subject.layers;
  for (const part of [canvas, byId("slice").parentNode.parentNode, byId("layers"), byId("legend")]) part.hidden = !layers;
  if (!layers) return;
  const names = Object.keys(layers.pictures);
  const loaded = await Promise.all(names.map((name) => pixels(layers.pictures[name])));
  if (chosen !== subject) return; // another one was chosen meanwhile
  pictures = Object.fromEntries(names.map((name, index) => [name, loaded[index]]));
  byId("slice").max = layers.slices;
  slice = layers.first;
  fillLayers();
  draw();
}

function fillLayers() {
  const parent = byId("layers");
  parent.replaceChildren();
  for (const [name, letter] of Object.entries(LAYERS)) {
    if (!pictures[name]) continue;
    const label = element("label", "", parent);
    const box = element("input", "", label);
    box.type = "checkbox";
    box.checked = on[name];
    box.id = `show-${name}`;
    box.addEventListener("change", () => { on[name] = box.checked; draw(); });
    label.append(` ${name} (${letter})`);
  }
  const legend = byId("legend");
  legend.replaceChildren();
  data.regions.forEach((region, index) => line(legend, region, COLOURS[index % COLOURS.length], ""));
  if (pictures.truth) line(legend, "truth: dashed", "", "6 4");
  if (pictures.samples) line(legend, "samples: dotted", "", "2 4");
}

function line(parent, text, colour, dashes) {
  const made = element("span", "", parent);
  const box = svg("svg", { width: 32, height: 10 }, made);
  svg("line", { x1: 0, y1: 5, x2: 32, y2: 5, stroke: colour || "currentColor", "stroke-width": 4, "stroke-dasharray": dashes }, box);
  made.append(text);
}

function corner() {
  const { columns, width, height } = chosen.layers;
  return [(slice % columns) * width, Math.floor(slice / columns) * height];
}

function draw() {
  if (!chosen || !chosen.layers) return;
  const { width, height, aspect, slices } = chosen.layers;
  canvas.width = 640;
  canvas.height = Math.round(640 / aspect);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(pictures.image.surface, ...corner(), width, height, 0, 0, canvas.width, canvas.height);
  if (on.uncertainty && pictures.uncertainty) drawUncertainty(context);
  const sets = { samples: [2, 4], truth: [6, 4], mask: [] };
  for (const [name, dashes] of Object.entries(sets)) {
    if (on[name] && pictures[name]) drawOutlines(context, name, dashes);
  }
  byId("slice").value = slice + 1;
  byId("position").textContent = `${slice + 1} of ${slices}`;
  const layers = Object.keys(on).filter((name) => on[name] && pictures[name]);
  canvas.setAttribute("aria-label", `${chosen.name}, slice ${slice + 1} of ${slices}, with ${layers.join(", ") || "no layer"}`);
}

function grey(name) {
  const { width, height } = chosen.layers;
  return pictures[name].context.getImageData(...corner(), width, height).data.filter((_, index) => index % 4 === 0);
}

// stripes, so that it can be told from the image without colour
function drawUncertainty(context) {
  const { width, height } = chosen.layers;
  const values = grey("uncertainty");
  const [w, h] = [canvas.width / width, canvas.height / height];
  for (let y = 0; y < canvas.height; y += 2) {
    const from = Math.floor(y / h) * width;
    for (let x = 0; x < canvas.width; x += 2) {
      const value = values[from + Math.floor(x / w)] / 255;
      if (value < 0.05) continue;
      context.fillStyle = `rgba(255, 230, 80, ${(x + y) % 8 < 4 ? value * 0.9 : value * 0.35})`;
      context.fillRect(x, y, 2, 2);
    }
  }
}

// along the edges of the pixels, with a dark rim, so that they can be told from the image without colour
function drawOutlines(context, name, dashes) {
  const { width, height } = chosen.layers;
  const values = grey(name);
  const [w, h] = [canvas.width / width, canvas.height / height];
  const inside = (x, y, bit) => (x >= 0 && y >= 0 && x < width && y < height ? (values[y * width + x] >> bit) & 1 : 0);
  context.setLineDash(dashes);
  const count = name === "samples" ? 8 : data.regions.length;
  for (let bit = 0; bit < count; bit++) {
    const path = new Path2D();
    const run = (from, to) => { path.moveTo(...from); path.lineTo(...to); };
    for (let y = 0; y <= height; y++) {
      for (let x = 0; x <= width; x++) {
        if (inside(x, y, bit) !== inside(x, y - 1, bit)) run([x * w, y * h], [(x + 1) * w, y * h]);
        if (inside(x, y, bit) !== inside(x - 1, y, bit)) run([x * w, y * h], [x * w, (y + 1) * h]);
      }
    }
    context.lineWidth = name === "mask" ? 5 : 4;
    context.strokeStyle = "rgba(0, 0, 0, 0.6)";
    context.stroke(path);
    context.lineWidth = name === "mask" ? 2.5 : 2;
    context.strokeStyle = COLOURS[bit % COLOURS.length];
    context.stroke(path);
  }
  context.setLineDash([]);
}

function move(step) {
  if (!chosen || !chosen.layers) return;
  slice = Math.min(chosen.layers.slices - 1, Math.max(0, slice + step));
  draw();
}

function step(by) {
  const found = listed();
  const next = found[found.indexOf(chosen) + by];
  if (next) choose(next);
}

canvas.addEventListener("wheel", (event) => { event.preventDefault(); move(event.deltaY > 0 ? 1 : -1); }, { passive: false });
byId("slice").addEventListener("input", (event) => { slice = Number(event.target.value) - 1; draw(); });
byId("search").addEventListener("input", fillTable);
document.addEventListener("keydown", (event) => {
  const typing = ["INPUT", "SELECT"].includes(event.target.tagName) && event.target.type !== "checkbox";
  if (typing || event.ctrlKey || event.altKey || event.metaKey) return;
  const name = Object.keys(LAYERS).find((layer) => LAYERS[layer] === event.key.toUpperCase());
  if (name && pictures[name]) byId(`show-${name}`).click();
  else if (event.key === "ArrowUp" || event.key === "ArrowDown") move(event.key === "ArrowUp" ? 1 : -1);
  else if (event.key.toUpperCase() === "N" || event.key.toUpperCase() === "P") step(event.key.toUpperCase() === "N" ? 1 : -1);
  else return;
  event.preventDefault();
});

// Learning curves -----------------------------------------------------------------------------------------------------
function svg(tag, attributes, parent) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent.append(made);
  return made;
}

function drawCurve() {
  const name = byId("curve").value;
  const points = data.history.filter((row) => name in row);
  const [left, top, width, height] = [70, 15, 600, 260];
  const range = (values) => [Math.min(...values), Math.max(...values)];
  const [x0, x1] = range(points.map((row) => row.epoch));
  const [y0, y1] = range(points.map((row) => row[name]));
  const x = (value) => left + (width * (value - x0)) / (x1 - x0 || 1);
  const y = (value) => top + height - (height * (value - y0)) / (y1 - y0 || 1);
  byId("plot").replaceChildren();
  const chart = svg("svg", { viewBox: "0 0 700 320", role: "img", "aria-label": `${name} by epoch` }, byId("plot"));
  svg("rect", { x: left, y: top, width, height, fill: "none", stroke: "currentColor", "stroke-width": 0.5 }, chart);
  const text = (content, place) => { svg("text", { "font-size": 13, fill: "currentColor", ...place }, chart).textContent = content; };
  for (const value of new Set([y0, y1])) text(value.toPrecision(3), { x: left - 8, y: y(value) + 5, "text-anchor": "end" });
  for (const value of new Set([x0, x1])) text(value, { x: x(value), y: top + height + 18, "text-anchor": "middle" });
  text("epoch", { x: left + width / 2, y: top + height + 30, "text-anchor": "middle" });
  for (const [split, dashes] of [["train", ""], ["validation", "7 5"]]) {
    const rows = points.filter((row) => row.split === split);
    const line = rows.map((row) => `${x(row.epoch)},${y(row[name])}`).join(" ");
    svg("polyline", { points: line, fill: "none", stroke: "currentColor", "stroke-width": 2, "stroke-dasharray": dashes }, chart);
    for (const row of rows.length < 60 ? rows : []) svg("circle", { cx: x(row.epoch), cy: y(row[name]), r: 2.5, fill: "currentColor" }, chart);
  }
}

function fillCurves() {
  const names = new Set(data.history.flatMap((row) => Object.keys(row)));
  for (const name of names) if (!["epoch", "split"].includes(name)) element("option", name, byId("curve"));
  byId("curves").hidden = !names.size;
  byId("curve").addEventListener("change", drawCurve);
  if (names.size) drawCurve();
}

fillHead();
fillTable();
fillCurves();
if (data.subjects.length) choose(data.subjects[0]);
