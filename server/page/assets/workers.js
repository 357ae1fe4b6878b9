// Who trains the model: lag, last seen, outcomes; quarantine, release and eviction, each asked for first.

import { modelPath, send } from "./api.js";
import { html, useState } from "./html.js";
import { Ask, Badge, Button, Loading, ProblemNote, Section, Table } from "./parts.js";
import { number, plural, seconds, spaced, whole } from "./words.js";

const STATES = { live: "ok", left: "idle", expired: "warn", evicted: "bad" };

const ACTS = {
  quarantine: {
    word: "Quarantine",
    title: (name) => `Quarantine ${name}?`,
    text: "Its pushes are refused until you release it. What it has pending is not applied, and no round waits for it.",
    run: (model, name) => send("POST", modelPath(model, "workers", name, "quarantine")),
  },
  release: {
    word: "Release",
    kind: "primary",
    title: (name) => `Release ${name}?`,
    text: "Its pushes are read again from now on.",
    run: (model, name) => send("POST", modelPath(model, "workers", name, "release")),
  },
  evict: {
    word: "Evict",
    title: (name) => `Evict ${name}?`,
    text: "Its session ends at once. It may join again by hand.",
    run: (model, name) => send("DELETE", modelPath(model, "workers", name)),
  },
};

function others(outcomes) {
  return Object.entries(outcomes)
    .filter(([outcome, count]) => outcome !== "applied" && count > 0)
    .map(([outcome, count]) => `${whole(count)} ${spaced(outcome)}`)
    .join(", ");
}

function underPolicy(worker) {
  if (worker.round !== undefined && worker.round !== "none") return `round: ${worker.round}`;
  if (worker.clocks_ahead) return `${plural(worker.clocks_ahead, "clock")} ahead`;
  return "";
}

function Row({ worker, mayEdit, onAct }) {
  const metrics = Object.entries(worker.metrics).slice(0, 3).map(([name, value]) => `${name} ${number(value)}`).join(", ");
  const isHere = worker.state === "live";
  return html`<tr data-worker=${worker.name}>
    <td class="name">${worker.name}</td>
    <td data-label="state"><${Badge} level=${worker.quarantined ? "bad" : STATES[worker.state]}>${worker.quarantined ? "quarantined" : worker.state}</${Badge}>
      ${worker.lead && html` <span class="tag">lead</span>`}${underPolicy(worker) && html` <span class="tag">${underPolicy(worker)}</span>`}</td>
    <td class="number" data-label="lag">${whole(worker.lag)}</td>
    <td class="number" data-label="staleness">${whole(worker.staleness)}</td>
    <td class="number" data-label="last seen">${seconds(Number(worker.last_seen_s.toPrecision(2)))} ago</td>
    <td class="number" data-label="applied">${whole(worker.outcomes.applied ?? 0)}</td>
    <td data-label="other outcomes">${others(worker.outcomes) || "–"}</td>
    <td class="number" data-label="in flight">${whole(worker.in_flight)}</td>
    <td data-label="metrics">${metrics || "–"}</td>
    ${mayEdit && html`<td><div class="actions">
      ${worker.quarantined
        ? html`<${Button} aria-label=${`Release ${worker.name}`} onClick=${() => onAct("release", worker.name)}>Release</${Button}>`
        : html`<${Button} aria-label=${`Quarantine ${worker.name}`} onClick=${() => onAct("quarantine", worker.name)}>Quarantine</${Button}>`}
      ${isHere && html`<${Button} aria-label=${`Evict ${worker.name}`} onClick=${() => onAct("evict", worker.name)}>Evict</${Button}>`}
    </div></td>`}
  </tr>`;
}

export function Workers({ name, workers, mayEdit }) {
  const [asked, setAsked] = useState(null);
  const { found, problem } = workers;
  if (!found) return html`<${Loading} problem=${problem?.isLost ? null : problem} />`;
  const count = (name) => ({ name, kind: "number" });
  const columns = ["worker", "state", count("lag"), count("staleness"), count("last seen"), count("applied"), "other outcomes", count("in flight"), "metrics"];
  const act = asked && ACTS[asked.kind];
  return html`<${Section} title=${plural(found.total, "worker")}>
    ${problem && !problem.isLost && html`<${ProblemNote} problem=${problem} />`}
    ${found.total === 0
      ? html`<p class="quiet">No worker has joined yet.</p>`
      : html`<${Table} label="Workers" columns=${[...columns, ...(mayEdit ? [{ name: html`<span class="hidden">actions</span>` }] : [])]}>
          ${found.workers.map((worker) => html`<${Row} key=${worker.name} worker=${worker} mayEdit=${mayEdit} onAct=${(kind, of) => setAsked({ kind, of })} />`)}
        </${Table}>`}
    ${found.next && html`<p class="quiet">The first ${whole(found.workers.length)} by name are shown.</p>`}
    ${asked && html`<${Ask} title=${act.title(asked.of)} word=${act.word} kind=${act.kind} act=${() => act.run(name, asked.of)} onClose=${() => setAsked(null)}>
      <p>${act.text}</p>
    </${Ask}>`}
  </${Section}>`;
}
