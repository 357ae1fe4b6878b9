// One model: its health in a line, its figures, and a tab for each thing that can be looked at or changed.

import { modelPath } from "./api.js";
import { Events } from "./events.js";
import { Groups } from "./groups.js";
import { health } from "./health.js";
import { historyOf } from "./history.js";
import { Hooks } from "./hooks.js";
import { html, useEffect, useRef } from "./html.js";
import { useLook } from "./look.js";
import { Badge, Loading, ProblemNote } from "./parts.js";
import { Policy } from "./policy.js";
import { Snapshots } from "./snapshots.js";
import { useEvents } from "./stream.js";
import { Training } from "./training.js";
import { Workers } from "./workers.js";
import { ago, number, rate, whole } from "./words.js";

const TABS = [
  ["training", "Training", Training],
  ["workers", "Workers", Workers],
  ["groups", "Param groups", Groups],
  ["hooks", "Hooks", Hooks],
  ["policy", "Policy", Policy],
  ["snapshots", "Snapshots", Snapshots],
  ["events", "Events", Events],
];

function Figure({ name, children, detail }) {
  return html`<div><dt>${name}</dt><dd>${children}${detail && html`<small>${detail}</small>`}</dd></div>`;
}

function Figures({ model, history }) {
  const { figures, last_step: step } = model;
  const behind = model.version - figures.durable_version;
  const { snapshot } = figures;
  return html`<dl class="figures">
    <${Figure} name="Version" detail=${model.timeline > 1 && `timeline ${model.timeline}`}>${whole(model.version)}</${Figure}>
    <${Figure} name="Pushes / s">${rate(history.now("applied"))}</${Figure}>
    <${Figure} name="Workers" detail="live">${whole(model.workers_live)}</${Figure}>
    <${Figure} name="Staleness" detail="versions">${number(history.latest("staleness"))}</${Figure}>
    <${Figure} name="Gradient norm" detail=${step && step.clip_factor < 1 && `clipped to ${number(step.clip_factor)} of it`}>${number(step?.gradient_norm)}</${Figure}>
    <${Figure} name="Loss" detail=${step && step.metrics.loss === undefined && "not reported"}>${number(step?.metrics.loss)}</${Figure}>
    <${Figure} name="Snapshot" detail=${snapshot.created && `version ${whole(snapshot.version)}`}>${snapshot.created ? ago(snapshot.created) : "none yet"}</${Figure}>
    <${Figure} name="Not on disk" detail=${`versions · ${figures.durability}`}>${whole(Math.max(0, behind))}</${Figure}>
  </dl>`;
}

function Tabs({ base, tab }) {
  const bar = useRef(null);
  // on a phone they do not all fit
  useEffect(() => bar.current.querySelector("[aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" }), [tab]);
  return html`<nav class="tabs" aria-label="Parts of the model" ref=${bar}>
    ${TABS.map(([key, title]) => html`<a href=${`${base}/${key}`} aria-current=${key === tab ? "page" : undefined}>${title}</a>`)}
  </nav>`;
}

export function ModelView({ name, tab, mayEdit }) {
  const { found: model, problem } = useLook(modelPath(name), 1000, { note: (seen) => historyOf(seen).note(seen) });
  const workers = useLook(modelPath(name, "workers"), 2000, { query: { limit: 200 } });
  const events = useEvents(name);
  if (!model) {
    const gone = problem?.status === 404;
    return html`<p><a href="#/">All models</a></p>
      ${gone ? html`<div class="panel empty"><h1>No model ${name}</h1><p>It was deleted, or never made.</p></div>` : html`<${Loading} problem=${problem?.isLost ? null : problem} />`}`;
  }
  const history = historyOf(model);
  const state = health(model, history.movedMs);
  const [, , View] = TABS.find(([key]) => key === tab) ?? TABS[0];
  // another one whenever an operator, a restore or a snapshot has changed something
  const stamp = `${model.uid} ${model.timeline} ${model.edit} ${model.groups} ${events.saved}`;
  const base = `#/models/${encodeURIComponent(name)}`;
  return html`<div class="title">
      <p class="crumb"><a href="#/">Models</a> <span aria-hidden="true">/</span></p>
      <h1>${name}</h1>
      <${Badge} level=${state.level}>${state.word}</${Badge}>
      <p class="quiet why">${state.why}</p>
    </div>
    ${problem && !problem.isLost && html`<${ProblemNote} problem=${problem} />`}
    <${Figures} model=${model} history=${history} />
    <${Tabs} base=${base} tab=${tab} />
    <${View} name=${name} model=${model} history=${history} workers=${workers} events=${events} stamp=${stamp} mayEdit=${mayEdit} />`;
}
