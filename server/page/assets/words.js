// Numbers and times as people read them.

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const NONE = "–";

export const whole = (value) => (value === null || value === undefined ? NONE : WHOLE.format(value));

// Three significant digits: 0.00123, 12.3, 1,230, 1.2e-9.
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return NONE;
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e7 || size < 1e-4) return value.toExponential(2).replace("e+", "e");
  if (size >= 1000) return WHOLE.format(value);
  return String(Number(value.toPrecision(3)));
}

export function rate(value) {
  if (value === null || value === undefined) return NONE;
  return value >= 100 ? WHOLE.format(value) : value.toFixed(value >= 10 ? 1 : 2);
}

export function seconds(value) {
  if (value === null || value === undefined) return NONE;
  if (value === 0) return "0 s";
  if (value < 1e-3) return `${number(value * 1e6)} µs`;
  if (value < 1) return `${number(value * 1e3)} ms`;
  if (value < 120) return `${number(value)} s`;
  if (value < 7200) return `${WHOLE.format(value / 60)} min`;
  return value < 172_800 ? `${WHOLE.format(value / 3600)} h` : `${WHOLE.format(value / 86_400)} days`;
}

export function bytes(value) {
  if (value === null || value === undefined) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const step = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log2(Math.max(value, 1)) / 10)));
  return `${number(value / 2 ** (10 * step))} ${units[step]}`;
}

export const ago = (epochS) => `${seconds(Math.round(Math.max(0, Date.now() / 1000 - epochS)))} ago`;

export function clock(epochS) {
  const at = new Date(epochS * 1000);
  const time = at.toLocaleTimeString("en-GB");
  return at.toDateString() === new Date().toDateString() ? time : `${at.toLocaleDateString("sv")} ${time}`;
}

export const plural = (count, one, many = `${one}s`) => `${whole(count)} ${count === 1 ? one : many}`;

// A value of settings as it stands in JSON, shortly.
export function shown(value) {
  if (value === null || value === undefined) return "none";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (Array.isArray(value) && value.every((each) => typeof each !== "object")) return value.map(shown).join(", ") || "none";
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : number(value);
  return typeof value === "string" ? value : JSON.stringify(value);
}

export const spaced = (word) => word.replaceAll("_", " ");
