// Charts by uPlot, in the page's colours. Each says in words what its lines are at now.

import { html, useEffect, useLayoutEffect, useRef } from "./html.js";
import { clock } from "./words.js";

const HEIGHT_PX = 168;

// What a colour of the style sheet is now: canvases know no variables.
function colour(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

function optionsOf(lines, format, widthPx, isLog) {
  const [quiet, line] = [colour("quiet"), colour("line")];
  const axis = { stroke: quiet, font: "11px system-ui, sans-serif", grid: { stroke: line, width: 1 }, ticks: { show: false } };
  return {
    width: widthPx,
    height: HEIGHT_PX,
    legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false } },
    padding: [8, 30, 0, 0], // half of a time, at the last line
    scales: {
      x: { time: true },
      y: isLog ? { distr: 3 } : { range: (_, least, most) => (most > least || most !== 0 ? [Math.min(0, least), most > 0 ? most * 1.1 : 1] : [0, 1]) },
    },
    axes: [
      { ...axis, grid: { show: false }, size: 28, space: 70, values: (_, ticks) => ticks.map((at) => clock(at)) },
      { ...axis, size: 52, space: 34, values: (_, ticks) => ticks.map((value) => (value === null ? "" : format(value))) },
    ],
    series: [
      {},
      ...lines.map(({ tone }) => ({ stroke: colour(tone), width: 1.75, points: { show: false }, spanGaps: false })),
    ],
  };
}

function dataOf(history, lines, isLog) {
  const none = new Array(history.at.length).fill(null);
  const line = (name) => {
    const values = history.series[name] ?? none;
    return isLog ? values.map((value) => (value > 0 ? value : null)) : values;
  };
  return [history.at, ...lines.map(({ name }) => line(name))];
}

// `lines`: name (of the history), tone (of the style sheet) and title of each.
export function Chart({ title, unit, history, lines, format, isLog = false }) {
  const place = useRef(null);
  const plot = useRef(null);
  const drawn = lines.map(({ name }) => name).join(" ");

  useLayoutEffect(() => {
    function draw() {
      plot.current?.destroy();
      const widthPx = Math.max(place.current.clientWidth, 120);
      plot.current = new uPlot(optionsOf(lines, format, widthPx, isLog), dataOf(history, lines, isLog), place.current);
    }
    draw();
    const resized = new ResizeObserver(() => plot.current?.setSize({ width: Math.max(place.current.clientWidth, 120), height: HEIGHT_PX }));
    resized.observe(place.current);
    const system = matchMedia("(prefers-color-scheme: dark)");
    system.addEventListener("change", draw);
    addEventListener("themechange", draw);
    return () => {
      resized.disconnect();
      system.removeEventListener("change", draw);
      removeEventListener("themechange", draw);
      plot.current?.destroy();
      plot.current = null;
    };
  }, [history, drawn, isLog]);

  useEffect(() => {
    plot.current?.setData(dataOf(history, lines, isLog));
  });

  const now = lines.map(({ name, title: of }) => ({ of, value: history.latest(name) }));
  const words = now.map(({ of, value }) => `${of} ${value === null ? "unknown" : format(value)}`).join(", ");
  return html`<figure class="chart">
    <figcaption><h3>${title}</h3>${unit && html`<span class="quiet">${unit}</span>`}</figcaption>
    <div class="plot" ref=${place} role="img" aria-label=${`${title}: ${words}`}></div>
    <ul class="legend">${lines.map(
      ({ tone, title: of }, index) => html`<li><i class="tone-${tone}" aria-hidden="true"></i>${of} <b>${now[index].value === null ? "–" : format(now[index].value)}</b></li>`,
    )}</ul>
  </figure>`;
}

const SPARK = { width: 240, height: 36, points: 90 };

// A line of the last minutes without axes.
export function Spark({ history, name, label }) {
  const values = (history.series[name] ?? []).slice(-SPARK.points).map((value) => value ?? 0);
  const most = Math.max(...values, 1e-9);
  const shown = Math.max(values.length, SPARK.points / 3);
  const step = SPARK.width / (shown - 1);
  const first = shown - values.length;
  const points = values.map(
    (value, index) => `${((first + index) * step).toFixed(1)},${(SPARK.height - 2 - (value / most) * (SPARK.height - 4)).toFixed(1)}`,
  );
  return html`<svg class="spark" viewBox="0 0 ${SPARK.width} ${SPARK.height}" preserveAspectRatio="none" role="img" aria-label=${label}>
    <polyline points=${points.join(" ")} />
  </svg>`;
}
