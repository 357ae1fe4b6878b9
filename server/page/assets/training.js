// The live charts of one model, and its workers in short.

import { Chart } from "./charts.js";
import { ROOMS } from "./history.js";
import { html } from "./html.js";
import { number, seconds } from "./words.js";

const TONES = ["one", "two", "three", "four", "five", "six"];
const toned = (names, title) => names.map((name, index) => ({ name, tone: TONES[index % TONES.length], title: title(name) }));
const MOST_LINES = 6;

export function Training({ model, history }) {
  const groups = model.figures.lr.slice(0, MOST_LINES).map((_, index) => `lr${index}`);
  const rooms = ROOMS.filter((room) => model.figures.seconds[room].count > 0);
  const hasLoss = history.latest("loss") !== null || model.last_step?.metrics.loss !== undefined;
  return html`<div class="charts">
    <${Chart} title="Pushes" unit="per second" history=${history} format=${number}
      lines=${[{ name: "applied", tone: "one", title: "applied" }, { name: "others", tone: "bad", title: "not applied" }]} />
    <${Chart} title="Step time by room" unit="mean of a push" history=${history} format=${(ms) => seconds(ms / 1000)}
      lines=${toned(rooms, (room) => room)} />
    ${hasLoss && html`<${Chart} title="Loss" unit="as workers report it" history=${history} format=${number}
      lines=${[{ name: "loss", tone: "one", title: "of the last push" }]} />`}
    <${Chart} title="Gradient norm" unit="of the last push" history=${history} format=${number} lines=${[{ name: "norm", tone: "two", title: "norm" }]} />
    <${Chart} title="Staleness" unit="versions, mean" history=${history} format=${number} lines=${[{ name: "staleness", tone: "three", title: "mean" }]} />
    <${Chart} title="Learning rate" unit="by param group" history=${history} format=${number} lines=${toned(groups, (name) => `group ${name.slice(2)}`)} />
  </div>
  ${model.groups > MOST_LINES && html`<p class="quiet">Of ${model.groups} groups, the first ${MOST_LINES} are drawn.</p>`}`;
}
