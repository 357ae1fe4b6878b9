// Looking at the server again and again: only while the tab is visible, and never before the last answer has come.

import { PATIENCE_MS, connection, get } from "./api.js";
import { useEffect, useRef, useState } from "./html.js";

const AGAIN_MS = 2000;

// Calls `look(signal)` every `everyMs`. Returns a function that ends it.
export function repeatedly(look, everyMs) {
  let timer = null;
  let isOver = false;
  let isLooking = false;
  const ended = new AbortController();

  async function turn() {
    clearTimeout(timer);
    if (isOver || isLooking || document.hidden) return;
    isLooking = true;
    const begun = performance.now();
    let isLost = false;
    try {
      await look(ended.signal);
    } catch (error) {
      isLost = error.isLost;
      if (error.name === "TypeError") console.error(error);
    }
    isLooking = false;
    const pause = isLost ? AGAIN_MS : Math.max(everyMs - (performance.now() - begun), everyMs / 2);
    if (!isOver) timer = setTimeout(turn, pause);
  }

  document.addEventListener("visibilitychange", turn);
  turn();
  return () => {
    isOver = true;
    clearTimeout(timer);
    ended.abort();
    document.removeEventListener("visibilitychange", turn);
  };
}

// What a GET answers, again every `everyMs`; null `below` looks at nothing. `note` is called with each answer.
export function useLook(below, everyMs, { query, note } = {}) {
  const [state, setState] = useState({ found: null, problem: null });
  const latest = useRef(note);
  latest.current = note;
  const asked = JSON.stringify(query ?? {});
  useEffect(() => {
    setState({ found: null, problem: null });
    if (below === null) return undefined;
    return repeatedly(async (ended) => {
      try {
        const signal = AbortSignal.any([ended, AbortSignal.timeout(PATIENCE_MS)]);
        const { found } = await get(below, JSON.parse(asked), signal);
        latest.current?.(found);
        setState({ found, problem: null });
      } catch (problem) {
        if (problem.name !== "AbortError") setState((before) => ({ found: before.found, problem }));
        throw problem;
      }
    }, everyMs);
  }, [below, everyMs, asked]);
  return state;
}

// What `load()` brings, again whenever `stamp` changes or `again()` is called, which is done when it has come. What was there
// stays until then.
export function useResource(load, stamp) {
  const [state, setState] = useState({ found: null, etag: null, problem: null });
  const [turn, setTurn] = useState(0);
  const waiting = useRef([]);
  useEffect(() => {
    let isOver = false;
    let timer = null;
    async function fill() {
      try {
        const { found, etag } = await load();
        if (!isOver) setState({ found, etag, problem: null });
      } catch (problem) {
        if (isOver) return;
        setState((before) => ({ ...before, problem }));
        if (problem.isLost || problem.status === 503) timer = setTimeout(fill, AGAIN_MS);
      }
      if (!isOver) waiting.current.splice(0).forEach((done) => done());
    }
    fill();
    return () => {
      isOver = true;
      clearTimeout(timer);
    };
  }, [stamp, turn]);
  function again() {
    setTurn((before) => before + 1);
    return new Promise((done) => waiting.current.push(done));
  }
  return { ...state, again };
}

// The connection, followed.
export function useConnection() {
  const [, setTurn] = useState(0);
  useEffect(() => {
    const tell = () => setTurn((before) => before + 1);
    connection.listeners.add(tell);
    return () => connection.listeners.delete(tell);
  }, []);
  return connection;
}
