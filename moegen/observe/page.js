"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const shown = (value) => (value === null || value === undefined ? "-" : String(value));
const LEFT = 64; // pixels for names and numbers beside a chart
const FOOT = 20; // pixels for step numbers below it

// Dark to light on dark paper, light to dark on light: what is much stands out on both.
const dark = matchMedia("(prefers-color-scheme: dark)");
function ramp(t) {
  return `hsl(265 ${20 + 60 * t}% ${dark.matches ? 16 + 56 * t : 95 - 58 * t}%)`;
}
// Below the mean blue, above it red; the mean is the paper's own grey.
function diverging(ratio) {
  const t = Math.max(-1, Math.min(1, Math.log2(ratio) / 2));
  const light = dark.matches ? 22 + 40 * Math.abs(t) : 92 - 45 * Math.abs(t);
  return `hsl(${t < 0 ? 215 : 10} ${Math.round(85 * Math.abs(t))}% ${light}%)`;
}
function lineColour(index, count) {
  return `hsl(${Math.round((300 * index) / Math.max(1, count))} 65% ${dark.matches ? 65 : 40}%)`;
}

// A canvas as wide as its place and so many pixels high, cleared and sharp on any screen.
function canvas(id, height) {
  const place = at(id);
  const scale = window.devicePixelRatio || 1;
  const width = place.clientWidth || 600;
  place.style.height = `${height}px`;
  place.width = Math.round(width * scale);
  place.height = Math.round(height * scale);
  const pen = place.getContext("2d");
  pen.scale(scale, scale);
  pen.font = "12px system-ui, sans-serif";
  pen.fillStyle = colour("--faint");
  return { place, pen, width, height };
}
function strip(id, colourOf) {
  const { pen, width, height } = canvas(id, 11);
  for (let x = 0; x < width; x++) {
    pen.fillStyle = colourOf(x / (width - 1));
    pen.fillRect(x, 0, 1, height);
  }
}
function cut(text) {
  return text.length > 9 ? text.slice(0, 8) + "\u2026" : text;
}

// A row of cells a layer: `colours[row][column]`, and `told(row, column)` on pointing. Names of
// layers that had collapsed at the step of this index stand out.
function heatmap(id, note, step, columns, colours, told) {
  const names = data.layers.map((layer) => layer.name);
  const high = Math.max(3, Math.min(22, Math.floor(480 / names.length)));
  const { place, pen, width } = canvas(id, high * names.length + FOOT);
  const wide = (width - LEFT) / columns;
  const every = Math.ceil(14 / high);
  names.forEach((name, row) => {
    const bad = data.layers[row].collapsed[step];
    pen.fillStyle = colour(bad ? "--alarm" : "--faint");
    const text = cut(bad ? `! ${name}` : name);
    if (bad || row % every === 0) pen.fillText(text, 0, row * high + Math.min(high - 2, 15));
  });
  const gap = high > 5 ? 1 : 0;
  colours.forEach((line, row) => line.forEach((value, column) => {
    if (value === null) return;
    pen.fillStyle = value;
    pen.fillRect(LEFT + column * wide, row * high, wide + (wide > 4 ? -1 : 0.6), high - gap);
  }));
  place.onmousemove = (event) => {
    const row = Math.floor(event.offsetY / high);
    const column = Math.floor((event.offsetX - LEFT) / wide);
    const inside = row >= 0 && row < names.length && column >= 0 && column < columns;
    at(note).textContent = inside ? told(row, column) : "";
  };
  return { pen, width, bottom: high * names.length + 14 };
}
function stepsBelow(pen, width, y) {
  pen.fillStyle = colour("--faint");
  pen.fillText(`step ${data.steps[0]}`, LEFT, y);
  const last = String(data.steps[data.steps.length - 1]);
  pen.fillText(last, width - pen.measureText(last).width, y);
}
function bounds(series) {
  const known = series.flat().filter((value) => value !== null);
  if (!known.length) return [0, 1];
  const [low, high] = known.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)],
    [Infinity, -Infinity]);
  return low === high ? [low - 0.5, high + 0.5] : [low, high];
}

