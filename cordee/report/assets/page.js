"use strict";
// Charts of a report. Each <figure> carries its numbers as JSON; uPlot draws them. All charts share
// one cursor and one range of steps. A "kind" of a series is line, faint, dots or area (stacked).
const sync = uPlot.sync("step");
const figures = [...document.querySelectorAll("figure")].map(element => {
  const spec = JSON.parse(element.querySelector("script").textContent);
  return {element, spec, plot: element.querySelector(".plot"), log: element.dataset.scale == "log",
    keys: [...element.querySelectorAll(".key[data-series]")], hidden: new Set(), chart: null};
});
const STEP_INCREMENTS = Array.from({length: 48}, (_, i) =>
  [1, 2, 5][i % 3] * 10 ** Math.floor(i / 3));
const unzoom = document.querySelector(".unzoom");
let zoom = null, active = null;

function colour(name) {
  const variable = /^var\((.+)\)$/.exec(name);
  return variable ? getComputedStyle(document.documentElement).getPropertyValue(variable[1]).trim()
    : name;
}

function format(value) {
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
  return size >= 1e3 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(4));
}

function formatTicks(values) {
  const shown = values.filter(v => v != null), gap = shown.length > 1 ? shown[1] - shown[0] : 0;
  const largest = Math.max(...shown.map(Math.abs));
  if (largest >= 1e7 || (largest && largest < 1e-3))
    return values.map(v => v == null ? "" : v ? v.toExponential().replace("e+", "e") : "0");
  const isEven = shown.every((v, i) => !i || Math.abs(v - shown[i - 1] - gap) < gap * 1e-6);
  const isWhole = v => Math.abs(v - Math.round(v)) < 1e-6;
  let decimals = 0;
  while (isEven && decimals < 5 && !isWhole(gap * 10 ** decimals)) decimals++;
  const options = isEven ? {minimumFractionDigits: decimals, maximumFractionDigits: decimals}
    : {maximumSignificantDigits: 4};
  return values.map(v => v == null ? "" : v.toLocaleString("en", options));
}

function roundTicks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    ticks.push(i * step || 0);
  return ticks;
}

function logTicks(low, high) {
  if (high / low < 4) return roundTicks(low, high, 4);
  const decades = Math.log10(high / low), ticks = [];
  const factors = decades < 1.2 ? [1, 2, 3, 5] : decades < 2.5 ? [1, 2, 5]
    : decades < 4 ? [1, 3] : [1];
  const stride = Math.ceil(decades / 7);
  for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e += stride)
    for (const factor of factors) ticks.push(+`${factor}e${e}`);
  return ticks.filter(t => t >= low * 0.999 && t <= high * 1.001);
}

// Low and high end of the y axis for what is seen. Single peaks do not flatten the rest where
// "clips" says so, and a level far away stays outside: the measured values are the subject.
function yLimits(chart, spec, log) {
  const [first, last] = chart.series[0].idxs, values = [];
  chart.series.forEach((series, k) => {
    for (let i = first; k && series.show && i <= last; i++)
      if (chart.data[k][i] != null) values.push(chart.data[k][i]);
  });
  if (!values.length) return log ? [0.1, 1] : [0, 1];
  values.sort((a, b) => a - b);
  let low = values[0], high = values[values.length - 1];
  const usual = values[Math.floor(0.97 * (values.length - 1))];
  if (spec.clips && !log) high = Math.min(high, 1.25 * usual);
  for (const level of spec.levels.filter(v => v < 1.6 * high && (!log || v > low / 10))) {
    low = Math.min(low, level);
    high = Math.max(high, level);
  }
  if (log) {
    high = Math.max(high, low * 1.5);
    const margin = (high / low) ** 0.04;
    return [low / margin, high * margin];
  }
  if (spec.zero || (low >= 0 && low < 0.2 * high)) low = Math.min(low, 0);
  const margin = 0.05 * (high - low || Math.abs(high) || 1);
  return [low == 0 ? 0 : low - margin, high + margin];
}

// Columns on one axis of steps: areas stand on each other, what a logarithm has not is left out.
function columns(figure, raw) {
  let base = null;
  return raw.map((column, k) => {
    if (!k) return column;
    const {kind} = figure.spec.series[k - 1];
    if (kind == "area") {
      const below = base, isHidden = figure.hidden.has(k);
      base = column.map((v, i) => (below ? below[i] : 0) + (isHidden ? 0 : v || 0));
      return column.map((v, i) => v == null ? v : base[i]);
    }
    return figure.log ? column.map(v => v == null || v > 0 ? v : null) : column;
  });
}

// The index of the value that the cursor means: columns have values at steps of their own.
function nearest(chart, k, index) {
  const x = chart.data[0], y = chart.data[k];
  if (!k || y[index] !== undefined) return index;
  let left = index, right = index;
  while (left >= 0 && y[left] === undefined) left--;
  while (right < y.length && y[right] === undefined) right++;
  if (left < 0) return right < y.length ? right : null;
  return right >= y.length || x[index] - x[left] <= x[right] - x[index] ? left : right;
}

function seriesOptions(figure, item, k) {
  const paint = colour(item.colour), isArea = item.kind == "area", isDots = item.kind == "dots";
  return {
    show: !figure.hidden.has(k), stroke: isArea ? undefined : paint,
    width: item.kind == "faint" ? 1 : 1.8, alpha: item.kind == "faint" ? 0.35 : 1,
    fill: isArea ? paint + "b8" : undefined,
    paths: isDots ? () => null : undefined,
    points: {show: isDots || item.count < 2, size: 8, width: 0, fill: paint, stroke: paint},
  };
}

