"use strict";
// Draws the figures of the page: SVG as wide as its place, again when that changes.

const CHARTS = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const LEFT = 52, RIGHT = 10, TOP = 22, BOTTOM = 38; // pixels around the field of a figure
const TALL = 260, MAP = 8; // of a figure; above a heat map

function node(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(name, attributes = {}, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function canvas(width, height, label) {
  return shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e6) return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
  return String(Number(value.toPrecision(3)));
}

function linear(from, to, low, high) {
  const spread = to - from || 1;
  return (value) => low + ((value - from) / spread) * (high - low);
}

// least: between two of them; whole steps and layers have no halves.
function evenTicks(from, to, most, least = 1) {
  const rough = (to - from) / most || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(least, [1, 2, 5, 10].find((n) => n * unit >= rough) * unit);
  const found = [];
  for (let at = Math.ceil(from / step) * step; at <= to; at += step) found.push(at);
  return found;
}

// Decades; with 2 and 5 of each where there are few, and even ones within a part of one.
function logTicks(from, to) {
  const decades = Math.log10(to / from);
  const every = Math.max(1, Math.ceil(decades / 6));
  const found = [];
  for (let power = Math.floor(Math.log10(from)); power <= Math.ceil(Math.log10(to)); power += 1) {
    if (power % every === 0) {
      for (const digit of decades < 2 ? [1, 2, 5] : [1]) found.push(Number(`${digit}e${power}`));
    }
  }
  const within = found.filter((value) => value >= from && value <= to);
  return within.length < 3 && decades < 1 ? evenTicks(from, to, 5, 0) : within;
}

// The field with both axes; returns the scales. y is logarithmic, from low to high.
function axes(svg, { width, height, low, high, x, xlabel, ylabel, ticks }) {
  const y = (value) => linear(Math.log(low), Math.log(high), height - BOTTOM, TOP)(Math.log(value));
  for (const tick of logTicks(low, high)) {
    const at = y(tick);
    svg.append(shape("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: at, y2: at }));
    svg.append(shape("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, number(tick)));
  }
  for (const tick of ticks) {
    const place = { x: x(tick), y: height - BOTTOM + 16, "text-anchor": "middle" };
    svg.append(shape("text", place, String(tick)));
  }
  svg.append(shape("text", { x: 0, y: 11 }, ylabel));
  const middle = { x: (LEFT + width - RIGHT) / 2, y: height - 4, "text-anchor": "middle" };
  svg.append(shape("text", middle, xlabel));
  return y;
}

function shorter(text, width) {
  const most = Math.floor(width / 6.2);
  return text.length > most ? `${text.slice(0, most - 1)}…` : text;
}

// ---------------------------------------------------------------- curves

function curves(place, chart) {
  const groups = [...new Set(chart.series.map((one) => one.name.replace(/, (train|held out)$/, "")))];
  const series = chart.series.map((one) => ({
    ...one,
    colour: `var(--s${groups.indexOf(one.name.replace(/, (train|held out)$/, "")) % 6})`,
    dash: one.name.endsWith(", train") ? "4 3" : "none",
    points: one.x.map((x, i) => [x, one.y[i]]).filter(([, y]) => y !== null && y > 0),
  }));
  const drawing = node("div");
  const legend = node("ul", { class: "legend" });
  for (const one of series) {
    const swatch = shape("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" });
    swatch.append(shape("line", { x1: 0, x2: 26, y1: 5, y2: 5, "stroke-width": 2.5, "stroke-dasharray": one.dash, style: `stroke:${one.colour}` }));
    one.value = node("span");
    legend.append(node("li", {}, swatch, `${one.name} `, one.value));
  }
  place.append(node("h4", {}, chart.title), drawing, legend);

  const all = series.flatMap((one) => one.points);
  if (!all.length) {
    drawing.append("nothing above zero");
    return () => {};
  }
  const xs = all.map(([x]) => x), ys = all.map(([, y]) => y);
  const from = Math.min(...xs), to = Math.max(...xs);
  const low = Math.min(...ys) / 1.2, high = Math.max(...ys) * 1.2;
  const told = series.filter((one) => one.points.length).map((one) =>
    `${one.name} from ${number(one.points[0][1])} to ${number(one.points.at(-1)[1])}`);

  return (width) => {
    const svg = canvas(width, TALL, `${chart.title}: ${told.join("; ")}`);
    const x = linear(from, to, LEFT, width - RIGHT);
    const y = axes(svg, {
      width, height: TALL, low, high, x, ylabel: chart.ylabel, xlabel: shorter(chart.xlabel, width - LEFT),
      ticks: evenTicks(from, to, width / 70),
    });
    for (const one of series) {
      const path = one.points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
      svg.append(shape("polyline", { points: path, fill: "none", "stroke-width": 2, "stroke-linejoin": "round", "stroke-dasharray": one.dash, style: `stroke:${one.colour}` }));
      if (one.points.length < 30) {
        for (const [a, b] of one.points) svg.append(shape("circle", { cx: x(a), cy: y(b), r: 3, style: `fill:${one.colour}` }));
      }
    }
    const cursor = shape("line", { class: "cursor", y1: TOP, y2: TALL - BOTTOM, visibility: "hidden" });
    svg.append(cursor);
    const show = (at) => {
      for (const one of series) {
        const near = one.points.reduce((best, point) =>
          best === null || Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best, null);
        one.value.textContent = at === null || near === null ? "" : number(near[1]);
      }
      cursor.setAttribute("visibility", at === null ? "hidden" : "visible");
      if (at !== null) {
        cursor.setAttribute("x1", x(at));
        cursor.setAttribute("x2", x(at));
      }
    };
    svg.addEventListener("pointermove", (event) => {
      const across = (event.offsetX / svg.clientWidth) * width;
      show(Math.min(to, Math.max(from, linear(LEFT, width - RIGHT, from, to)(across))));
    });
    svg.addEventListener("pointerleave", () => show(null));
    drawing.replaceChildren(svg);
  };
}

// ---------------------------------------------------------------- layers

// keep: null while nothing has been decided.
function isKept(keep, layer) {
  return keep === null || keep.includes(layer);
}

function layerBars(svg, values, keep, y, bottom, width) {
  const wide = (width - RIGHT - LEFT) / values.length;
  values.forEach((value, layer) => {
    const top = Math.min(y(value), bottom - 1);
    const kept = isKept(keep, layer);
    const bar = shape("rect", {
      class: kept ? "kept-bar" : "gone-bar", x: LEFT + (layer + 0.15) * wide, y: top,
      width: wide * 0.7, height: bottom - top,
    });
    const fate = keep === null ? "" : kept ? ", kept" : ", removed";
    bar.append(shape("title", {}, `layer ${layer}${fate}: ${number(value)}`));
    svg.append(bar);
  });
}

function layerScale(count, width) {
  return (layer) => LEFT + ((layer + 0.5) * (width - RIGHT - LEFT)) / count;
}

function bars(place, chart) {
  const drawing = node("div");
  place.append(node("h4", {}, chart.title), drawing);
  const known = chart.values.map((value) => Math.max(value ?? 0, 1e-8));
  const low = Math.min(...known) / 1.5, high = Math.max(...known) * 1.2;
  return (width) => {
    const svg = canvas(width, TALL, `${chart.title}: ${known.map((v, i) => `layer ${i} ${number(v)}`).join(", ")}`);
    const y = axes(svg, {
      width, height: TALL, low, high, x: layerScale(known.length, width), xlabel: "layer",
      ylabel: chart.ylabel, ticks: evenTicks(0, known.length - 1, width / 40),
    });
    layerBars(svg, known, chart.keep, y, TALL - BOTTOM, width);
    drawing.replaceChildren(svg);
  };
}

function heat(place, chart) {
  const { steps, rows, keep, kl } = chart;
  const layers = rows[0].length, last = steps.length - 1;
  const map = node("div"), profile = node("div"), said = node("output");
  const input = node("input", { type: "range", min: 0, max: last, value: last, step: 1, "aria-label": "search step" });
  const slider = node("label", { class: "slider" }, said, input);
  place.append(node("h4", {}, chart.title), map, slider, profile);
  const row = Math.max(5, Math.min(16, 360 / layers));
  const tall = MAP + layers * row + BOTTOM + 4;
  let width = 0, cursor = null, edges = [], x = null;

  function show() {
    const at = Number(input.value);
    said.textContent = `step ${steps[at]}: held-out KL of the answer ${number(kl[at])}`;
    input.setAttribute("aria-valuetext", said.textContent);
    cursor.setAttribute("x", x(edges[at]));
    cursor.setAttribute("width", Math.max(2, x(edges[at + 1]) - x(edges[at])));
    const height = 150, bottom = height - BOTTOM;
    const svg = canvas(width, height, `Probability at step ${steps[at]}: ${rows[at].map((p, i) => `layer ${i} ${number(p)}`).join(", ")}`);
    const y = linear(0, 1, bottom, TOP - 10);
    for (const tick of [0, 0.5, 1]) {
      svg.append(shape("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }));
      svg.append(shape("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, String(tick)));
    }
    for (const tick of evenTicks(0, layers - 1, width / 40)) {
      svg.append(shape("text", { x: layerScale(layers, width)(tick), y: bottom + 16, "text-anchor": "middle" }, String(tick)));
    }
    svg.append(shape("text", { x: (LEFT + width - RIGHT) / 2, y: height - 4, "text-anchor": "middle" }, "layer"));
    layerBars(svg, rows[at], keep, y, bottom, width);
    profile.replaceChildren(svg);
  }
  input.addEventListener("input", show);

  return (wide) => {
    width = wide;
    const right = width - RIGHT - 26; // the stripe of the answer stands beside the map
    // A column reaches halfway to its neighbours.
    edges = [steps[0], ...steps.slice(1).map((step, i) => (step + steps[i]) / 2), Math.max(steps[last], steps[0] + 1)];
    x = linear(edges[0], edges.at(-1), LEFT, right);
    const svg = canvas(width, tall, `${chart.title} over ${steps.length} moments of the search${keep === null ? "" : `; kept at the end: ${keep.join(", ")}`}`);
    rows.forEach((probability, i) => probability.forEach((p, layer) => {
      svg.append(shape("rect", { x: x(edges[i]), y: MAP + layer * row, width: x(edges[i + 1]) - x(edges[i]) + 0.3, height: row - 0.5, class: "kept-bar", "fill-opacity": p }));
    }));
    for (let layer = 0; keep !== null && layer < layers; layer += 1) {
      svg.append(shape("rect", { class: isKept(keep, layer) ? "kept-bar" : "gone-bar", x: right + 12, y: MAP + layer * row + 1, width: 20, height: row - 2.5 }));
    }
    for (const tick of evenTicks(0, layers - 1, (layers * row) / 24)) {
      svg.append(shape("text", { x: LEFT - 6, y: MAP + (tick + 0.5) * row + 4, "text-anchor": "end" }, String(tick)));
    }
    for (const tick of evenTicks(edges[0], edges.at(-1), width / 80)) {
      svg.append(shape("text", { x: x(tick), y: MAP + layers * row + 16, "text-anchor": "middle" }, String(tick)));
    }
    svg.append(shape("text", { x: (LEFT + right) / 2, y: tall - 4, "text-anchor": "middle" }, "search step"));
    svg.append(shape("text", { x: 0, y: layers * row + MAP + 16 }, "layer ↑"));
    cursor = shape("rect", { class: "cursor", y: MAP, height: layers * row });
    svg.append(cursor);
    map.replaceChildren(svg);
    show();
  };
}

// ---------------------------------------------------------------- dots

// A row a name, a dot a seed; x is logarithmic. Of two states the first is hollow, the last full.
function dots(place, chart) {
  const { names, seeds, states } = chart, row = 28, top = 8;
  const tall = top + names.length * row + BOTTOM;
  const mark = (state) => (state === states.at(-1) && states.length > 1 ? "kept-bar" : "gone-bar");
  const drawing = node("div"), legend = node("ul", { class: "legend" });
  for (const state of states) {
    const swatch = shape("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" });
    swatch.append(shape("circle", { cx: 13, cy: 5, r: 4.5, class: mark(state) }));
    legend.append(node("li", {}, swatch, state.name));
  }
  place.append(node("h4", {}, chart.title), drawing, legend);

  const at = (value) => Math.max(value, 1e-8);
  const all = states.flatMap((state) => state.values.flat()).filter((value) => value !== null).map(at);
  if (!all.length) {
    drawing.append("nothing finite");
    return () => {};
  }
  const low = Math.min(...all) / 1.3, high = Math.max(...all) * 1.3;
  const told = names.map((name, i) =>
    `${name} ${states.map((state) => `${state.name} ${state.values[i].filter((value) => value !== null).map(number).join(", ")}`).join("; ")}`);

  return (width) => {
    const svg = canvas(width, tall, `${chart.title}: ${told.join(". ")}`);
    const left = Math.min(7 * Math.max(...names.map((name) => name.length)) + 12, width * 0.4);
    const bottom = tall - BOTTOM;
    const x = (value) => linear(Math.log(low), Math.log(high), left, width - RIGHT)(Math.log(value));
    for (const tick of logTicks(low, high)) {
      svg.append(shape("line", { class: "axis", x1: x(tick), x2: x(tick), y1: top, y2: bottom }));
      svg.append(shape("text", { x: x(tick), y: bottom + 16, "text-anchor": "middle" }, number(tick)));
    }
    svg.append(shape("text", { x: (left + width - RIGHT) / 2, y: tall - 4, "text-anchor": "middle" }, chart.xlabel));
    names.forEach((name, i) => {
      const y = top + (i + 0.5) * row;
      svg.append(shape("line", { class: "axis", x1: left, x2: width - RIGHT, y1: y, y2: y }));
      svg.append(shape("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, shorter(name, left - 8)));
      for (const state of states) {
        state.values[i].forEach((value, seed) => {
          if (value === null) return;
          const dot = shape("circle", { class: mark(state), cx: x(at(value)), cy: y, r: 5 });
          dot.append(shape("title", {}, `${name}, seed ${seeds[seed]}, ${state.name}: ${number(value)}`));
          svg.append(dot);
        });
      }
    });
    drawing.replaceChildren(svg);
  };
}

// ---------------------------------------------------------------- all of them

for (const place of document.querySelectorAll(".chart")) {
  const chart = CHARTS[Number(place.dataset.chart)];
  const draw = { curves, bars, heat, dots }[chart.kind](place, chart);
  let before = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.round(entry.contentRect.width);
    if (width && width !== before) draw((before = width));
  }).observe(place);
}