// Series over steps. The nearest line is named on pointing.
function lines(id, note, names, series) {
  const height = 220;
  const { place, pen, width } = canvas(id, height);
  const [low, high] = bounds(series);
  const first = data.steps[0];
  const span = Math.max(1, data.steps[data.steps.length - 1] - first);
  const x = (index) => LEFT + 3 + ((data.steps[index] - first) / span) * (width - LEFT - 6);
  const y = (value) => 8 + (1 - (value - low) / (high - low)) * (height - FOOT - 16);
  for (const value of [low, (low + high) / 2, high]) {
    pen.fillText(String(Number(value.toPrecision(3))), 0, y(value) + 4);
    pen.fillStyle = colour("--grid");
    pen.fillRect(LEFT, y(value), width - LEFT, 1);
    pen.fillStyle = colour("--faint");
  }
  series.forEach((values, index) => {
    pen.strokeStyle = lineColour(index, series.length);
    pen.fillStyle = pen.strokeStyle;
    pen.lineWidth = 1.5;
    pen.beginPath();
    let open = false;
    values.forEach((value, step) => {
      if (value !== null) pen[open ? "lineTo" : "moveTo"](x(step), y(value));
      open = value !== null;
    });
    pen.stroke();
    const last = values.length - 1;
    if (values[last] !== null) pen.fillRect(x(last) - 2, y(values[last]) - 2, 4, 4);
  });
  stepsBelow(pen, width, height - 4);
  place.onmousemove = (event) => {
    let best = [Infinity, ""];
    series.forEach((values, index) => values.forEach((value, step) => {
      if (value === null) return;
      const far = Math.hypot(x(step) - event.offsetX, y(value) - event.offsetY);
      if (far < best[0]) best = [far, `${names[index]}, step ${data.steps[step]}: ${value}`];
    }));
    at(note).textContent = best[1];
  };
}

function union(group) {
  return [...new Set(data.layers.flatMap((layer) => Object.keys(layer[group])))];
}
function drawOverSteps() {
  const [group, name] = JSON.parse(at("statistic").value);
  const empty = data.steps.map(() => null);
  const owned = (layer) => (Object.hasOwn(layer[group], name) ? layer[group][name] : empty);
  const series = data.layers.map(owned);
  const names = data.layers.map((layer) => `layer ${layer.name}`);
  const [low, high] = bounds(series);
  const scaled = (value) => (value === null ? null : ramp((value - low) / (high - low)));
  const { pen, width, bottom } = heatmap("layers-map", "layers-note",
    data.steps.length - 1, data.steps.length,
    series.map((values) => values.map(scaled)),
    (row, column) => `${names[row]}, step ${data.steps[column]}: ${shown(series[row][column])}`
      + (data.layers[row].collapsed[column] ? ", collapsed" : ""));
  stepsBelow(pen, width, bottom);
  strip("scale", ramp);
  at("low").textContent = String(Number(low.toPrecision(4)));
  at("high").textContent = String(Number(high.toPrecision(4)));
  lines("layers-lines", "lines-note", names, series);
}
function drawExperts() {
  const index = Number(at("step").value);
  const unused = colour("--unused");
  const loads = data.layers.map((layer) => layer.load[index]);
  const means = loads.map((load) => load.reduce((a, b) => a + b, 0) / load.length || 1);
  at("step-note").textContent = String(data.steps[data.detailed[index]]);
  const { pen, bottom } = heatmap("experts-map", "experts-note",
    data.detailed[index], Math.max(...loads.map((load) => load.length)),
    loads.map((load, row) => load.map((n) => (n ? diverging(n / means[row]) : unused))),
    (row, expert) => (expert >= loads[row].length ? ""
      : `layer ${data.layers[row].name}, expert ${expert}: ${loads[row][expert]} choices, `
        + `${(loads[row][expert] / means[row]).toFixed(2)} of the mean`));
  pen.fillStyle = colour("--faint");
  pen.fillText("expert 0", LEFT, bottom);
  strip("ratios", (t) => diverging(2 ** (4 * t - 2)));
}
function drawLosses() {
  const [name, values] = losses[Number(at("loss").value)];
  lines("loss-lines", "loss-note", [name], [values]);
}

function options(id, pairs, draw) {
  for (const [value, text] of pairs) at(id).append(new Option(text, value));
  at(id).onchange = draw;
}
const losses = [["total", data.loss], ...Object.entries(data.losses)]
  .filter(([, values]) => values.some((value) => value !== null));
const drawn = [];
if (data.layers.length) {
  at("over-steps").hidden = at("within").hidden = false;
  options("statistic", [
    ...union("statistics").map((name) => [JSON.stringify(["statistics", name]), name]),
    ...union("losses").map((name) => [JSON.stringify(["losses", name]), `loss: ${name}`]),
  ], drawOverSteps);
  at("step").max = String(data.detailed.length - 1);
  at("step").value = at("step").max;
  at("step").oninput = drawExperts;
  drawn.push(drawOverSteps, drawExperts);
}
if (losses.length) {
  at("losses").hidden = false;
  options("loss", losses.map(([name], index) => [String(index), name]), drawLosses);
  drawn.push(drawLosses);
}
function draw() {
  drawn.forEach((each) => each());
}
draw();
window.onresize = draw;
dark.onchange = draw;
