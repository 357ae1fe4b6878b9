// All models of the server: one look tells whether the runs are healthy.

import { Spark } from "./charts.js";
import { health, worst } from "./health.js";
import { historyOf } from "./history.js";
import { html } from "./html.js";
import { useLook } from "./look.js";
import { Badge, Loading, ProblemNote } from "./parts.js";
import { Ranks, levelsOf } from "./ranks.js";
import { bytes, number, plural, rate, spaced, whole } from "./words.js";

const EVERY_MS = 1000;
const RANKS_EVERY_MS = 2000;
const VERDICT = {
  bad: "Something has failed.",
  warn: "Something needs a look.",
  ok: "All is well.",
  idle: "Nothing is being trained.",
};

function Fact({ name, children }) {
  return html`<div><dt>${name}</dt><dd>${children}</dd></div>`;
}

function Card({ model }) {
  const history = historyOf(model);
  const state = health(model, history.movedMs);
  const step = model.last_step;
  return html`<li class="card ${state.level}">
    <div class="head">
      <h2><a href=${`#/models/${encodeURIComponent(model.name)}`}>${model.name}</a></h2>
      <${Badge} level=${state.level}>${state.word}</${Badge}>
    </div>
    <p class="quiet why">${state.why}</p>
    <${Spark} history=${history} name="rate" label=${`Versions per second of ${model.name}`} />
    <dl class="facts">
      <${Fact} name="Version">${whole(model.version)}</${Fact}>
      <${Fact} name="Versions / s">${rate(history.now("rate"))}</${Fact}>
      <${Fact} name="Workers">${whole(model.workers_live)}</${Fact}>
      <${Fact} name="Staleness">${step ? whole(step.staleness) : "–"}</${Fact}>
      <${Fact} name="Gradient norm">${number(step?.gradient_norm)}</${Fact}>
      <${Fact} name="Loss">${number(step?.metrics.loss)}</${Fact}>
    </dl>
    <p class="quiet">${plural(model.elements, "element")} in ${plural(model.parameters, "parameter")} · ${bytes(model.bytes)} · ${model.policy.policy}${model.timeline > 1 ? ` · timeline ${model.timeline}` : ""}</p>
  </li>`;
}

function NotLoaded({ model }) {
  return html`<li class="card bad">
    <div class="head"><h2>${model.name}</h2><${Badge} level="bad">Not loaded</${Badge}></div>
    <p class="why">${spaced(model.problem)}</p>
    <p class="quiet">Stop the server, and run <code>pushstep check</code> on its data folder.</p>
  </li>`;
}

export function Overview({ grpc, ranks }) {
  const job = useLook(ranks > 1 ? "/shards" : null, RANKS_EVERY_MS, { query: { limit: 1 } }).found;
  const { found, problem } = useLook("/models", EVERY_MS, {
    note: (answer) => answer.models.forEach((model) => historyOf(model).note(model)),
  });
  if (!found) return html`<${Loading} problem=${problem?.isLost ? null : problem} />`;
  const levels = found.models.map((model) => health(model, historyOf(model).movedMs).level);
  if (found.not_loaded.length) levels.push("bad");
  const isEmpty = levels.length === 0;
  levels.push(...levelsOf(job));
  return html`<div class="title">
      <h1>Models</h1>
      <p class="verdict ${worst(levels)}" role="status">${VERDICT[worst(levels)]}</p>
    </div>
    ${!problem?.isLost && html`<${ProblemNote} problem=${problem} />`}
    ${isEmpty
      ? html`<div class="panel empty"><h2>No model yet</h2>
          <p>The first worker that attaches makes one. Workers connect to <code>${grpc}</code>:</p>
          <pre tabindex="0">session = connect("${grpc}", model="flights", worker="w0")${"\n"}optimizer = session.attach(optimizer, module=model)</pre></div>`
      : html`<ul class="cards">
          ${found.not_loaded.map((model) => html`<${NotLoaded} key=${model.name} model=${model} />`)}
          ${found.models.map((model) => html`<${Card} key=${model.uid} model=${model} />`)}
        </ul>`}
    ${found.next && html`<p class="quiet">Only the first ${found.models.length} models are shown.</p>`}
    <${Ranks} job=${job} />`;
}
