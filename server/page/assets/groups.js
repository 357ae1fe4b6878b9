// Param groups: hyperparameters, who holds them, and an editor that tries an edit before it is made.

import { all, modelPath, send } from "./api.js";
import { html, useState } from "./html.js";
import { useResource } from "./look.js";
import { Button, EditAnswer, EditButtons, Loading, Section, useEdit } from "./parts.js";
import { Field, textOf, valueOf } from "./schema_form.js";
import { plural, shown, spaced } from "./words.js";

const NOT_VALUES = new Set(["index", "rule", "optimizer", "params", "params_total", "held", "scheduled_by", "frozen", "etag"]);
const NAMES_SHOWN = 12;

function valuesOf(group) {
  return Object.entries(group).filter(([name]) => !NOT_VALUES.has(name));
}

const kindOf = (value) => ({ kind: typeof value === "boolean" ? "boolean" : "number", mayBeNull: false });

function Held({ group }) {
  return html`<p class="quiet">
    ${group.frozen && html`<span class="tag">frozen: steps leave it as it is</span>`}
    ${group.scheduled_by && html`<span class="tag">lr is set by the hook ${group.scheduled_by}</span>`}
    ${group.held.map((name) => html`<span class="tag">${name} is held by an operator</span>`)}
  </p>`;
}

function Editor({ name, group, onDone }) {
  const [draft, setDraft] = useState({});
  const [holds, setHolds] = useState(true);
  const known = { ...Object.fromEntries(valuesOf(group)), frozen: group.frozen };
  const edit = useEdit(
    (dryRun) => {
      const changes = Object.entries(draft).map(([field, text]) => [field, valueOf(text, kindOf(known[field]), field)]);
      const query = { hold: holds, dry_run: dryRun || undefined };
      return send("PATCH", modelPath(name, "param-groups", group.index), Object.fromEntries(changes), { query, etag: group.etag });
    },
    {
      onDone: () => {
        setDraft({});
        return onDone();
      },
      onStale: onDone,
    },
  );

  function change(field, text) {
    const { [field]: _, ...rest } = draft;
    const was = textOf(known[field], kindOf(known[field]));
    setDraft(text === was ? rest : { ...rest, [field]: text });
    edit.clear();
  }

  return html`<form onSubmit=${(event) => {
    event.preventDefault();
    if (Object.keys(draft).length) edit.run(false);
  }}>
    <div class="fields">${Object.entries(known).map(([field, value]) => {
      const of = kindOf(value);
      return html`<${Field} key=${field} id=${`group-${group.index}-${field}`} name=${field} of=${of}
        text=${draft[field] ?? textOf(value, of)} isChanged=${field in draft} onText=${(text) => change(field, text)} />`;
    })}</div>
    <div class="actions">
      <label class="check" for=${`hold-${group.index}`}>
        <input id=${`hold-${group.index}`} type="checkbox" checked=${holds} onChange=${(event) => setHolds(event.target.checked)} />
        Hold against the workers' schedulers
      </label>
    </div>
    <${EditButtons} edit=${edit} isChanged=${Object.keys(draft).length > 0}>
      ${Object.keys(draft).length > 0 && html`<${Button} kind="plain" onClick=${() => setDraft({})}>Reset</${Button}>`}
    </${EditButtons}>
    <${EditAnswer} edit=${edit} />
  </form>`;
}

function Group({ name, group, mayEdit, onDone }) {
  const names = group.params.slice(0, NAMES_SHOWN);
  const more = group.params_total - names.length;
  return html`<${Section} title=${`Group ${group.index} · ${group.rule}`}
      action=${html`<span class="quiet">${plural(group.params_total, "parameter")}</span>`}>
    <${Held} group=${group} />
    ${mayEdit
      ? html`<${Editor} name=${name} group=${group} onDone=${onDone} />`
      : html`<dl class="plain-values">${valuesOf(group).map(([field, value]) => html`<div><dt>${spaced(field)}</dt><dd>${shown(value)}</dd></div>`)}</dl>`}
    <details><summary>Parameters</summary><p>${names.map((param) => html`<code>${param}</code> `)}${more > 0 && `and ${more} more`}</p></details>
  </${Section}>`;
}

export function Groups({ name, stamp, mayEdit }) {
  const { found, problem, again } = useResource(() => all(modelPath(name, "param-groups"), "param_groups"), stamp);
  if (!found) return html`<${Loading} problem=${problem?.isLost ? null : problem} />`;
  return found.param_groups.map(
    (group) => html`<${Group} key=${group.index} name=${name} group=${group} mayEdit=${mayEdit} onDone=${again} />`,
  );
}
