// When pushes are applied, and which are let in. The forms are made of the server's own description.

import { modelPath, open, send } from "./api.js";
import { html, useState } from "./html.js";
import { useResource } from "./look.js";
import { Button, EditAnswer, EditButtons, Loading, Section, useEdit } from "./parts.js";
import { SchemaFields, changesIn } from "./schema_form.js";
import { number, whole } from "./words.js";

let description = null;

// The schemas of the REST description, which is fetched once for the whole page.
export function schemas() {
  description ??= open("/../openapi.json")
    .then((answer) => answer.json())
    .then((found) => found.components.schemas)
    .catch((problem) => {
      description = null;
      throw problem;
    });
  return description;
}

// A resource with its schema: what a settings form needs.
export async function settings(below) {
  const [known, answer] = await Promise.all([schemas(), open(below)]);
  return { found: { values: await answer.json(), schemas: known }, etag: answer.headers.get("ETag") };
}

// A form for settings that GET and PATCH of `below` know. `pick(draft)` chooses the schema.
export function Settings({ below, title, about, what, found, etag, again, pick, skip = [], mayEdit, extra }) {
  const [draft, setDraft] = useState({});
  const { values } = found;
  const schema = pick(draft, values, found.schemas);
  const root = { components: { schemas: found.schemas } };
  const edit = useEdit(
    (dryRun) => {
      const { policy, ...fields } = draft;
      const known = Object.fromEntries(Object.entries(fields).filter(([field]) => field in schema.properties));
      const body = { ...(policy ? { policy } : {}), ...changesIn(known, schema, root) };
      return send("PATCH", below, body, { query: { dry_run: dryRun || undefined }, etag });
    },
    {
      onDone: () => {
        setDraft({});
        return again();
      },
      onStale: again,
    },
  );
  const change = (next) => {
    setDraft(next);
    edit.clear();
  };
  const isChanged = Object.keys(draft).length > 0;
  return html`<${Section} title=${title}>
    <p class="quiet">${about}</p>
    ${extra?.({ draft, change, values, known: found.schemas, mayEdit })}
    <${SchemaFields} prefix=${what.replaceAll(" ", "-")} schema=${schema} root=${root} values=${values} draft=${draft} onDraft=${change} skip=${skip} mayEdit=${mayEdit} />
    ${mayEdit && html`<${EditButtons} edit=${edit} isChanged=${isChanged}>
      ${isChanged && html`<${Button} kind="plain" onClick=${() => change({})}>Reset</${Button}>`}
    </${EditButtons}>`}
    <${EditAnswer} edit=${edit} what=${`The ${what} was changed`} />
  </${Section}>`;
}

const WORDS = {
  async: "async: each push is applied at once",
  bounded: "bounded: a fast worker waits for slow ones",
  sync: "sync: one step for a push of each worker",
};
const wordsOf = (policy) => WORDS[policy] ?? policy;

// The schema of each policy's settings, by the policy's name.
function policySchemas(known) {
  const found = Object.values(known).filter((schema) => schema.properties?.policy?.const);
  return Object.fromEntries(found.map((schema) => [schema.properties.policy.const, schema]));
}

function Choice({ draft, change, values, known, mayEdit }) {
  const chosen = draft.policy ?? values.policy;
  if (!mayEdit) return html`<p><strong>${wordsOf(chosen)}</strong></p>`;
  function choose(event) {
    const policy = event.target.value;
    change(policy === values.policy ? {} : { policy });
  }
  return html`<div class="fields"><div class="field wide">
    <label for="policy-kind">policy</label>
    <select id="policy-kind" class=${draft.policy ? "changed" : ""} value=${chosen} onChange=${choose}>
      ${Object.keys(policySchemas(known)).map((key) => html`<option value=${key}>${wordsOf(key)}</option>`)}
    </select>
  </div></div>`;
}

export function Policy({ name, stamp, mayEdit }) {
  const [policyPath, gatePath] = [modelPath(name, "policy"), modelPath(name, "gate")];
  const policy = useResource(() => settings(policyPath), stamp);
  const gate = useResource(() => settings(gatePath), stamp);
  if (!policy.found || !gate.found) return html`<${Loading} problem=${policy.problem ?? gate.problem} />`;
  const { norms_seen: seen, norm_limit: limit } = gate.found.values;
  return html`
    <${Settings} ...${policy} below=${policyPath} title="Policy" what="policy" mayEdit=${mayEdit} skip=${["policy"]} extra=${Choice}
      about="When a push is applied. No push is lost when it changes."
      pick=${(draft, values, known) => policySchemas(known)[draft.policy ?? values.policy]} />
    <${Settings} ...${gate} below=${gatePath} title="Gate" what="gate" mayEdit=${mayEdit}
      about=${`Which pushes are let in. It has seen the norms of ${whole(seen)} pushes; ${limit === null ? "no norm is too large now" : `a norm above ${number(limit)} is refused now`}.`}
      pick=${(draft, values, known) => known.GateSettings} />`;
}
