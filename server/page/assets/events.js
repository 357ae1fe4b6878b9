// What has happened to a model, as it comes.

import { html, useState } from "./html.js";
import { Badge, Section } from "./parts.js";
import { clock, shown, spaced, whole } from "./words.js";

const AT_FIRST = 100;
const NOT_FACTS = new Set(["id", "key", "time", "kind", "by", "actor", "timeline", "version", "edit", "log"]);
const BAD = new Set(["failed", "step_failed", "snapshot_failed", "parameters_nonfinite", "snapshots_away", "storage_failed"]);
const WARN = new Set(["worker_expired", "worker_quarantined", "worker_evicted", "push_rejected", "push_refused", "restored", "deleted", "missed", "too_slow", "restarted"]);

const SENTENCES = {
  created: () => "The model was made",
  loaded: (e) => `Loaded from snapshot ${e.snapshot}`,
  joined: (e) => `${e.by} joined`,
  left: (e) => `${e.by} left`,
  restored: () => "A snapshot was restored; a new timeline began",
  snapshot_taken: (e) => `Snapshot ${e.snapshot} was taken`,
  snapshot_deleted: (e) => `Snapshot ${e.snapshot} was deleted`,
  worker_expired: (e) => `${e.worker} was not heard of, and is gone`,
  worker_evicted: (e) => `${e.worker} was evicted`,
  worker_quarantined: (e) => `${e.worker} was put in quarantine`,
  worker_released: (e) => `${e.worker} was released`,
  push_rejected: (e) => `A push of ${e.by} was rejected: ${spaced(e.code ?? "")}`,
  push_refused: (e) => `A push of ${e.by} was refused: ${spaced(e.code ?? "")}`,
  param_group_changed: (e) => {
    const values = Object.entries(e.values ?? {}).map(([name, value]) => `${name} = ${shown(value)}`);
    if (e.frozen !== undefined) values.push(e.frozen ? "frozen" : "no longer frozen");
    return `Group ${e.group}: ${values.join(", ")}`;
  },
  parameters_nonfinite: (e) => `${whole(e.count)} parameters hold NaN or infinity: ${(e.parameters ?? []).join(", ")}`,
  parameters_finite: () => "All parameters are finite again",
  restarted: () => "The server was started anew; earlier events are gone",
  missed: (e) => `${whole(e.missed)} events are no longer kept`,
  ended: (e) => `No more events: ${spaced(e.why ?? "")}`,
  deleted: () => "The model was deleted",
};

function sentence(event) {
  if (SENTENCES[event.kind]) return SENTENCES[event.kind](event);
  const facts = Object.entries(event).filter(([name]) => !NOT_FACTS.has(name));
  const told = facts.map(([name, value]) => `${spaced(name)} ${shown(value)}`).join(", ");
  const words = spaced(event.kind);
  return `${words[0].toUpperCase()}${words.slice(1)}${told ? `: ${told}` : ""}`;
}

const levelOf = (kind) => (BAD.has(kind) ? "bad" : WARN.has(kind) ? "warn" : "");

function Event({ event }) {
  const level = levelOf(event.kind);
  const who = event.actor ?? "";
  return html`<li>
    <time datetime=${new Date(event.time * 1000).toISOString()}>${clock(event.time)}</time>
    <span class="at">${event.version === undefined ? "" : `v${whole(event.version)}`}</span>
    <span class="what ${level}">${sentence(event)}</span>
    <span class="by">${who && `by ${who}`}</span>
  </li>`;
}

export function Events({ events }) {
  const [most, setMost] = useState(AT_FIRST);
  const [kind, setKind] = useState("");
  const kinds = [...new Set(events.list.map((event) => event.kind))].sort();
  const wanted = events.list.filter((event) => !kind || event.kind === kind);
  return html`<${Section} title="Events" action=${html`<${Badge} level=${events.isOpen ? "ok" : "idle"}>${events.isOpen ? "live" : "waiting"}</${Badge}>`}>
    <div class="fields"><div class="field">
      <label for="event-kind">Show</label>
      <select id="event-kind" value=${kind} onChange=${(event) => setKind(event.target.value)}>
        <option value="">all</option>${kinds.map((each) => html`<option value=${each}>${spaced(each)}</option>`)}
      </select>
    </div></div>
    ${wanted.length === 0
      ? html`<p class="quiet">Nothing has happened yet.</p>`
      : html`<ol class="events" reversed>${wanted.slice(0, most).map((event) => html`<${Event} key=${event.key} event=${event} />`)}</ol>`}
    ${wanted.length > most && html`<div class="actions"><button type="button" class="button" onClick=${() => setMost(most * 4)}>Show more of ${whole(wanted.length)}</button></div>`}
  </${Section}>`;
}
