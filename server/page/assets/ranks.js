// The ranks of a job: who is there, how full each is, and who holds up the others. A server alone has no such table.

import { html } from "./html.js";
import { Badge, Section, Table } from "./parts.js";
import { bytes, number, seconds, whole } from "./words.js";

const LEVELS = { serving: "ok", starting: "idle", stopping: "idle", awaited: "warn", silent: "bad" };
// Figures that are older than this are marked: the rank does not answer.
const OLD_S = 2;
const COLUMNS = [
  "Rank",
  "State",
  "Address",
  { name: "Memory", kind: "number" },
  { name: "Staging", kind: "number" },
  { name: "Pushes staged", kind: "number" },
  { name: "Versions behind", kind: "number" },
  { name: "Step", kind: "number" },
  { name: "Journal", kind: "number" },
];

export const levelsOf = (job) => (job?.ranks ?? []).map((rank) => LEVELS[rank.state]).filter((level) => level !== "ok");

const of = (room) => (room ? `${bytes(room.held)} of ${bytes(room.limit)}` : "–");
const mean = (counted) => (counted?.count ? seconds(counted.sum / counted.count) : "–");

function Row({ rank }) {
  const isOld = rank.figures_age_s === null || rank.figures_age_s > OLD_S;
  return html`<tr data-rank=${rank.rank}>
    <td class="name">${rank.rank}</td>
    <td data-label="state"><${Badge} level=${LEVELS[rank.state]}>${rank.state}</${Badge}>
      ${isOld && rank.figures_age_s !== null && html` <span class="tag">as of ${seconds(Math.round(rank.figures_age_s))} ago</span>`}</td>
    <td data-label="address"><code>${rank.address ?? "–"}</code></td>
    <td class="number" data-label="memory">${of(rank.bytes)}</td>
    <td class="number" data-label="staging">${of(rank.staging_bytes)}</td>
    <td class="number" data-label="pushes staged">${whole(rank.pushes_staged)}</td>
    <td class="number" data-label="versions behind">${whole(rank.versions_behind)}</td>
    <td class="number" data-label="step">${mean(rank.seconds?.step)}</td>
    <td class="number" data-label="journal">${mean(rank.seconds?.journal)}</td>
  </tr>`;
}

export function Ranks({ job }) {
  if (!job || job.world === 1) return null;
  return html`<${Section} title="Ranks">
    <p class="quiet">${job.ready ? "All ranks are ready." : "Not all ranks are ready."} The fullest holds ${number(job.skew)} times the mean.</p>
    <${Table} label="Ranks" columns=${COLUMNS}>${job.ranks.map((rank) => html`<${Row} key=${rank.rank} rank=${rank} />`)}</${Table}>
  </${Section}>`;
}