function axis(extra) {
  const grid = {stroke: colour("var(--rule)"), width: 1};
  return {stroke: colour("var(--soft)"), font: "11.5px system-ui, sans-serif", gap: 7, grid,
    ticks: {show: false}, values: (_, ticks) => formatTicks(ticks), ...extra};
}

function overlay(figure, chart) {
  const add = (name, title) => {
    const element = document.createElement("div");
    element.className = name;
    element.title = title;
    return chart.over.appendChild(element);
  };
  figure.levels = figure.spec.levels.map(value => [add("level", format(value)), value]);
  figure.marks = figure.spec.marks.map(([label, step]) => [add("mark", label), step]);
  figure.at = add("at", "");
  chart.over.addEventListener("mouseenter", () => active = figure);
}

function place(figure, chart) {
  const put = (list, side, scale) => list.forEach(([element, value]) => {
    const {min, max} = chart.scales[scale];
    element.hidden = !(value >= min && value <= max);
    element.style[side] = element.hidden ? "" : chart.valToPos(value, scale) + "px";
  });
  put(figure.levels, "top", "y");
  put(figure.marks, "left", "x");
}

// Writes the values under the cursor into the legend, and the last ones when it is gone.
function showValues(figure, chart, raw) {
  const {idx, idxs, left} = chart.cursor, isInside = idx != null && left >= 0;
  figure.keys.forEach((key, i) => {
    const at = isInside ? idxs[i + 1] : null, value = at == null ? null : raw[i + 1][at];
    const output = key.querySelector("b");
    output.dataset.last ??= output.textContent;
    output.textContent = isInside ? (value == null ? "-" : format(value)) : output.dataset.last;
  });
  figure.at.hidden = !isInside || figure != active;
  if (figure.at.hidden) return;
  figure.at.textContent = `step ${chart.data[0][idx].toLocaleString("en")}`;
  figure.at.classList.toggle("flip", left > chart.over.clientWidth - 80);
  figure.at.style.left = left + "px";
}

function setZoom(range) {
  zoom = range;
  unzoom.hidden = !range;
  for (const {chart, spec} of figures) {
    chart.setSelect({left: 0, width: 0, top: 0, height: 0}, false);
    chart.setScale("x", {min: (range || spec.x)[0], max: (range || spec.x)[1]});
  }
}

function options(figure, raw) {
  const {spec, plot, log} = figure, isCrowded = spec.series.length > 5;
  const areas = spec.series.map((item, i) => item.kind == "area" ? i + 1 : 0).filter(k => k > 1);
  return {
    width: plot.clientWidth, height: plot.clientHeight, padding: [10, 22, 0, 0],
    legend: {show: false},
    scales: {
      x: {time: false, range: () => zoom || spec.x},
      y: {distr: log ? 3 : 1, range: chart => yLimits(chart, spec, log)},
    },
    axes: [
      axis({incrs: STEP_INCREMENTS, space: 64, size: 26}),
      axis({size: 58, filter: (_, ticks) => ticks, splits: (_, k, low, high) =>
        log ? logTicks(low, high) : roundTicks(low, high, plot.clientHeight / 50)}),
    ],
    series: [{}, ...spec.series.map((item, i) => seriesOptions(figure, item, i + 1))],
    bands: areas.map(k => ({series: [k, k - 1]})),
    cursor: {
      y: false, drag: {x: true, y: false, setScale: false}, dataIdx: nearest,
      focus: {prox: isCrowded ? 30 : -1},
      sync: {key: sync.key, scales: ["x", null],
        filters: {pub: type => type == "mousemove" || type == "mouseleave"}},
      bind: {dblclick: () => () => setZoom(null)},
      points: {...(spec.series.length > 12 && {show: false}), size: 8, width: 1.5,
        stroke: colour("var(--card)"), fill: (_, k) => colour(spec.series[k - 1].colour)},
    },
    focus: {alpha: isCrowded ? 0.25 : 1},
    hooks: {
      init: [chart => overlay(figure, chart)],
      draw: [chart => place(figure, chart)],
      setCursor: [chart => figure.at && showValues(figure, chart, raw)],
      setSeries: [(_, focused) => figure.keys.forEach((key, i) =>
        key.classList.toggle("near", isCrowded && focused == i + 1))],
      setSelect: [chart => {
        const {left, width} = chart.select;
        if (width > 3) setZoom([chart.posToVal(left, "x"), chart.posToVal(left + width, "x")]);
      }],
    },
  };
}

function draw(figure) {
  figure.chart?.destroy();
  figure.element.dataset.scale = figure.log ? "log" : "linear";
  const raw = uPlot.join(figure.spec.tables);
  figure.chart = new uPlot(options(figure, raw), columns(figure, raw), figure.plot);
}

for (const figure of figures) {
  draw(figure);
  figure.element.querySelector(".toggle")?.addEventListener("click", () => {
    figure.log = !figure.log;
    draw(figure);
  });
  figure.keys.forEach((key, i) => key.addEventListener("click", () => {
    const isHidden = key.classList.toggle("off");
    figure.hidden[isHidden ? "add" : "delete"](i + 1);
    key.setAttribute("aria-pressed", !isHidden);
    draw(figure);
  }));
  new ResizeObserver(() => figure.chart.setSize({width: figure.plot.clientWidth,
    height: figure.plot.clientHeight})).observe(figure.plot);
}
unzoom.addEventListener("click", () => setZoom(null));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => figures.forEach(draw));
