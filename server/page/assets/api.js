// REST: requests with the token, answers with their ETag, and problems as errors that can be shown in words.

const ROOT = new URL("../v1", import.meta.url).href;
const TOKEN = "pushstep-token";
// Of a request that is answered at once. Edits may wait for the disk, and snapshots for a large model.
export const PATIENCE_MS = 15_000;

export class Problem extends Error {
  constructor(status, code, message, retryAfterS = null) {
    super(message);
    Object.assign(this, { status, code, retryAfterS });
  }

  get isLost() {
    return this.status === 0;
  }
}

// What the whole page follows: whether the server answers, since when not, and whether it asks for a token.
export const connection = { isLost: false, sinceMs: 0, isRefused: null, listeners: new Set() };

function note(change) {
  if (Object.keys(change).every((key) => connection[key] === change[key])) return;
  Object.assign(connection, change);
  connection.listeners.forEach((tell) => tell());
}

export function token() {
  return sessionStorage.getItem(TOKEN);
}

export function setToken(text) {
  if (text) sessionStorage.setItem(TOKEN, text);
  else sessionStorage.removeItem(TOKEN);
  note({ isRefused: null });
}

// A path below /v1 of parts that may hold any characters.
export function path(...parts) {
  return parts.map((part) => `/${encodeURIComponent(part)}`).join("");
}

export const modelPath = (name, ...parts) => path("models", name, ...parts);

export function url(below, query = {}) {
  const known = Object.entries(query).filter(([, value]) => value !== undefined && value !== null);
  const asked = new URLSearchParams(known).toString();
  return ROOT + below + (asked ? `?${asked}` : "");
}

async function problemOf(answer) {
  const wait = Number(answer.headers.get("Retry-After")) || null;
  const text = await answer.text().catch(() => "");
  try {
    const told = JSON.parse(text);
    return new Problem(answer.status, told.code, told.detail || told.title, wait);
  } catch {
    return new Problem(answer.status, "", `The server answered with HTTP ${answer.status}.`, wait);
  }
}

export async function open(below, { method = "GET", query, headers = {}, body, signal } = {}) {
  const sent = { ...headers };
  const held = token();
  if (held) sent.Authorization = `Bearer ${held}`;
  let answer;
  try {
    answer = await fetch(url(below, query), { method, headers: sent, body, signal, cache: "no-store", credentials: "omit" });
  } catch (error) {
    // a request that the page itself has given up says nothing of the server; one that took too long does
    if (error.name !== "AbortError" && !connection.isLost) note({ isLost: true, sinceMs: Date.now() });
    throw error.name === "AbortError" ? error : new Problem(0, "", "The server does not answer.");
  }
  note({ isLost: false });
  if (answer.ok) return answer;
  const problem = await problemOf(answer);
  if (answer.status === 401 || problem.code === "too_many_attempts") note({ isRefused: problem });
  throw problem;
}

async function asked(below, options) {
  const answer = await open(below, options);
  const text = await answer.text();
  const found = text ? JSON.parse(text) : {};
  return { found, etag: answer.headers.get("ETag") };
}

export const get = (below, query, signal = AbortSignal.timeout(PATIENCE_MS)) => asked(below, { query, signal });

export function send(method, below, body, { query, etag } = {}) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  if (etag) headers["If-Match"] = etag;
  return asked(below, { method, query, headers, body: body === undefined ? undefined : JSON.stringify(body) });
}

// All pages of a list.
export async function all(below, key, query = {}) {
  let entries = [];
  let cursor = null;
  let first = null;
  do {
    const page = await get(below, { ...query, cursor });
    first ??= page;
    entries = entries.concat(page.found[key]);
    cursor = page.found.next;
  } while (cursor);
  return { found: { ...first.found, [key]: entries }, etag: first.etag };
}
