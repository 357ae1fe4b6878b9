// A model's events as they come. EventSource cannot send a token, so this reads the stream itself.

import { modelPath, open } from "./api.js";
import { useEffect, useState } from "./html.js";

const KEPT = 1000;
const AGAIN_MS = 2000;
const SAVES = new Set(["snapshot_taken", "snapshot_deleted", "snapshot_failed", "restored", "loaded", "imported"]);

// The frames of a stream of server-sent events, one by one.
async function* frames(reader) {
  const decoder = new TextDecoder();
  let left = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    left += decoder.decode(value, { stream: true });
    const whole = left.split("\n\n");
    left = whole.pop();
    for (const text of whole) {
      const frame = { id: null, event: "", data: null };
      for (const line of text.split("\n")) {
        const [field, ...rest] = line.split(": ");
        if (field in frame) frame[field] = rest.join(": ");
      }
      yield frame;
    }
  }
}

// Follows the events until it is told to stop; comes again behind the last one that it has seen.
function follow(name, onEvents, onState) {
  const ended = new AbortController();
  let lastId = null;
  let timer = null;
  let isOpen = false;

  async function read() {
    if (isOpen || ended.signal.aborted || document.hidden) return;
    isOpen = true;
    let wait = AGAIN_MS;
    try {
      const headers = { Accept: "text/event-stream" };
      if (lastId) headers["Last-Event-ID"] = lastId;
      const answer = await open(modelPath(name, "events"), { headers, signal: ended.signal });
      onState(true);
      for await (const frame of frames(answer.body.getReader())) {
        if (frame.id) lastId = frame.id;
        if (!frame.data) continue;
        const told = JSON.parse(frame.data);
        onEvents(frame.event ? { kind: frame.event, time: Date.now() / 1000, key: `${frame.event} ${lastId}`, ...told } : { key: frame.id, ...told });
      }
    } catch (problem) {
      if (problem.status === 404 || problem.status === 401 || problem.status === 403) wait = null;
    }
    isOpen = false;
    if (ended.signal.aborted) return;
    onState(false);
    if (wait !== null) timer = setTimeout(read, wait);
  }

  read();
  document.addEventListener("visibilitychange", read);
  return () => {
    document.removeEventListener("visibilitychange", read);
    clearTimeout(timer);
    ended.abort();
  };
}

// The last events, newest first; how often the snapshots may have changed; whether events come now.
export function useEvents(name) {
  const [state, setState] = useState({ list: [], saved: 0, isOpen: false });
  useEffect(() => {
    let fresh = [];
    let timer = null;
    setState({ list: [], saved: 0, isOpen: false });
    function show() {
      timer = null;
      const come = fresh.reverse();
      fresh = [];
      setState((before) => ({
        ...before,
        list: [...come, ...before.list].slice(0, KEPT),
        saved: before.saved + come.filter((event) => SAVES.has(event.kind)).length,
      }));
    }
    const end = follow(
      name,
      (event) => {
        fresh.push(event);
        timer ??= setTimeout(show, 100); // many may come at once
      },
      (isOpen) => setState((before) => ({ ...before, isOpen })),
    );
    return () => {
      clearTimeout(timer);
      end();
    };
  }, [name]);
  return state;
}
